"""From a pretrained stack of layers to recurrent depth: its first layers before the loop, some inside, its last ones after."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trialist.models.configuration import SETTINGS, ModularDecoderConfig
from trialist.models.decoder import ModularDecoderForCausalLM
from trialist.models.recurrent_depth.loop import Core
from trialist.models.recurrent_depth.steps import depth_of

OURS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "mixer",
    "mlp": "ffn",
}
"""Parts of a Llama layer and their names in a block of the modular decoder"""
FAMILIES = ("llama", "mistral", "qwen2")
HELD = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
HELD |= {"input_layernorm", "post_attention_layernorm"}


def to_recurrent(
    model: PreTrainedModel,
    prelude: int = 2,
    core: int = 4,
    coda: int = 2,
    *,
    core_start: int | None = None,
    **recurrent: Any,
) -> ModularDecoderForCausalLM:
    """A decoder of recurrent depth with the weights of a Llama, Mistral or Qwen2, or of our own plain stack.

    The first `prelude` and the last `coda` layers stay where they are, `core` layers from `core_start` on (None: in the middle
    between them) are run as a loop, and the others are left out. The adapter starts as [0 | I] on (s | e) and no norm stands
    between loop and coda, so one step computes exactly what the chosen layers compute one after the other. It ignores the state
    at first: train on, with the mean number of steps rising (`set_mean_recurrence`).

    recurrent: further settings (`mean_recurrence`, `backprop_depth`, ...). The new model is on the device and in the dtype of
    the old one and shares no tensor with it. Raises ValueError, in words, for a model that the decoder cannot hold.
    """
    source = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse(source)
    config, total = source.config, source.config.num_hidden_layers
    for name, count in (("prelude", prelude), ("core", core), ("coda", coda)):
        if isinstance(count, bool) or not isinstance(count, int) or count < (name == "core"):
            raise ValueError(f"{name} is {count!r}; it must be a whole number of at least {int(name == 'core')}")
    start = prelude + (total - prelude - core - coda) // 2 if core_start is None else core_start
    if prelude + core + coda > total or not prelude <= start <= total - coda - core:
        raise ValueError(
            f"prelude={prelude}, core={core} from layer {start} and coda={coda} do not fit into the {total} layers of "
            f"{type(source).__name__} in this order without sharing one; lower a number or give another core_start"
        )
    chosen = [*range(prelude), *range(start, start + core), *range(total - coda, total)]
    weights = source.state_dict()
    ours = isinstance(source, ModularDecoderForCausalLM)
    target = ModularDecoderForCausalLM(
        ModularDecoderConfig(
            **_fields(config, weights, ours),
            num_hidden_layers=len(chosen),
            layer_types=[config.layer_types[index] for index in chosen] if ours else None,
            ffn_types=[config.ffn_types[index] for index in chosen] if ours else None,
            depth="recurrent",
            recurrent={
                "core_norm": False,
                **recurrent,
                "prelude_layers": prelude,
                "core_layers": core,
                "coda_layers": coda,
            },
        )
    )
    depth = depth_of(target)
    with torch.no_grad():
        for block, index in zip([*depth.prelude, *depth.core.blocks, *depth.coda], chosen, strict=True):
            _fill(block, _of_layer(weights, index, ours))
        target.model.embed_tokens.weight.copy_(weights["model.embed_tokens.weight"])
        target.model.norm.weight.copy_(weights["model.norm.weight"])
        if not config.tie_word_embeddings:
            target.lm_head.weight.copy_(weights["lm_head.weight"])
        start_from_identity(depth.core)
    target.generation_config = copy.deepcopy(source.generation_config)
    return target.to(device=source.device, dtype=source.dtype).train(source.training)


def start_from_identity(core: Core) -> None:
    """Sets the adapter to [0 | I] on (s | e), in place: a step then takes e as it is and ignores the state."""
    if core.adapter is None:
        raise ValueError("injection='add' has no adapter to start from; take injection='concat'")
    width = core.adapter.out_features
    with torch.no_grad():
        core.adapter.weight[:, :width].zero_()
        core.adapter.weight[:, width:].copy_(torch.eye(width))


def _fields(config: Any, weights: dict[str, torch.Tensor], ours: bool) -> dict[str, Any]:
    """The fields that both configurations have."""
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rope_parameters", "rms_norm_eps", "attention_dropout", "tie_word_embeddings",
        "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    ]  # fmt: skip
    if ours:
        names += ["norm_style", "attention_bias", "embedding_initializer_range", *(set(SETTINGS) - {"recurrent"})]
    fields = {name: getattr(config, name) for name in names}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not ours:
        fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in weights
    return fields


def _of_layer(weights: dict[str, torch.Tensor], index: int, ours: bool) -> dict[str, torch.Tensor]:
    """The weights of one layer under the names that a block has."""
    start = f"model.layers.{index}."
    found = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
    if ours:
        return found
    return {".".join([OURS[name.split(".")[0]], *name.split(".")[1:]]): tensor for name, tensor in found.items()}


def _fill(block: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies the weights in; biases that the source has not are 0, which is the same."""
    for name, parameter in block.state_dict().items():
        if name in weights:
            parameter.copy_(weights[name])
        else:
            assert name.endswith(".bias"), name
            parameter.zero_()


def _refuse(model: PreTrainedModel) -> None:
    """Words for every model whose computation the decoder cannot repeat."""
    name, config = type(model).__name__, model.config
    advice = f"to_recurrent takes causal Llama, Mistral and Qwen2 models and our own stack, not {name}"
    if getattr(config, "swapped_ffn", None) is not None:
        raise ValueError(
            f"layers {config.swapped_ffn['layers']} of {name} were swapped; call to_recurrent first, and swap_ffn on what it "
            "returns"
        )
    if isinstance(model, ModularDecoderForCausalLM):
        if config.depth != "stack":
            raise ValueError(f"{name} has depth={config.depth!r} already; to_recurrent starts from depth='stack'")
        return
    if config.model_type not in FAMILIES or not name.endswith("ForCausalLM"):
        raise ValueError(advice)
    parts = {
        parameter.removeprefix("model.layers.0.").rpartition(".")
        for parameter in model.state_dict()
        if parameter.startswith("model.layers.0.")
    }
    unknown = sorted(part for part, _, kind in parts if part not in HELD or (kind == "bias" and part.startswith("mlp")))
    if unknown:
        raise ValueError(f"{advice}: a block of the decoder has no place for {', '.join(unknown)}")
    if config.hidden_act != "silu":
        raise ValueError(f"{advice}: its feed-forward uses {config.hidden_act!r}, ours silu")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (config.model_type == "mistral" and config.sliding_window is not None):
        raise ValueError(f"{advice}: it attends within a sliding window, the decoder to the whole text")
