"""Attention that reads both parts of a compact cache: pruned channels by the query's same channels, values by their codes.

The logits of the pruned tokens are `q[kept] K[kept]^T`, scaled by the whole width as ever; those of the latest tokens are
whole. One softmax runs over both. No whole copy of the pruned keys or of quantised values is made.

B batch, H query heads, G key/value heads, T queries, S stored entries, N of them pruned, D head width
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from trialist.models.attention_interface import (
    BASES,
    attention_modules,
    hand_over_cache,
    plain_model,
    register_replacement,
    restore_attention,
)
from trialist.models.compact_cache.channels import causal
from trialist.models.compact_cache.layer import CompactCacheLayer
from trialist.models.eviction.attention import for_heads
from trialist.models.packed_attention import pack, pack_mask, packed_attention, packed_softmax, unpack

NAME, WHAT = "compact", "a compact cache"
LOGITS = 2**24
"""Attention logits that are held at once, at most"""
TILE = 1024
"""Quantised tokens whose values are held whole at once"""


def attend_compact(query: Tensor, layer: CompactCacheLayer, attention_mask: Tensor | None, scaling: float) -> Tensor:
    """Output `(B, T, H, D)` of queries `(B, H, T, D)`; attention_mask over the stored entries `(B | 1, 1 | H, T, S)`."""
    (B, H, T, _), S = query.shape, layer.stored
    if attention_mask is None and T > 1:
        attention_mask = causal(T, S, query.device)
    size = max(1, LOGITS // (B * H * S))
    parts = []
    for start in range(0, T, size):
        mask = None if attention_mask is None else attention_mask[:, :, start : start + size]
        parts.append(_attend(query[:, :, start : start + size], layer, mask, scaling))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(query: Tensor, layer: CompactCacheLayer, attention_mask: Tensor | None, scaling: float) -> Tensor:
    assert layer.old_keys is not None
    assert layer.tail_keys is not None
    assert layer.tail_values is not None
    H, T = query.shape[1:3]
    groups, N = layer.tail_keys.buffer.shape[1], layer.pruned
    rows = pack(query, groups)  # (B, G, H / G * T, D)
    fewer = rows if layer.kept is None else rows.gather(-1, layer.kept[:, :, None].expand(-1, -1, rows.shape[2], -1))
    old = fewer @ layer.old_keys.view()  # (B, G, H / G * T, N)
    if layer.mean is not None:
        old = old + rows @ layer.mean.to(rows.dtype)[..., None]
    logits = torch.cat([old, rows @ layer.tail_keys.view().transpose(-1, -2)], -1)
    weights = packed_softmax(logits, pack_mask(attention_mask, H, groups), scaling).to(query.dtype)
    output = weights[..., N:] @ layer.tail_values.view() + _old_output(weights[..., :N], layer)
    return unpack(output, T)


def _old_output(weights: Tensor, layer: CompactCacheLayer) -> Tensor:
    """What the pruned tokens add, from their weights `(B, G, n, N)`, in the full width of values."""
    N = layer.pruned
    tile = N if layer.plan.values is None else TILE
    output: Tensor | None = None
    for start in range(0, N, tile):
        part = weights[..., start : start + tile] @ layer.dense_values(start, min(start + tile, N))
        output = part if output is None else output + part
    assert output is not None
    if layer.kept_values is None:
        return output
    assert layer.tail_values is not None
    index = layer.kept_values[:, :, None].expand(*output.shape)
    return output.new_zeros(*output.shape[:3], layer.tail_values.buffer.shape[-1]).scatter(-1, index, output)


def _attend_module(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    standard: Callable[[Tensor | None], tuple[Tensor, Tensor | None]],
    scaling: float,
    layer: CompactCacheLayer,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    if dropout:
        raise ValueError(f"{WHAT} is for generation; call model.eval(), which turns dropout off")
    mask = layer.gather_mask(attention_mask)
    each = for_heads(mask, query.shape[1])
    weights: Tensor | None = None
    if layer.pruned:
        output = attend_compact(query, layer, each, scaling)
    elif query.shape[2] == 1 and query.device.type == "cpu":
        output = packed_attention(query, key, value, each, scaling)
    else:
        output, weights = standard(each)
    layer.note(query, mask, scaling)
    return output, weights


def _reads(module: nn.Module, layer: CacheLayerMixin | None) -> bool:
    return isinstance(layer, CompactCacheLayer)


# what a growing cache holds has another shape at every call
register_replacement(
    NAME, torch.compiler.disable(_attend_module), replaced=_reads, what=WHAT, lost="nothing could be read from it"
)


def _layer_of(module: nn.Module, cache: Cache) -> CacheLayerMixin | None:
    """The compact layer of a module; None for other caches, which an assistant of assisted decoding may bring."""
    index = int(module.layer_idx)  # type: ignore[arg-type]
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, CompactCacheLayer):
        return None
    layer.expect()
    return layer


@contextlib.contextmanager
def compact_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within it, the attention of `model` reads the `CompactCache` that it is called with; other caches as ever. The model is
    as before afterwards. May be entered again within itself.

    Raises ValueError for models that run another attention than sdpa, eager or the packed one, as those with eviction or
    selective attention enabled do.
    """
    plain = plain_model(model)
    base = str(plain.config._attn_implementation)
    if base.startswith(f"{NAME}_"):
        yield model
        return
    if base not in BASES:
        raise ValueError(
            f"the model runs attn_implementation={base!r}, beside which {WHAT} cannot stand; disable what was enabled, or load "
            f"it with one of {', '.join(BASES)}"
        )
    modules = list(attention_modules(plain).values())
    hand_over_cache(modules, NAME, WHAT, _layer_of)
    plain.set_attn_implementation(f"{NAME}_{base}")
    try:
        yield model
    finally:
        restore_attention(plain, NAME, modules)
