"""The attention interface of transformers as a seam: which modules can be given another attention, and which cannot."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trialist.models.attention import FullAttention

BASES = ("sdpa", "eager")
"""Attention implementations that layers which stay standard may keep"""

UNSUPPORTED_ARGUMENTS = {
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that call the attention interface of transformers, by layer index.

    Raises ValueError for two of them in one layer, as in models with cross attention.
    """
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if not calls_attention_interface(module) or getattr(module, "layer_idx", None) is None:
            continue
        if module.layer_idx in modules:
            raise ValueError(
                f"{name} is a second attention in layer {module.layer_idx}; cross attention is not supported"
            )
        modules[module.layer_idx] = module
    return modules


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether `module` computes its attention through the interface of transformers, where it can be replaced."""
    if isinstance(module, FullAttention):
        return type(module).attend is FullAttention.attend
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT or compiled wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def refuse_unsupported(model: PreTrainedModel, modules: dict[int, nn.Module], layers: Sequence[int], what: str) -> None:
    """Raises ValueError for every model in which `what` would silently compute something else."""
    name, config = type(model).__name__, model.config
    if not modules:
        raise ValueError(
            f"{name} has no layer that uses the attention interface of transformers, so its attention cannot be "
            "replaced; "
            "Llama, Qwen, Mistral, SmolLM, GPT-2 and their relatives have"
        )
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(f"layers {missing} are not attention layers of {name}; those are {sorted(modules)}")
    text = config.get_text_config(decoder=True)
    for layer in layers:
        module = modules[layer]
        if not getattr(module, "is_causal", True) or not getattr(config, "is_causal", True):
            raise ValueError(f"layer {layer} of {name} is not causal; {what} needs a causal decoder")
        if getattr(text, "attn_logit_softcapping", None) is not None:
            raise ValueError(
                f"{name} soft-caps its attention logits (attn_logit_softcapping={text.attn_logit_softcapping}), "
                f"which {what} does not support"
            )
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name} has attention sinks, which {what} does not support")
        if _window(module, text) is not None:
            full = [index for index, other in modules.items() if _window(other, text) is None]
            advice = f"pass layers={full}" if full else "no layer of this model has it"
            raise ValueError(
                f"layer {layer} of {name} attends within a sliding window of {_window(module, text)} tokens, "
                f"where the first token and old ones fall out of sight anyway; {what} needs full attention: {advice}"
            )
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()):
            raise ValueError(
                f"{type(module).__name__} passes no further arguments to its attention function: not supported"
            )


def _window(module: nn.Module, text: Any) -> int | None:
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        sliding = layer_types[module.layer_idx] in ("sliding_attention", "chunked_attention")
        return (getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", 0)) if sliding else None
    return getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)


def standard_attention(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that `module` would use under the implementation `base`."""
    if base == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sys.modules[type(module).__module__].eager_attention_forward


def refuse_arguments(module: nn.Module, arguments: Mapping[str, Any], what: str) -> None:
    """Raises ValueError where a module's attention takes something that `what` does not compute."""
    for name, words in UNSUPPORTED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{what} does not support {words}, which {type(module).__name__} uses")


def cache_among(args: tuple, kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache that a module was called with."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
