"""Attention that decodes fast with grouped keys on a CPU, as the implementation `trialist_packed` of transformers.

When one token is decoded, or a few are verified, all query heads of a key/value head are rows of one problem over its keys as
they lie in the cache; nothing is repeated for them, and no kernel is asked for grouped queries that computes them the slow way.
Everything else is computed as `sdpa` does it: prompts, training with dropout, other devices. Masks mean what they mean there, so
padding, static caches and sliding windows need no care.

B batch, H query heads, G key/value heads, T queries, S columns, D head width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trialist.models.attention_interface import PACKED, UNSUPPORTED_ARGUMENTS, calls_attention_interface, plain_model

SHORT = 16
"""Most queries of a call that are packed; from there on repeating the keys costs less than the wider products"""


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """softmax(q k^T scaling + mask) v `(B, T, H, D)`, the softmax in float32 at least.

    query `(B, H, T, D)`, key and value `(B, G, S, D)` with H a multiple of G; attention_mask bool or additive
    `(B | 1, 1 | H, T, S)`; None lets every query see every column.
    """
    groups, T = key.shape[1], query.shape[2]
    rows, mask = pack(query, groups), pack_mask(attention_mask, query.shape[1], groups)
    if not by_products(rows):
        fused = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        return unpack(fused, T)
    weights = packed_softmax(rows @ key.transpose(-1, -2), mask, scaling)  # (B, G, H / G * T, S)
    return unpack(weights.to(value.dtype) @ value, T)


def by_products(rows: Tensor) -> bool:
    """Whether two matrix products are faster for packed rows `(B, G, n, D)` than the fused kernel.

    They are where that kernel has a single row to work on, and in bfloat16 where the processor multiplies it. In float16 they
    never are.
    """
    if rows.dtype == torch.float16:
        return False
    return rows.shape[2] == 1 or (rows.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())


def pack(query: Tensor, groups: int) -> Tensor:
    """Queries `(B, H, T, D)` as rows of their key/value head, `(B, G, H / G * T, D)`."""
    B, H, T, D = query.shape
    return query.reshape(B, groups, H // groups * T, D)


def pack_mask(attention_mask: Tensor | None, heads: int, groups: int) -> Tensor | None:
    """A mask `(B | 1, 1 | H, T, S)` for packed rows, `(B | 1, 1 | G, 1 | H / G * T, S)`."""
    if attention_mask is None:
        return None
    B, rows, T, S = attention_mask.shape
    each = heads // groups
    if rows == heads:
        return attention_mask.reshape(B, groups, each * T, S)
    if rows == groups and groups > 1:
        return attention_mask[:, :, None].expand(B, groups, each, T, S).reshape(B, groups, each * T, S)
    if T == 1 or each == 1:
        return attention_mask
    return attention_mask[:, :, None].expand(B, 1, each, T, S).reshape(B, 1, each * T, S)


def packed_softmax(logits: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax over the columns, in float32 or in float64; bfloat16 would lose small weights of long contexts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scaling
    if mask is not None and mask.dtype == torch.bool:
        wide = wide.masked_fill(~mask, torch.finfo(wide.dtype).min)
    elif mask is not None:
        wide = wide + mask
    return wide.softmax(-1)


def unpack(output: Tensor, queries: int) -> Tensor:
    """Packed rows `(B, G, H / G * T, D)` as an attention function returns them, `(B, T, H, D)`."""
    B, _, _, D = output.shape
    return output.reshape(B, -1, queries, D).transpose(1, 2).contiguous()


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    for argument in ("softcap", "s_aux"):
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"packed attention does not support {UNSUPPORTED_ARGUMENTS[argument]}, which {type(module).__name__} uses; "
                "call set_attn_implementation('eager')"
            )
    if not _packs(query, key, attention_mask, dropout) or kwargs.get("position_bias") is not None:
        standard = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return standard(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, attention_mask, scale), None


def _packs(query: Tensor, key: Tensor, attention_mask: Tensor | None, dropout: float) -> bool:
    """Longer calls without a mask are causal."""
    T, each = query.shape[2], query.shape[1] // key.shape[1]
    short = T == 1 or (each > 1 and T <= SHORT and attention_mask is not None)
    return short and dropout == 0.0 and query.device.type == "cpu"


AttentionInterface.register(PACKED, _forward)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def enable_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model that runs `sdpa` attention run `trialist_packed`, in place; returns the model.

    The same as `model.set_attn_implementation("trialist_packed")`, with a look at the model before. `generate` and all
    other uses of the model go on as they were. Nothing is written to the configuration.

    Raises ValueError for models whose attention is computed elsewhere, is soft-capped (Gemma 2) or has sinks.
    """
    plain = plain_model(model)
    name, base = type(plain).__name__, plain.config._attn_implementation
    if base == PACKED:
        return model
    if not any(calls_attention_interface(module) for module in plain.modules()):
        raise ValueError(f"{name} has no layer that uses the attention interface of transformers: nothing to pack")
    text = plain.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name} soft-caps its attention logits, which packed attention does not support")
    if any(getattr(module, "sinks", None) is not None for module in plain.modules()):
        raise ValueError(f"{name} has attention sinks, which packed attention does not support")
    if base != "sdpa":
        raise ValueError(f"the model runs attn_implementation={base!r}; packed attention stands in for 'sdpa' only")
    plain.set_attn_implementation(PACKED)
    return model


def disable_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable_packed_attention`, in place; a model that does not run it is left alone. Returns the model."""
    plain = plain_model(model)
    if plain.config._attn_implementation == PACKED:
        plain.set_attn_implementation("sdpa")
    return model
