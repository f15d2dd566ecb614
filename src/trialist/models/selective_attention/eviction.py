"""Context pruning by selective attention (arXiv 2410.02703): the token with the largest penalty F leaves for good.

Step by step, in every layer: query i attends to the tokens that are alive and to itself, with F before its own row; then F
gets its row; then, while more than K tokens are alive, the one with the largest F is evicted, among equals the oldest.
The first real token of a row (with `protect_bos`) and the current token stay. What an evicted token selected when it was
the query stays in F. Padding is never alive, and its memory goes first.

F depends on queries and keys alone, not on what was evicted, so a block of queries needs no loop over attention: F is
computed for the block, the evictions are played through, and one pass attends with the mask of what each query sees.

B batch, T queries, S columns, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trialist.kernels.eviction import evict, keep_index
from trialist.models.eviction.cache import EvictingCacheLayer, State, kept_entries
from trialist.models.masks import visible_columns


@dataclass(frozen=True)
class Selector:
    """What the selector head of one call knows: enough to compute F and the evictions of the call's first n queries."""

    query: Tensor
    """(B, T, D)"""
    key: Tensor | None
    """(B, S, D); None: in the cache layer"""
    attention_mask: Tensor | None
    """(B | 1, T, S), bool or additive, with the rows of padding as transformers made them: they still tell padding apart"""
    protect: Tensor
    """(B, S)"""
    before: Tensor | None
    """F before the call, (B, S)"""
    scaling: float
    budget: int | None

    def run(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the first n queries see (B, n, S'), F after them and what is alive then (B, S')."""
        assert self.key is not None
        (B, T, _), n = self.query.shape, queries
        S = self.protect.shape[1] - T + n
        wide = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = self.query[:, :n].to(wide), self.key[:, :S].to(wide)
            logits = query @ key.transpose(-1, -2) * self.scaling  # (B, n, S')
        protect = self.protect[:, :S]
        visible = None
        if self.attention_mask is not None:
            mask = self.attention_mask[:, :n, :S]
            visible = visible_columns(mask)
            if mask.dtype != torch.bool:
                logits += mask.to(wide).masked_fill(~visible, 0.0)
        selectable = ~protect[:, None] if visible is None else visible & ~protect[:, None]
        selections = logits.relu_().mul_(selectable).tril_(S - n - 1)
        before = logits.new_zeros(B, S) if self.before is None else self.before[:, :S].to(wide)
        return evict(
            before,
            torch.ones(B, S, dtype=torch.bool, device=logits.device),
            queries=n,
            first=S - n,
            budget=S if self.budget is None else self.budget,
            increments=selections,
            visible=visible,
            protect=protect,
        )

    def after_many(self, alive: Tensor) -> Tensor | None:
        """The entries that stay when `alive` (B, S') is left of a call's first queries; None: all."""
        S = alive.shape[1]
        if self.budget is None or self.budget >= S:
            return None
        visible = None
        if self.attention_mask is not None:
            last = self.query.shape[1] - 1 - (self.protect.shape[1] - S)
            visible = visible_columns(self.attention_mask[:, last, :S])
        return kept_entries(alive, visible, self.budget)[:, None]

    def after_one(self, penalty: Tensor) -> Tensor:
        """The entries that stay after a single query, from F after it."""
        assert self.budget is not None
        S = penalty.shape[1]
        priority = penalty.masked_fill(
            self.protect, -torch.inf
        )  # the current token has F = 0 and is the newest: it stays
        if self.attention_mask is not None:
            priority = priority.masked_fill(
                ~visible_columns(self.attention_mask[:, 0]), torch.inf
            )  # padding goes first
        return keep_index(priority, min(self.budget, S))[:, None]

    def without_states(self, layer: EvictingCacheLayer, group: int) -> Callable[[int], State]:
        """How to play the call through again for `crop`: the keys are taken from the cache layer then."""
        query = self.query.clone()  # not a view that keeps all heads
        kept = replace(self, query=query, key=None)

        def replay(queries: int) -> State:
            assert layer.keys is not None
            _, penalty, alive = replace(kept, key=layer.keys[:, group]).run(queries)
            return penalty, kept.after_many(alive)

        return replay


def refuse_static(budget: int | None, length: int) -> None:
    """Raises ValueError for a budget that a static cache of `length` columns could exceed."""
    if budget is not None and budget < length:
        raise ValueError(
            f"a static cache holds all {length} columns from the start, so a budget of {budget} tokens would free nothing; "
            "use a dynamic cache (leave cache_implementation out), or remove the budgets"
        )
