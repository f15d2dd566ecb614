"""Swaps of feed-forward layers in existing models of transformers, kept in their configuration.

The layer to replace is found by structure: the one part of a decoder layer, beside its attention, that holds two or three
linear layers from the width of the stream to an inner width and back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
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
    """`PEER` in a model that calls its feed-forward without a padding mask: the block around it hands one over before."""

    handed_over: Tensor | None = None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        mask, self.handed_over = self.handed_over, None
        return super().forward(x, mask if padding_mask is None else padding_mask)


def swap_ffn(model: PreTrainedModel, layers: Sequence[int], to: str = "peer", **settings: Any) -> PreTrainedModel:
    """Replace the feed-forward of `layers` by a PEER layer with new weights, in place; returns the model.

    settings: arguments of `PEER`, as `num_experts`; the output starts as large as that of the replaced layer for random
    input of unit variance, unless `output_std` says otherwise. The padding mask that the model is given reaches the new
    layers. What was swapped is written to `model.config.swapped_ffn`, by which `trialist.models.load_model` loads the saved
    model; a plain `from_pretrained` would fill the layers with new dense weights. Wrap with PEFT after the swap.

    Works for decoders whose layers have a dense feed-forward module (Llama, Qwen, Gemma, Mistral, SmolLM, Phi, GPT-2, GPT-NeoX
    and their relatives). Raises ValueError, and changes nothing, for others (mixtures of experts, encoder-decoders), for
    layers that do not exist and for settings that cannot work.
    """
    if to not in SWAPS:
        raise ValueError(f"a feed-forward can be swapped to {', '.join(SWAPS)}, not {to!r}")
    if plain_model(model) is not model:
        raise ValueError("swap before wrapping: swap_ffn takes the transformers model, not a PEFT or compiled one")
    if getattr(model.config, "swapped_ffn", None) is not None:
        raise ValueError(
            f"layers {model.config.swapped_ffn['layers']} were swapped already; swap all layers in one call"
        )
    blocks = _decoder_layers(model)
    chosen = list(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer < len(blocks) for layer in chosen):
        raise ValueError(f"layers is {chosen}; give different ones of the {len(blocks)} layers, 0 to {len(blocks) - 1}")
    names = {layer: _feed_forward(model, blocks[layer], layer) for layer in chosen}
    width = _width(model)
    replaced = {layer: getattr(blocks[layer], name) for layer, name in names.items()}
    built = {}
    for layer, old in replaced.items():
        own = dict(settings)
        own.setdefault("output_std", _output_std(old, width))
        like = next(old.parameters())
        built[layer] = SwappedPEER(width, **own).to(device=like.device, dtype=like.dtype).train(old.training)
    for layer, new in built.items():
        setattr(blocks[layer], names[layer], new)
    _hand_over_padding(model, blocks)
    kept = {
        name: value for name, value in built[chosen[0]].settings.items() if name in settings or name == "num_experts"
    }
    model.config.swapped_ffn = {"to": to, "layers": chosen, "settings": kept}
    return model


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
        del config.swapped_ffn
        swap_ffn(self, swapped["layers"], swapped["to"], **{"output_std": 1.0, **swapped["settings"]})

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).hidden_size


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one list of as many blocks as the configuration names, each with an attention."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; swap_ffn takes decoders")
    count = config.get_text_config(decoder=True).num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(calls_attention_interface(part) for part in block.modules()) for block in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} lists of {count} layers with attention, where one is wanted, so its feed-forwards "
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


def _hand_over_padding(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """The mask travels as an argument as far as the attention, which runs before the feed-forward of its block, and also
    when gradient checkpointing recomputes the block, whatever passed through the model in between."""
    model.base_model.register_forward_pre_hook(_send_padding_mask, with_kwargs=True)
    for block in blocks:
        receive = functools.partial(_receive_padding_mask, block)
        for part in block.modules():
            if calls_attention_interface(part):
                part.register_forward_pre_hook(receive, with_kwargs=True)


def _send_padding_mask(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tokens is None or tokens.shape[1] == 1:
        return args, kwargs  # a single token is decoded, and is never padding
    return args, {**kwargs, MASK: mask[:, -tokens.shape[1] :].bool()}


def _receive_padding_mask(block: nn.Module, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    mask = kwargs.pop(MASK, None)
    for part in block.children():
        if isinstance(part, SwappedPEER):
            part.handed_over = mask
    return args, kwargs
