"""A cache layer in two parts: the latest tokens whole, the older ones with fewer key channels and values in fewer bits.

Length and mask sizes stay those of the whole text, so models count positions and build masks as ever. Where tokens were given
up, `columns` says which token each stored entry is. The attention of `attention.py` tells the layer what was asked of it, and
the layer is cut when a call of it ends.

B batch, G key/value heads, R rows of entries a batch row has (1: all heads keep the same; or G), S stored entries, N of them
pruned, C kept channels, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from trialist.models.compact_cache import channels, values
from trialist.models.compact_cache.channels import KeyChannels
from trialist.models.compact_cache.growing import Growing
from trialist.models.compact_cache.tokens import TokenBudget
from trialist.models.compact_cache.values import QuantizedValues
from trialist.models.eviction.cache import Scores, layer_bytes, pick, pick_columns
from trialist.models.eviction.policies import Block
from trialist.models.masks import visible_columns


@dataclass
class Plan:
    """What all layers of a cache do."""

    keys: KeyChannels | None = None
    values: QuantizedValues | None = None
    eviction: TokenBudget | None = None
    awaited: int = 0
    """Tokens of a prompt that comes in several calls: nothing is cut before they are there"""

    @property
    def prunes(self) -> bool:
        return self.keys is not None or self.values is not None

    @property
    def recent(self) -> int:
        """The window of whole tokens is common to keys and values: the larger wins."""
        return max((part.recent for part in (self.keys, self.values) if part is not None), default=0)

    @property
    def every(self) -> int:
        return min((part.every for part in (self.keys, self.values, self.eviction) if part is not None), default=1)


class CompactCacheLayer(DynamicLayer):
    """Whole keys and values `tail_keys`, `tail_values` `(B, G, S - N, D)`, and pruned ones.

    `old_keys` `(B, G, C, N)` are stored by channel, as the product with a query reads them; `old_values` are values
    `(B, G, N, D)` whole, or in fewer channels, or codes with their ranges.
    """

    is_croppable = True

    def __init__(self, plan: Plan | None = None, index: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plan = plan or Plan()
        self.index = index
        self._empty()

    def _empty(self) -> None:
        self.is_initialized = False
        self.cumulative_length = 0
        self.compressed = False
        self.expected = False
        self.tail_keys: Growing | None = None
        self.tail_values: Growing | None = None
        self.old_keys: Growing | None = None
        self.old_values: tuple[Growing, ...] = ()
        self.kept: Tensor | None = None  # int64 (B, G, C)
        self.kept_values: Tensor | None = None  # int64 (B, G, C of values)
        self.mean: Tensor | None = None  # (B, G, D), 0 at kept channels
        self.counted: Tensor | None = None  # (B, 1 | G, 1), tokens behind `mean`
        self.columns: Tensor | None = None  # int32 (B, R, S); None: entry j is token j
        self.scores: Scores = ()
        self.asked: Tensor | None = None  # (B, H, n, D): queries since the last cut, as far as they are needed

    @property
    def pruned(self) -> int:
        """Entries in the pruned part, N."""
        return 0 if self.old_keys is None else self.old_keys.length

    @property
    def stored(self) -> int:
        """Entries in both parts, S."""
        return self.pruned + (0 if self.tail_keys is None else self.tail_keys.length)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def nbytes(self) -> int:
        """Bytes of memory behind all tensors of the layer, spare room and notes on tokens included."""
        return layer_bytes(self)

    def expect(self) -> None:
        """Told by an attention that reads both parts, before it brings its new tokens."""
        self.expected = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.plan.values is not None:
            self.plan.values.check(value_states.shape[-1])
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values as long as all are whole; else the new ones, and the attention reads the layer."""
        expected, self.expected = self.expected, False
        if not expected and (self.pruned or self.columns is not None):
            raise ValueError(
                "the given cache holds pruned keys or gave tokens up, and its model runs an attention that does not know of it; "
                "generate with the options that made the cache, or run the model within trialist.models.compact_attention"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        T, first = key_states.shape[-2], self.cumulative_length
        if self.tail_keys is None or self.tail_values is None:
            self.tail_keys, self.tail_values = Growing.of(key_states), Growing.of(value_states)
        else:
            self.tail_keys.append(key_states)
            self.tail_values.append(value_states)
        self.cumulative_length += T
        if self.columns is not None:
            new = torch.arange(first, first + T, dtype=torch.int32, device=key_states.device)
            self.columns = torch.cat([self.columns, new.expand(*self.columns.shape[:2], T)], -1)
        self.scores = tuple(torch.nn.functional.pad(score, (0, T)) for score in self.scores)
        if self.pruned:
            return key_states, value_states
        return self.tail_keys.view(), self.tail_values.view()

    def gather_mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """The columns of a mask `(B | 1, H | 1, T, length)` that are stored, `(B, R | H, T, S)`; None stays None."""
        return attention_mask if self.columns is None else pick_columns(attention_mask, self.columns.long())

    # what is stored

    def dense_keys(self) -> Tensor:
        """Keys `(B, G, S, D)` with 0 for the channels that are gone; a copy where there are such."""
        assert self.tail_keys is not None
        tail = self.tail_keys.view()
        if self.old_keys is None or not self.pruned:
            return tail
        old = self.old_keys.view().transpose(-1, -2)  # (B, G, N, C)
        if self.kept is not None:
            index = self.kept[:, :, None].expand(*old.shape)
            old = tail.new_zeros(*old.shape[:3], tail.shape[-1]).scatter(-1, index, old)
        return torch.cat([old, tail], 2)

    def dense_values(self, start: int, stop: int) -> Tensor:
        """Values of the pruned entries from `start` to `stop` `(B, G, n, D or kept channels)`, a copy where they are codes."""
        parts = [part.view()[:, :, start:stop] for part in self.old_values]
        if self.plan.values is None:
            return parts[0]
        return values.dequantize(parts[0], parts[1], parts[2], self.plan.values, self.dtype)

    # cutting

    def note(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Told at the end of a call: its queries `(B, H, T, D)`, and what they could see of the stored entries
        `(B | 1, 1 | R | H, T, S)`. Cuts the layer where it holds more than it should."""
        plan, T = self.plan, query.shape[2]
        assert self.tail_keys is not None
        needed = self._needed()
        if needed != 0:
            asked = query.detach()
            self.asked = asked if self.asked is None else torch.cat([self.asked, asked], 2)
            if needed is not None:
                self.asked = self.asked[:, :, -needed:]
        over = self.cumulative_length >= plan.awaited
        excess = max(
            self.tail_keys.length - plan.recent if plan.prunes else 0,
            0 if plan.eviction is None else self.stored - (plan.eviction.budget or self.stored),
        )
        first = not self.compressed and (T > 1 or plan.awaited > 1)
        if over and excess > 0 and (first or excess >= plan.every):
            self._cut(query, mask, scaling)
        elif self.asked is not None:
            if over and plan.eviction is not None and plan.eviction.chosen.scored and self.asked.shape[2] >= plan.every:
                self._score(query, mask, scaling)
            elif self.asked.untyped_storage().nbytes() > self.asked.nbytes or T > 1:
                self.asked = self.asked.clone()  # not a view into the queries of a whole prompt

    def _needed(self) -> int | None:
        """Latest queries that the next cut will look at; None is all since the last one."""
        plan = self.plan
        scoring = plan.keys is not None and self.kept is None and self.kept_values is None and not plan.keys.neutral
        least = plan.keys.obs_window if scoring and plan.keys is not None else 0
        observes = 0 if plan.eviction is None or plan.eviction.neutral else plan.eviction.observes
        return None if observes is None else max(least, observes)

    def _seen(self, query: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The queries since the last cut, and what they can see of the stored entries."""
        asked = query if self.asked is None else self.asked
        n, T, S = asked.shape[2], query.shape[2], self.stored
        if n <= T or mask is None:
            return asked, mask if mask is None or n == T else mask[:, :, T - n :]
        visible = visible_columns(mask)[:, :, -1:]  # (B, R, 1, S): what the last query sees is no padding
        return asked, visible & channels.causal(n, S, mask.device)

    def _block(self, query: Tensor, mask: Tensor | None, scaling: float) -> Block:
        asked, seen = self._seen(query, mask)
        return Block(asked, self.dense_keys(), seen, self.scores, scaling)

    def _score(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Lets the policy count the attention of the queries so far, and forgets them."""
        assert self.plan.eviction is not None
        _, self.scores, _ = self.plan.eviction.chosen.play(self._block(query, mask, scaling), self.stored)
        self.asked = None

    @torch.no_grad()
    def _cut(self, query: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Gives tokens up first, and prunes what is left of all but the latest."""
        assert self.tail_keys is not None
        plan, whole = self.plan, self.tail_keys.length
        asked, seen = self._seen(query, mask)
        real = channels.real_queries(seen, asked.shape[2])
        if plan.eviction is not None and plan.eviction.budget is not None:
            budget, policy = plan.eviction.budget, plan.eviction.chosen
            block = self._block(query, mask, scaling)
            if budget < self.stored or policy.scored:
                _, self.scores, alive = policy.play(block, min(budget, self.stored))
            if budget < self.stored:
                stays = block.kept(alive, budget)
                whole = self._evict(stays, seen)
                if seen is None and plan.keys is not None and plan.keys.value_keep < 1.0:
                    seen = channels.causal(asked.shape[2], block.key.shape[2], query.device)
                seen = pick_columns(seen, stays)
        if plan.prunes and self.tail_keys.length > min(plan.recent, whole):
            self._choose(asked, seen, real, scaling)
            self._prune(self.tail_keys.length - min(plan.recent, whole), seen)
        self.compressed, self.asked = True, None

    def _evict(self, stays: Tensor, seen: Tensor | None) -> int:
        """Keeps the entries at `stays` `(B, R, m)`; returns how many of the latest entries all rows and heads keep."""
        assert self.tail_keys is not None
        assert self.tail_values is not None
        (B, _, m) = stays.shape
        S, G = self.stored, self.tail_keys.buffer.shape[1]
        latest = (stays == torch.arange(S - m, S, device=stays.device)).flip(-1).cumprod(-1).sum(-1)
        whole = min(int(latest.min()), self.tail_keys.length)
        if self.columns is None:
            self.columns = torch.arange(S, dtype=torch.int32, device=stays.device).expand(B, 1, S)
        self.columns = pick(self.columns, stays)
        self.scores = tuple(pick(score, stays) for score in self.scores)
        if self.pruned:
            self._prune(self.tail_keys.length - whole, seen)  # all but those that every head keeps lie in one part now
            self._gather_old(stays[..., : m - whole].expand(B, G, m - whole))
            return whole
        for part in (self.tail_keys, self.tail_values):
            part.put(_rows(part.view(), stays.expand(B, G, m), 2))
        return whole

    def _gather_old(self, stays: Tensor) -> None:
        assert self.old_keys is not None
        self.old_keys.put(_rows(self.old_keys.view(), stays, 3))
        for part in self.old_values:
            part.put(_rows(part.view(), stays, 2))

    def _choose(self, asked: Tensor, seen: Tensor | None, real: Tensor | None, scaling: float) -> None:
        """The channels that stay, once and for all; `real` queries `(B, n)` are no padding."""
        settings = self.plan.keys
        if settings is None or self.pruned or self.kept is not None or self.kept_values is not None:
            return
        assert self.tail_keys is not None
        assert self.tail_values is not None
        key, value = self.tail_keys.view(), self.tail_values.view()
        if settings.keep < 1.0:
            scores = channels.key_scores(
                settings, asked, key, self.index, columns=channels.real_columns(seen, key.shape[1]), queries=real
            )
            self.kept = channels.best(scores, channels.kept_count(key.shape[-1], settings.keep, settings.round_to))
        if settings.value_keep < 1.0:
            scores = channels.value_scores(settings, asked, key, value, seen, scaling, queries=real)
            count = channels.kept_count(value.shape[-1], settings.value_keep, settings.round_to)
            self.kept_values = channels.best(scores, count)

    def _prune(self, count: int, seen: Tensor | None) -> None:
        """Moves the oldest `count` whole tokens to the pruned part."""
        if count <= 0:
            return
        assert self.tail_keys is not None
        assert self.tail_values is not None
        first = self.pruned
        key, value = self.tail_keys.take_first(count), self.tail_values.take_first(count)
        if self.plan.keys is not None and self.plan.keys.recover == "mean" and self.kept is not None:
            real = channels.real_columns(seen, key.shape[1])
            self._average(key, None if real is None else real[..., first : first + count])
        if self.kept is not None:
            key = key.gather(-1, self.kept[:, :, None].expand(*key.shape[:3], -1))
        key = key.transpose(-1, -2)  # (B, G, C, n)
        if self.kept_values is not None:
            value = value.gather(-1, self.kept_values[:, :, None].expand(*value.shape[:3], -1))
        parts = (value,) if self.plan.values is None else values.quantize(value, self.plan.values)
        if self.old_keys is None:
            self.tail_keys.put(self.tail_keys.view())  # what a prompt took is free again
            self.tail_values.put(self.tail_values.view())
            self.old_keys = Growing.of(key, 3)
            self.old_values = tuple(Growing.of(part) for part in parts)
            return
        self.old_keys.append(key)
        for part, new in zip(self.old_values, parts, strict=True):
            part.append(new)

    def _average(self, key: Tensor, real: Tensor | None) -> None:
        """Takes the dropped channels of `key` `(B, G, n, D)` into their mean; real `(B | 1, 1 | G, n)`, None is all."""
        assert self.kept is not None
        wide = key.to(torch.promote_types(key.dtype, torch.float32))
        weight = wide.new_ones(1, 1, key.shape[2]) if real is None else real.to(wide.dtype)
        dropped = wide.new_ones(*key.shape[:2], key.shape[-1]).scatter_(-1, self.kept, 0.0)
        total = (wide * weight[..., None]).sum(2) * dropped
        count = weight.sum(-1, keepdim=True).expand(key.shape[0], -1, 1)
        if self.mean is None or self.counted is None:
            self.mean, self.counted = total / count.clamp(min=1.0), count.clone()
            return
        both = self.counted + count
        self.mean = (self.mean * self.counted + total) / both.clamp(min=1.0)
        self.counted = both

    # what generation does to a cache

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove, length = int(tokens_to_remove), self.cumulative_length  # some versions hand over a tensor
        if tokens_to_remove > 0:  # the meaning in earlier versions of transformers: how many tokens to keep
            tokens_to_remove = min(0, tokens_to_remove - length)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if length + tokens_to_remove <= 0:
            self.reset()
            return
        count = -tokens_to_remove
        assert self.tail_keys is not None
        assert self.tail_values is not None
        whole = self.tail_keys.length
        if count > whole and self.columns is not None:
            raise RuntimeError(
                f"this cache can take back its last {whole} tokens, {count} were asked for: it gave tokens up before, other ones "
                "in every head. Crop less, or start from an empty cache"
            )
        self.tail_keys.length = self.tail_values.length = max(0, whole - count)
        if count > whole and self.old_keys is not None:
            for part in (self.old_keys, *self.old_values):
                part.length -= count - whole
        self.cumulative_length -= count
        self.columns = None if self.columns is None else self.columns[..., :-count]
        self.scores = tuple(score[..., :-count] for score in self.scores)
        if self.asked is not None:
            self.asked = self.asked[:, :, :-count] if count < self.asked.shape[2] else None

    def reset(self) -> None:
        self._empty()

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function` to every tensor of the layer; each begins with the batch."""
        for part in (self.tail_keys, self.tail_values, self.old_keys, *self.old_values):
            if part is not None:
                part.map(function)
        self.scores = tuple(map(function, self.scores))
        for name in ("kept", "kept_values", "mean", "counted", "columns", "asked"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))


def _rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """What `x` holds at `index` `(B, G, m)` along `dim`: 2 of `(B, G, S, n)`, or 3 of `(B, G, n, S)`."""
    if dim == 3:
        return x.gather(3, index[:, :, None].expand(-1, -1, x.shape[2], -1))
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
