"""A cache layer from which tokens are evicted for good: their keys and values are dropped and the memory is free.

Length and mask sizes stay those of the whole text, so models go on counting positions and building masks as without
eviction; `columns` says which token each stored entry is, and the attention takes the mask's columns by it.

B batch, G key/value heads, R rows of entries a batch row keeps (1: all heads keep the same; or G), S stored entries,
T new tokens, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from trialist.kernels.eviction import keep_index

UNDO_WINDOW = 64
"""Tokens before the latest call that can still be taken back by `crop`, as long as nothing was evicted in between"""

State = tuple[Tensor | None, Tensor | None]
"""Scores over the stored entries, and the indices of those that stay (None: all)"""


@dataclass
class Call:
    """What one call of the attention did, kept so that `crop` can take back all or the end of it."""

    before: Tensor | None
    """Scores before the call"""
    length: int
    """New tokens of the call"""
    replay: Callable[[int], State]
    """What the first n queries of the call lead to"""


class EvictingCacheLayer(DynamicLayer):
    """Keys and values `(B, G, S, D)`, what the tokens are scored by, `(B, S)` or `(B, R, S)`, and `columns` `(B, R, S)`.

    `evict` names the entries that stay. The others are dropped when the next tokens come, so that `crop` can take back
    the latest call exactly (assisted decoding needs that), or at once where the call had more than `UNDO_WINDOW` tokens.
    `crop` beyond an eviction that happened raises RuntimeError.
    """

    is_croppable = True
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cumulative_length = 0
        self.scores: Tensor | None = None
        self.columns: Tensor | None = None  # int32; None: entry j is token j
        self.kept: Tensor | None = None  # int32 (B, R, m), ascending: entries that stay when the next tokens come
        self.calls: list[Call] = []

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._drop()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        T, first = key_states.shape[-2], self.cumulative_length
        self.cumulative_length += T
        if self.columns is not None:
            new = torch.arange(first, first + T, dtype=torch.int32, device=keys.device)
            self.columns = torch.cat([self.columns, new.expand(*self.columns.shape[:2], T)], -1)
        if self.scores is not None:
            self.scores = torch.nn.functional.pad(self.scores, (0, T))
        return keys, values

    def store(self, scores: Tensor | None, replay: Callable[[int], State], length: int) -> None:
        """Keep the scores after a call with `length` queries; `replay(n)` is the state after its first n queries."""
        self.calls.append(Call(self.scores, length, replay))
        while len(self.calls) > 1 and sum(call.length for call in self.calls[1:-1]) >= UNDO_WINDOW:
            del self.calls[0]
        self.scores = scores

    def evict(self, kept: Tensor, at_once: bool) -> None:
        """Give up every entry that is not in `kept` `(B, R, m)`, ascending indices into the stored entries."""
        self.kept = kept.to(torch.int32)
        if at_once:
            self._drop()

    def _drop(self) -> None:
        if self.kept is None:
            return
        kept, self.kept = self.kept.long(), None
        self.calls.clear()
        assert self.keys is not None
        assert self.values is not None
        B, G, S, _ = self.keys.shape
        if self.columns is None:
            every = torch.arange(S, dtype=torch.int32, device=kept.device)
            self.columns = every.expand(B, kept.shape[1], S)
        self.columns = self.columns.gather(-1, kept)
        if self.scores is not None:
            self.scores = self.scores.gather(-1, kept if self.scores.dim() == 3 else kept[:, 0])
        start = torch.arange(B * G, device=kept.device).view(B, G, 1) * S
        rows = (start + kept).view(
            -1
        )  # whole rows of D numbers are copied, which gather over three dimensions does not
        self.keys, self.values = (
            x.reshape(B * G * S, -1).index_select(0, rows).view(B, G, kept.shape[-1], -1)
            for x in (self.keys, self.values)
        )

    def gather_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """The columns of a mask `(B | 1, H | 1, T, length)` that are stored, `(B, R | H, T, S)`; None stays None."""
        if attention_mask is None or self.columns is None:
            return attention_mask
        B, R, S = self.columns.shape
        H, T = attention_mask.shape[1:3]
        index = self.columns.long()
        if R > 1 and H > 1:
            index = index.repeat_interleave(H // R, 1)
        heads = max(R, H)
        return attention_mask.expand(B, heads, -1, -1).gather(-1, index[:, :, None].expand(B, heads, T, S))

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove, length = int(tokens_to_remove), self.get_seq_length()  # some versions hand over a tensor
        if tokens_to_remove > 0:  # the meaning in earlier versions of transformers: how many tokens to keep
            tokens_to_remove = min(0, tokens_to_remove - length)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if length + tokens_to_remove <= 0:
            self.reset()
            return
        scores, kept = self._undo(-tokens_to_remove)
        self.kept = None if kept is None else kept.to(torch.int32)
        super().crop(tokens_to_remove)
        assert self.keys is not None
        S = self.keys.shape[-2]
        self.scores = None if scores is None else scores[..., :S]
        self.columns = None if self.columns is None else self.columns[..., :S]
        self.cumulative_length += tokens_to_remove

    def _undo(self, tokens: int) -> State:
        reach = sum(call.length for call in self.calls)
        if tokens > reach:
            raise RuntimeError(
                f"this cache can take back its last {reach} tokens, {tokens} were asked for: what was evicted or selected "
                "before is gone. Crop more often, or start from a fresh cache; an assistant of assisted decoding must have "
                "no budgets"
            )
        call = self.calls[-1]
        while tokens > 0:
            call = self.calls.pop()
            if call.length > tokens:
                length = call.length - tokens
                self.calls.append(replace(call, length=length))
                return call.replay(length)
            tokens -= call.length
        return call.before, None

    def reset(self) -> None:
        self.keys = self.values = self.scores = self.columns = self.kept = None
        self.is_initialized = False
        self.cumulative_length = 0
        self.calls.clear()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in ("scores", "columns", "kept"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def offload(self) -> None:
        super().offload()
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.calls.clear()
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.calls.clear()
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.calls.clear()
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])


def kept_entries(alive: Tensor, visible: Tensor | None, budget: int) -> Tensor:
    """Ascending indices `(..., min(budget, S))` of the entries that stay: those alive, and padding where there are fewer.

    alive: bool `(..., S)`. visible: bool, what the last query may see, which padding is not; None is everything. What is
    visible and not alive was evicted.
    """
    priority = (~alive).to(torch.int8) * 2
    if visible is not None:
        priority = priority.masked_fill(~visible, 1)
    return keep_index(priority, min(budget, alive.shape[-1]))


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory behind the tensors of a cache: keys, values, and what its layers keep to score and place tokens.

    Whole storages count, each once, so a view into a large tensor costs what the large tensor costs.
    """
    storages = {}
    for layer in cache.layers:
        for name in ("keys", "values", "scores", "penalty", "columns", "kept"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
