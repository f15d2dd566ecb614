"""Cache layers of selective attention: keys, values and the penalty F that the next query meets.

The penalty is all that the past leaves behind besides keys and values, so decoding with it equals the full forward
pass; under a budget it also decides which tokens leave the cache. B batch, G key/value heads, S stored columns, T new
tokens, D head width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    StaticLayer,
)

from trialist.models.eviction.cache import UNDO_WINDOW, EvictingCacheLayer

__all__ = ["UNDO_WINDOW", "SelectiveCacheLayer", "StaticSelectiveCacheLayer", "selective_layer", "take_over"]


class SelectiveCacheLayer(EvictingCacheLayer):
    """Keys and values `(B, G, S, D)` with the penalty `(B, S)` in float32 (float64 for float64 states).

    `crop(-n)` is exact: the selections of the removed queries are taken out of F again. It reaches back over the latest
    call and at least `UNDO_WINDOW` tokens before it; once tokens were evicted, over the latest call, which is what
    assisted decoding needs. Further it raises RuntimeError.
    """

    _layer_type = "selective_attention"

    @property
    def penalty(self) -> Tensor | None:
        return self.scores


class StaticSelectiveCacheLayer(StaticLayer):
    """Preallocated keys, values and penalty of `max_cache_len` columns; columns not filled yet have penalty 0."""

    penalty: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._allocate_penalty()

    def _allocate_penalty(self) -> None:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.penalty = torch.zeros(self.batch_size, self.max_cache_len, dtype=dtype, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.penalty)

    def reset(self) -> None:
        super().reset()
        if self.penalty is not None:
            self.penalty.zero_()

    def _move_penalty(self, device: Any) -> None:
        if self.penalty is not None:
            self.penalty = self.penalty.to(device, non_blocking=True)

    def offload(self) -> None:
        super().offload()
        self._move_penalty("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._move_penalty(self.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.penalty is not None:
            self.penalty = self.penalty.index_select(0, beam_idx.to(self.penalty.device))


# Set by hand, because `_layer_type` is inherited and may name one class only in the mapping of dynamic layers.
STATIC_LAYER_TYPE_MAPPING["selective_attention"] = StaticSelectiveCacheLayer


def selective_layer(cache: Cache, layer_idx: int) -> SelectiveCacheLayer | StaticSelectiveCacheLayer:
    """The layer of `cache` that holds F for `layer_idx`, put in the place of a standard layer that is still empty.

    Raises ValueError where the standard layer holds tokens already (their selections are unknown) or is of a kind
    without a selective counterpart.
    """
    layer = take_over(cache, layer_idx, SelectiveCacheLayer, StaticSelectiveCacheLayer, "selective attention")
    assert isinstance(layer, SelectiveCacheLayer | StaticSelectiveCacheLayer)
    return layer


def take_over(
    cache: Cache,
    layer_idx: int,
    dynamic: type[EvictingCacheLayer],
    static: type[StaticLayer] | None,
    what: str,
) -> CacheLayerMixin:
    """The layer of `cache` for `layer_idx`, of class `dynamic` or `static`, in the place of an empty standard layer.

    Raises ValueError for layers of other kinds and for a standard layer that holds tokens already.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if type(layer) is dynamic or (static is not None and type(layer) is static):
        return layer
    if type(layer) not in (DynamicLayer, StaticLayer) or (type(layer) is StaticLayer and static is None):
        kinds, advice = "a dynamic cache", "Use DynamicCache()"
        if static is not None:
            kinds, advice = "a dynamic or static cache", f"{advice} or cache_implementation='static'"
        raise ValueError(
            f"{what} keeps what it knows of each token in {kinds}; layer {layer_idx} of the given cache is a "
            f"{type(layer).__name__}. {advice}, without a quantised or sliding cache"
        )
    if _filled(layer):
        raise ValueError(
            f"layer {layer_idx} of the given cache was filled by standard attention, so what its tokens selected or drew "
            "is unknown; start from an empty cache"
        )
    new: Any
    if isinstance(layer, StaticLayer):
        assert static is not None
        new = static(max_cache_len=layer.max_cache_len)
        if layer.is_initialized:
            new.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    else:
        new = dynamic()
    cache.layers[layer_idx] = new
    return new


def _filled(layer: CacheLayerMixin) -> bool:
    return layer.is_initialized and int(layer.get_seq_length()) > 0
