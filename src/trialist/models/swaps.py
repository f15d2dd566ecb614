"""Swaps of feed-forward layers in existing models of transformers, kept in their configuration.

The layer to replace is found by structure: the one part of a decoder layer, beside its attention, that holds two or three
linear layers from the width of the stream to an inner width and back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trialist.models.attention_interface import calls_attention_interface, plain_model
from trialist.models.peer.layer import PEER

SWAPS = ("peer",)
MASK = "ffn_padding_mask"
"""Argument by which the padding mask travels from the model to its blocks; no attention function sees it"""
PROBES = 512
"""Random inputs by which the size of the output of a replaced layer is measured"""


class SwappedPEER(PEER):
    """`PEER` in a model that calls its feed-forward without a padding mask: the block around it hands one over."""

    recorded_in = "swapped_ffn"
    handed_over: Tensor | None = None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, self.handed_over if padding_mask is None else padding_mask)


def swap_ffn(model: PreTrainedModel, layers: Sequence[int], to: str = "peer", **settings: Any) -> PreTrainedModel:
    """Replace the feed-forward of `layers` by a PEER layer with new weights, in place; returns the model.

    settings: arguments of `PEER`, as `num_experts`; the output starts as large as that of the replaced layer for random
    input of unit variance, unless `output_std` says otherwise. The padding mask that the model is given reaches the new
    layers. What was swapped is written to `model.config.swapped_ffn`, by which `trialist.models.load_model` loads the saved
    model; a plain `from_pretrained` would fill the layers with new dense weights. Wrap with PEFT after the swap, and name the
    new layers in its `modules_to_save`, or they stay as they were drawn.

    Works for decoders whose layers have a dense feed-forward module (Llama, Qwen, Gemma, Mistral, SmolLM, Phi, GPT-2, GPT-NeoX
    and their relatives, our own). Raises ValueError, and changes nothing, for others (mixtures of experts, encoder-decoders,
    models that do not pass arguments on to their layers), for layers that do not exist and for settings that cannot work.
    """
    if to not in SWAPS:
        raise ValueError(f"a feed-forward can be swapped to {', '.join(SWAPS)}, not {to!r}")
    if plain_model(model) is not model:
        raise ValueError("swap before wrapping: swap_ffn takes the transformers model, not a PEFT or compiled one")
    _refuse_second_swap(model)
    blocks = _decoder_layers(model)
    if not isinstance(layers, Sequence) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers is {layers!r}; give a list of layers, as [{len(blocks) // 2}]")
    chosen = list(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer < len(blocks) for layer in chosen):
        raise ValueError(f"layers is {chosen}; give different ones of the {len(blocks)} layers, 0 to {len(blocks) - 1}")
    old = [getattr(blocks[layer], _feed_forward(model, blocks[layer], layer)) for layer in chosen]
    given = settings.pop("output_std", None)
    output_std = [_output_std(part, _width(model)) if given is None else given for part in old]
    _replace(model, chosen, to, settings, output_std)
    return model


def _refuse_second_swap(model: PreTrainedModel) -> None:
    swapped = getattr(model.config, "swapped_ffn", None)
    if swapped is None:
        return
    if any(isinstance(module, SwappedPEER) for module in model.modules()):
        raise ValueError(f"layers {swapped['layers']} were swapped already; swap all layers in one call")
    raise ValueError(
        f"the model's configuration says that layers {swapped['layers']} were swapped, and they are dense: a plain "
        "from_pretrained drew them at random. Load it with trialist.models.load_model"
    )


def _replace(
    model: PreTrainedModel, layers: list[int], to: str, settings: Mapping[str, Any], output_std: Sequence[float]
) -> None:
    """Puts the new layers in, each with its own `output_std`, and records them."""
    blocks, width = _decoder_layers(model), _width(model)
    names = [_feed_forward(model, blocks[layer], layer) for layer in layers]
    built = []
    for layer, name, spread in zip(layers, names, output_std, strict=True):
        old = getattr(blocks[layer], name)
        like = next(old.parameters())
        new = SwappedPEER(width, **settings, output_std=spread)
        built.append(new.to(device=like.device, dtype=like.dtype).train(old.training))
    _hand_over_padding(model, blocks, layers)
    for layer, name, new in zip(layers, names, built, strict=True):
        setattr(blocks[layer], name, new)
    model.config.swapped_ffn = {
        "to": to,
        "layers": layers,
        "settings": built[0].settings,
        "output_std": list(output_std),
    }


def swapped_loader(source: str) -> Any:
    """The class whose `from_pretrained` loads `source`: the Auto class, or one that swaps as its configuration says."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:
        return AutoModelForCausalLM  # whose words about what is missing are better
    swapped = fields.get("swapped_ffn")
    if not isinstance(swapped, dict):
        return AutoModelForCausalLM
    base = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(source))]

    def build(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        self.__class__ = base  # what is loaded is an ordinary model of its class
        _replace(self, swapped["layers"], swapped["to"], swapped["settings"], swapped["output_std"])

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).hidden_size


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """As many blocks as the configuration names, each with an attention: those of one list, or of all lists together."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; swap_ffn takes decoders")
    count = config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and all(any(calls_attention_interface(part) for part in block.modules()) for block in module)
    ]
    found = [blocks for blocks in lists if len(blocks) == count] or [list(chain(*lists))]
    if len(found) != 1 or len(found[0]) != count:
        raise ValueError(
            f"{name} has {len(lists)} lists of layers with attention, and not one of {count} layers, so its feed-forwards "
            "cannot be told; Llama, Qwen, Gemma, Mistral, SmolLM, Phi, GPT-2, GPT-NeoX and their relatives have one"
        )
    return found[0]


def _feed_forward(model: PreTrainedModel, block: nn.Module, layer: int) -> str:
    """Name of the feed-forward among the parts of a block."""
    width = _width(model)
    found = [name for name, part in block.named_children() if _is_feed_forward(part, width)]
    if len(found) != 1:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in block.named_children())
        raise ValueError(
            f"layer {layer} of {type(model).__name__} has {len(found)} parts that look like a dense feed-forward of width "
            f"{width}, where one is wanted (its parts are {parts}); mixtures of experts cannot be swapped"
        )
    return found[0]


def _is_feed_forward(part: nn.Module, width: int) -> bool:
    """Two or three linear layers and no other matrix: one back to `width`, the others up to its inner width, or to twice it."""
    linear = [module for module in part.modules() if isinstance(module, nn.Linear | Conv1D)]
    matrices = sum(parameter.dim() > 1 for parameter in part.parameters())
    if (
        len(linear) not in (2, 3)
        or matrices != len(linear)
        or any(calls_attention_interface(m) for m in part.modules())
    ):
        return False
    required = [
        argument
        for argument in inspect.signature(part.forward).parameters.values()
        if argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
    ]
    shapes = [
        tuple(m.weight.shape) if isinstance(m, Conv1D) else tuple(m.weight.shape[::-1]) for m in linear
    ]  # (in, out)
    (inner, out), ups = shapes[-1], shapes[:-1]
    fits = all(source == width and target in (inner, 2 * inner) for source, target in ups)
    return len(required) == 1 and out == width and fits


@torch.no_grad()
def _output_std(feed_forward: nn.Module, width: int) -> float:
    """Standard deviation of its output for normal input, by a generator of its own."""
    like = next(feed_forward.parameters())
    if like.is_meta:
        return 1.0
    x = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0))
    training = feed_forward.training
    y = feed_forward.eval()(x.to(like.device, like.dtype))
    feed_forward.train(training)
    return max(float(y.float().std()), 1e-6)


def _hand_over_padding(model: PreTrainedModel, blocks: Sequence[nn.Module], layers: Sequence[int]) -> None:
    """The mask travels as an argument into the forward pass of the blocks, so that it is the right one also when gradient
    checkpointing repeats that, whatever passed through the model in between."""
    hook = model.base_model.register_forward_pre_hook(_send_padding_mask, with_kwargs=True)
    kinds: list[Any] = [type(block) for block in blocks]
    for block, kind in zip(blocks, kinds, strict=True):
        block.__class__ = _receiver(kind)
    try:
        _require_padding_mask(model, [blocks[layer] for layer in layers])
    except BaseException:
        hook.remove()
        for block, kind in zip(blocks, kinds, strict=True):
            block.__class__ = kind
        raise


def _send_padding_mask(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or tokens.shape[1] == 1:
        return args, kwargs  # a single token is decoded, and is never padding
    return args, {**kwargs, MASK: mask[:, -tokens.shape[1] :].bool()}


@functools.cache
def _receiver(kind: Any) -> Any:
    """The class of blocks `kind`, whose forward pass takes the padding mask too. A hook would not do: transformers repeats the
    forward pass alone where it checkpoints."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.pop(MASK, None)
        # several where PEFT keeps a copy of what it trains
        layers = [part for part in self.modules() if isinstance(part, SwappedPEER)]
        for layer in layers:
            layer.handed_over = mask
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            for layer in layers:
                layer.handed_over = None

    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _blank, (kind,), self.__dict__

    own = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)


def _blank(kind: Any) -> nn.Module:
    receiver = _receiver(kind)
    return receiver.__new__(receiver)


@torch.no_grad()
def _require_padding_mask(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError where the mask of a padded pass does not come to each of the blocks."""
    if next(model.parameters()).is_meta:
        return  # it is built to be loaded, and was tried when it was swapped
    reached: set[nn.Module] = set()

    def note(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs.get(MASK) is not None:
            reached.add(block)

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for block in blocks]
    modes = {module: module.training for module in model.modules()}
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    reason: Exception | None = None
    try:
        model.eval().base_model(
            input_ids=tokens, attention_mask=torch.tensor([[0, 1]], device=model.device), use_cache=False
        )
    except TypeError as error:  # an argument that somebody on the way does not take
        reason = error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if reason is not None or len(reached) < len(blocks):
        raise ValueError(
            f"{type(model).__name__} does not pass arguments on to its layers, so that PEER would count padding"
        ) from reason
