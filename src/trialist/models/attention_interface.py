"""The attention interface of transformers as a seam: which modules can be given another attention, how, and which cannot."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trialist.models.attention import FullAttention

PACKED = "trialist_packed"
"""Attention implementation of `trialist.models.packed_attention`"""
BASES = {"sdpa": sdpa_mask, "eager": eager_mask, PACKED: sdpa_mask}
"""Attention implementations that layers which stay standard may keep, and their masks"""

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
        if isinstance(module, FullAttention) and type(module).forward is not FullAttention.forward:
            continue  # its cache holds more than keys and values
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
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers is {list(layers)}, which names a layer twice; name each once")
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


def register_replacement(
    name: str,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    *,
    replaced: Callable[[nn.Module, CacheLayerMixin | None], bool],
    what: str,
    lost: str,
) -> None:
    """Registers the implementations `NAME_sdpa` and `NAME_eager`: `attend` in modules that are `replaced`, standard in others.

    replaced: asked with the module, and with the cache layer that a hook handed over (`hand_over_cache`), or None.
    attend: called with the module, query `(B, H, T, D)`, key and value `(B, G, S, D)`, the mask, `scaling` and `dropout`; with
        `layer`, that cache layer or None; and with `standard`, which computes what the module would have computed, for any mask.
    what, lost: the technique, and what it cannot know where it gets cached keys without the cache, in words for errors.
    """
    for base, mask in BASES.items():
        AttentionInterface.register(f"{name}_{base}", _replacement(base, attend, replaced, what, lost))
        AttentionMaskInterface.register(f"{name}_{base}", mask)


def _replacement(
    base: str,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    replaced: Callable[[nn.Module, CacheLayerMixin | None], bool],
    what: str,
    lost: str,
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        handed_over_cache: CacheLayerMixin | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        def standard(mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            function = _standard_attention(base, module)
            return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)

        if not replaced(module, handed_over_cache):
            return standard(attention_mask)
        if handed_over_cache is None and key.shape[2] > query.shape[2]:
            raise ValueError(
                f"{type(module).__name__} was given cached keys without the cache object, so {lost}; "
                "pass past_key_values=DynamicCache()"
            )
        for argument, words in UNSUPPORTED_ARGUMENTS.items():
            if kwargs.get(argument) is not None:
                raise ValueError(f"{what} does not support {words}, which {type(module).__name__} uses")
        return attend(
            module, query, key, value, attention_mask, dropout=dropout, standard=standard, layer=handed_over_cache,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        )  # fmt: skip

    return forward


def _standard_attention(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def hand_over_cache(
    modules: Sequence[nn.Module],
    name: str,
    what: str,
    layer_of: Callable[[nn.Module, Cache], CacheLayerMixin | None],
) -> None:
    """Lets each of `modules` give its attention function, which sees no cache, the cache layer that `layer_of` finds.

    name: of the registered replacement, without which a module raises ValueError. what: the technique, in words.
    """

    for module in modules:
        module.register_forward_pre_hook(functools.partial(_hand_over_cache, name, what, layer_of), with_kwargs=True)


def _hand_over_cache(
    name: str, what: str, layer_of: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    implementation = str(module.config._attn_implementation)
    if not implementation.startswith(f"{name}_"):
        raise ValueError(
            f"{what} is enabled and the model runs attn_implementation={implementation!r}, which knows nothing of it; "
            f"disable it first, or call set_attn_implementation with one of {', '.join(f'{name}_{base}' for base in BASES)}"
        )
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    return args, kwargs if cache is None else {**kwargs, "handed_over_cache": layer_of(module, cache)}


def restore_attention(model: PreTrainedModel, name: str, modules: Sequence[nn.Module]) -> None:
    """Undoes a replacement: removes the hooks of `modules`, and the implementation."""
    for module in modules:
        for handle, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "func", None) is _hand_over_cache:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    base = model.config._attn_implementation or ""
    if base.startswith(f"{name}_"):
        model.set_attn_implementation(base.removeprefix(f"{name}_"))
