"""A cache layer from which tokens are evicted for good: their keys and values are dropped and the memory is free.

Length and mask sizes stay those of the whole text, so models go on counting positions and building masks as without
eviction; `columns` says which token each stored entry is, and the attention takes the mask's columns by it.

B batch, G key/value heads, R rows of entries a batch row keeps (1: all heads keep the same; or G), S stored entries,
T new tokens, D head width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from trialist.kernels.eviction import keep_index

UNDO_WINDOW = 64
"""Latest tokens that `crop` can always take back, as long as nothing was evicted in between"""

Scores = tuple[Tensor, ...]
"""What a policy notes of the stored entries, each `(B, S)` or `(B, R, S)`, 0 for new ones"""

State = tuple[Scores, Tensor | None]
"""Scores, and the indices of the entries that stay (None: all)"""


class Recording(Protocol):
    """The queries of a call, kept so that its beginning can be played again."""

    def replay(self, layer: EvictingCacheLayer, queries: int) -> State:
        """What the first `queries` of the call lead to; the keys are taken from `layer`."""


@dataclass(frozen=True)
class Undo:
    """What one call of the attention did, kept so that `crop` can take it back."""

    before: Scores
    """Scores before the call"""
    length: int
    """New tokens of the call"""
    recording: Recording | None = None
    """None: the call can be taken back as a whole only"""


class EvictingCacheLayer(DynamicLayer):
    """Keys and values `(B, G, S, D)`, the `scores` of their tokens, and `columns` `(B, R, S)`.

    `evict` names the entries that stay. The others are dropped when the next tokens come, so that `crop` can take back
    the latest call exactly, or its last `UNDO_WINDOW` tokens (assisted decoding needs that). `crop` beyond an eviction that
    happened raises RuntimeError. A copy is independent of its original.
    """

    is_croppable = True
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cumulative_length = 0
        self.scores: Scores = ()
        self.scored_by: type | None = None
        """The policy that scores the stored tokens; another one would not know them"""
        self.columns: Tensor | None = None  # int32; None: entry j is token j
        self.kept: Tensor | None = None  # int32 (B, R, m), ascending: entries that stay when the next tokens come
        self.calls: list[Undo] = []
        self.expected = False

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def expect(self) -> None:
        """Told by an attention that minds what was evicted, before it brings its new tokens."""
        self.expected = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        expected, self.expected = self.expected, False
        if not expected and (self.columns is not None or self.kept is not None):
            raise ValueError(
                "tokens were evicted from the given cache and its model does not evict any more, so it would attend to the "
                "wrong ones; start from an empty cache, or enable eviction again"
            )
        self._drop()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        T, first = key_states.shape[-2], self.cumulative_length
        self.cumulative_length += T
        if self.columns is not None:
            new = torch.arange(first, first + T, dtype=torch.int32, device=keys.device)
            self.columns = torch.cat([self.columns, new.expand(*self.columns.shape[:2], T)], -1)
        self.scores = tuple(torch.nn.functional.pad(score, (0, T)) for score in self.scores)
        return keys, values

    def store(self, scores: Scores, call: Undo) -> None:
        """Keep the scores after a call."""
        self.calls.append(call)
        while len(self.calls) > 1 and sum(call.length for call in self.calls[1:-1]) >= UNDO_WINDOW:
            del self.calls[0]
        self.scores = scores

    def evict(self, kept: Tensor, at_once: bool = False) -> None:
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
            self.columns = every.expand(B, 1, S)
        self.columns = pick(self.columns, kept)
        self.scores = tuple(pick(score, kept) for score in self.scores)
        start = torch.arange(B * G, device=kept.device).view(B, G, 1) * S
        # whole rows of D numbers are copied, which gather over three dimensions does not
        rows = (start + kept).view(-1)
        self.keys, self.values = (
            x.reshape(B * G * S, -1).index_select(0, rows).view(B, G, kept.shape[-1], -1)
            for x in (self.keys, self.values)
        )

    def gather_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """The columns of a mask `(B | 1, H | 1, T, length)` that are stored, `(B, R | H, T, S)`; None stays None."""
        return attention_mask if self.columns is None else pick_columns(attention_mask, self.columns.long())

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
        self.scores = tuple(score[..., :S] for score in scores)
        self.columns = None if self.columns is None else self.columns[..., :S]
        self.cumulative_length += tokens_to_remove

    def _undo(self, tokens: int) -> State:
        reach, index = 0, len(self.calls)
        while reach < tokens:
            index -= 1
            if index < 0 or (reach + self.calls[index].length > tokens and self.calls[index].recording is None):
                raise RuntimeError(
                    f"this cache can take back its last {reach} tokens, {tokens} were asked for: what was evicted or selected "
                    "before is gone. Crop more often, or start from a fresh cache; an assistant of assisted decoding must have "
                    "no budgets"
                )
            reach += self.calls[index].length
        call = self.calls[index]
        del self.calls[index:]
        if reach == tokens:
            return call.before, None
        call = replace(call, length=reach - tokens)
        self.calls.append(call)
        assert call.recording is not None
        return call.recording.replay(self, call.length)

    def reset(self) -> None:
        self.keys = self.values = self.columns = self.kept = self.scored_by = None
        self.scores = ()
        self.is_initialized = False
        self.cumulative_length = 0
        self.calls.clear()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.scores = tuple(map(function, self.scores))
        for name in ("columns", "kept"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def _move(self, device: Any) -> None:
        self._map(lambda x: x.to(device, non_blocking=True))
        self.calls = [_moved(call, device) for call in self.calls]

    def offload(self) -> None:
        super().offload()
        self._move("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._move(self.device)

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


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return replace(value, **{name: _moved(part, device) for name, part in fields.items()})  # type: ignore[type-var]
    return value


def pick(entries: Tensor, index: Tensor) -> Tensor:
    """What entries `(B, S)` or `(B, 1 | R, S)` hold at `index` `(B, R, m)`: `(B, m)` or `(B, R, m)`."""
    if entries.dim() == 2:
        return entries.gather(-1, index[:, 0])
    return entries.expand(-1, index.shape[1], -1).gather(-1, index)


def pick_columns(attention_mask: Tensor | None, index: Tensor) -> Tensor | None:
    """The columns of a mask `(B | 1, H | 1, T, n)` at `index` `(B, R, m)`, `(B, R | H, T, m)`; None stays None."""
    if attention_mask is None:
        return None
    B, R, m = index.shape
    H, T = attention_mask.shape[1:3]
    heads = max(R, H)
    if 1 < R < heads:
        index = index.repeat_interleave(heads // R, 1)
    return attention_mask.expand(B, heads, -1, -1).gather(-1, index[:, :, None].expand(B, heads, T, m))


def kept_entries(alive: Tensor, visible: Tensor | None, budget: int) -> Tensor:
    """Ascending indices `(..., min(budget, S))` of the entries that stay: those alive, and padding where there are fewer.

    alive: bool `(..., S)`. visible: bool, what the last query may see, which padding is not; None is everything. What is
    visible and not alive was evicted.
    """
    priority = (~alive).to(torch.int8) * 2
    if visible is not None:
        priority = priority.masked_fill(~visible, 1)
    return keep_index(priority, min(budget, alive.shape[-1]))


def refuse_static(budget: int | None, length: int) -> None:
    """Raises ValueError for a budget that a static cache of `length` columns could exceed."""
    if budget is not None and budget < length:
        raise ValueError(
            f"a static cache holds all {length} columns from the start, so a budget of {budget} tokens would free nothing; "
            "use a dynamic cache (leave cache_implementation out), or remove the budgets"
        )


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
    if len(cache.layers) <= layer_idx:
        raise ValueError(
            f"{what} needs a cache layer of its own for layer {layer_idx}, and a {type(cache).__name__} has none: tokens that "
            "exit early, by exit_criterion, cannot be evicted or selected"
        )
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
    if layer.is_initialized and int(layer.get_seq_length()) > 0:
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


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory behind all tensors of a cache: keys, values, states of recurrent layers, what its layers keep to score
    and place tokens, and what they keep to take the latest tokens back.

    Whole storages count, each once, so a view into a large tensor costs what the large tensor costs.
    """
    return sum(_storages(cache, {}).values())


def layer_bytes(layer: CacheLayerMixin) -> int:
    """The same for one layer of a cache."""
    return sum(_storages(layer, {}).values())


def _storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, list | tuple):
        for part in value:
            _storages(part, found)
    elif isinstance(value, dict):
        _storages(list(value.values()), found)
    elif isinstance(value, Cache | CacheLayerMixin) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        _storages(list(vars(value).values()), found)
    return found
