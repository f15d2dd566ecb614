"""Cache layers of selective attention: keys, values and the penalty F that the next query meets.

The penalty is all that the past leaves behind besides keys and values, so decoding with it equals the full forward
pass. B batch, G key/value heads, S cached columns, T new tokens, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

UNDO_WINDOW = 64
"""Tokens before the latest call whose selections can still be taken back by `crop`"""


@dataclass
class Call:
    """What one call of the attention contributed to F, kept so that `crop` can contribute only a part of it again."""

    penalty: Tensor | None
    """F before the call, (B, S before)"""
    length: int
    """New tokens of the call"""
    reselect: Callable[[int], Tensor]
    """F after the first n queries of the call, (B, S before + n)"""


class _Penalty:
    """What the dynamic and the static layer share: F moves with the batch."""

    penalty: Tensor | None = None
    is_initialized: bool

    def _map_penalty(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.penalty is not None:
            self.penalty = function(self.penalty)

    def offload(self) -> None:
        super().offload()  # type: ignore[misc]
        self._map_penalty(lambda penalty: penalty.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()  # type: ignore[misc]
        if self.is_initialized:
            self._map_penalty(lambda penalty: penalty.to(self.device, non_blocking=True))  # type: ignore[attr-defined]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map_penalty(lambda penalty: penalty.index_select(0, beam_idx.to(penalty.device)))


class SelectiveCacheLayer(_Penalty, DynamicLayer):
    """Growing keys and values `(B, G, S, D)` with the penalty `(B, S)` in float32 (float64 for float64 states).

    `crop(-n)` is exact: the selections of the removed queries are taken out of F again. It reaches back over the latest
    call and at least `UNDO_WINDOW` tokens before it, which is what assisted decoding needs; further it raises
    RuntimeError.
    """

    _layer_type = "selective_attention"
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[Call] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.penalty is not None:
            self.penalty = _pad(self.penalty, keys.shape[-2])
        return keys, values

    def store(self, penalty: Tensor, reselect: Callable[[int], Tensor], length: int) -> None:
        """Keep F after a call with `length` queries; `reselect(n)` is F after its first n queries."""
        self.calls.append(Call(self.penalty, length, reselect))
        while len(self.calls) > 1 and sum(call.length for call in self.calls[1:-1]) >= UNDO_WINDOW:
            del self.calls[0]
        self.penalty = penalty

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        if tokens_to_remove > 0:  # the meaning in earlier versions of transformers: how many tokens to keep
            tokens_to_remove = min(0, tokens_to_remove - length)
        kept = length + tokens_to_remove
        if tokens_to_remove < 0 and self.is_initialized:
            if kept <= 0:
                self.reset()
                return
            self.penalty = self._undo(-tokens_to_remove)[:, :kept]
        super().crop(tokens_to_remove)

    def _undo(self, tokens: int) -> Tensor:
        reach = sum(call.length for call in self.calls)
        if tokens > reach:
            raise RuntimeError(
                f"selective attention can take back its last {reach} tokens, {tokens} were asked for; crop more often, "
                "or start from a fresh cache"
            )
        while tokens > 0:
            call = self.calls.pop()
            if call.length > tokens:
                penalty = call.reselect(call.length - tokens)
                reselect = call.reselect
                self.calls.append(Call(call.penalty, call.length - tokens, reselect))
                return penalty
            tokens -= call.length
            before = call.penalty
        assert before is not None
        return before

    def reset(self) -> None:
        self.keys = self.values = self.penalty = None
        self.is_initialized = False
        self.calls.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.calls.clear()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.calls.clear()
        super().batch_repeat_interleave(repeats)
        self._map_penalty(lambda penalty: penalty.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.calls.clear()
        super().batch_select_indices(indices)
        self._map_penalty(lambda penalty: penalty[indices])


class StaticSelectiveCacheLayer(_Penalty, StaticLayer):
    """Preallocated keys, values and penalty of `max_cache_len` columns; columns not filled yet have penalty 0."""

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


# Set by hand, because `_layer_type` is inherited and may name one class only in the mapping of dynamic layers.
STATIC_LAYER_TYPE_MAPPING["selective_attention"] = StaticSelectiveCacheLayer


def _pad(penalty: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(penalty, (0, columns - penalty.shape[1]))


def selective_layer(cache: Cache, layer_idx: int) -> SelectiveCacheLayer | StaticSelectiveCacheLayer:
    """The layer of `cache` that holds F for `layer_idx`, put in the place of a standard layer that is still empty.

    Raises ValueError where the standard layer holds tokens already (their selections are unknown) or is of a kind
    without a selective counterpart.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, SelectiveCacheLayer | StaticSelectiveCacheLayer):
        return layer
    if type(layer) not in (DynamicLayer, StaticLayer):
        raise ValueError(
            f"selective attention keeps its penalty in a dynamic or static cache; layer {layer_idx} of the given "
            "cache is a "
            f"{type(layer).__name__}. Use DynamicCache() or cache_implementation='static', without a quantised or "
            "sliding cache"
        )
    if _filled(layer):
        raise ValueError(
            f"layer {layer_idx} of the given cache was filled by standard attention, so what its tokens selected "
            "is unknown; "
            "start from an empty cache"
        )
    selective: SelectiveCacheLayer | StaticSelectiveCacheLayer
    if isinstance(layer, StaticLayer):
        selective = StaticSelectiveCacheLayer(max_cache_len=layer.max_cache_len)
        if layer.is_initialized:
            selective.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
    else:
        selective = SelectiveCacheLayer()
    cache.layers[layer_idx] = selective
    return selective


def _filled(layer: CacheLayerMixin) -> bool:
    return layer.is_initialized and int(layer.get_seq_length()) > 0
