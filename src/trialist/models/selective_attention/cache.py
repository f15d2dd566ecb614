"""Cache layers of selective attention: keys, values and the penalty F that the next query meets.

The penalty is all that the past leaves behind besides keys and values, so decoding with it equals the full forward
pass; under a budget it also decides which tokens leave the cache. B batch, G key/value heads, S stored columns, T new
tokens, D head width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, StaticLayer

from trialist.models.eviction.cache import EvictingCacheLayer, take_over


class SelectiveCacheLayer(EvictingCacheLayer):
    """Keys and values `(B, G, S, D)` with the penalty in float32 (float64 for float64 states).

    `crop(-n)` takes the selections of the removed queries out of F again, up to rounding. It reaches back over at least
    `UNDO_WINDOW` tokens; once tokens were evicted, over those of the latest call, which is what assisted decoding needs.
    Further it raises RuntimeError.
    """

    _layer_type = "selective_attention"

    @property
    def penalty(self) -> Tensor | None:
        """F `(B, S)`; `(B, 1 | R, S)` where another policy than the penalty evicts."""
        return self.scores[0] if self.scores else None


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
    if isinstance(layer, SelectiveCacheLayer):
        layer.expect()
    return layer
