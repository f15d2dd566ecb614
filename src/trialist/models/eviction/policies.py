"""Eviction from the cache of standard attention under a budget, in existing models: recency and heavy hitters.

Step by step, in every layer: query i attends to the tokens that are alive and to itself; the policy scores tokens; then,
while more than K tokens are alive, the policy's token is evicted for good. A forward pass over many tokens, with or
without a cache, gives what decoding them one by one gives. Positions stay those of the text; padding is never alive.

`Recency` (StreamingLLM, arXiv 2309.17453): the first tokens and the most recent ones stay. Departure: its positions are
not renumbered within the cache. `HeavyHitters` (H2O, arXiv 2306.14048): of the tokens that are not recent, the one that
received least attention so far goes; every key/value head decides for itself.

B batch, H query heads, G key/value heads, R rows that evict independently (1 or G), T queries, S stored columns,
D head width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trialist.kernels.eviction import evict
from trialist.models.eviction.budgets import LEAST
from trialist.models.eviction.cache import Scores, kept_entries, pick, pick_columns
from trialist.models.masks import visible_columns

LOGITS = 2**24
"""Attention logits that heavy hitters hold at once, at most"""


@dataclass(frozen=True)
class Block:
    """Queries of one call, in a row, and what they can look at: all columns before them are alive."""

    query: Tensor
    """(B, H, T, D)"""
    key: Tensor
    """(B, G, S, D); the queries are the last T columns"""
    attention_mask: Tensor | None
    """(B | 1, 1 | R | H, T, S), bool or additive; None is causal"""
    scores: Scores
    """What the policy returned before, over the S columns, 0 for new ones; () at first"""
    scaling: float
    protect: Tensor | None = None
    """(B, 1 | R, S), bool: the first tokens that selective attention never hides; None without it"""
    columns: Tensor | None = None
    """(B, 1 | R, S): which token of the text each column is; None where the policy need not know"""

    @property
    def first(self) -> int:
        """Columns before the first query."""
        return self.key.shape[2] - self.query.shape[2]

    def visible(self, rows: int) -> Tensor | None:
        """Where each query may look `(B | 1, 1 | rows, T, S)`; None is everything before it."""
        if self.attention_mask is None:
            return None
        visible = visible_columns(self.attention_mask)
        return visible[:, :: max(1, visible.shape[1] // rows)]

    def part(self, start: int, stop: int) -> Block:
        """Queries `start` to `stop`, and the columns up to the last of them."""
        S = self.first + stop

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., :S]

        return replace(
            self,
            query=self.query[:, :, start:stop],
            key=self.key[:, :, :S],
            attention_mask=None if self.attention_mask is None else self.attention_mask[:, :, start:stop, :S],
            scores=tuple(score[..., :S] for score in self.scores),
            protect=cut(self.protect),
            columns=cut(self.columns),
        )

    def heads(self, group: int) -> Block:
        """The query heads and the entries of one key/value head."""
        H, G = self.query.shape[1], self.key.shape[1]
        shared, own = slice(group, group + 1), slice(group * H // G, (group + 1) * H // G)

        def rows(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.shape[1] == 1:
                return tensor
            return tensor[:, own if tensor.shape[1] == H else shared]

        return replace(
            self,
            query=self.query[:, own],
            key=self.key[:, shared],
            attention_mask=rows(self.attention_mask),
            scores=tuple(
                score if score.dim() == 2 or score.shape[1] == 1 else score[:, shared] for score in self.scores
            ),
            protect=rows(self.protect),
            columns=rows(self.columns),
        )

    def at(self, index: Tensor, key: Tensor) -> Block:
        """The block once only the columns at `index` `(B, R, m)` are left, whose keys are `key`."""
        return replace(
            self,
            key=key,
            attention_mask=pick_columns(self.attention_mask, index),
            scores=tuple(pick(score, index) for score in self.scores),
            protect=None if self.protect is None else pick(self.protect, index),
            columns=None if self.columns is None else pick(self.columns, index),
        )

    def kept(self, alive: Tensor, budget: int) -> Tensor:
        """The entries that stay `(B, R, m)` when `alive` `(B, R, S)` is left after the last query."""
        visible = self.visible(alive.shape[1])
        if visible is not None:
            visible = visible[:, :, -1].expand(alive.shape)
        return kept_entries(alive, visible, budget)


class Policy(Protocol):
    """Decides what is evicted. A policy is asked once per call, with all its queries."""

    scored: bool
    """Whether it must see every call, also while nothing is evicted yet"""

    @property
    def least(self) -> int:
        """The smallest budget that the policy can keep"""

    def check(self, budget: int) -> None:
        """Raises ValueError for a budget that the policy cannot keep."""

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        """What each query sees `(B, R, T, S)`, the scores after them, and what is alive then `(B, R, S)`.

        Each key/value head is decided for by its own queries and keys: a block may hold one of them alone.
        """


@dataclass(frozen=True)
class Recency:
    """The first `sinks` tokens of a text stay, and of the others the most recent."""

    sinks: int = 4
    scored = False

    @property
    def least(self) -> int:
        return max(LEAST, self.sinks + 1)

    def check(self, budget: int) -> None:
        if self.sinks < 0 or budget < self.least:
            raise ValueError(f"sinks is {self.sinks}; give 0 or more, and fewer than the budget of {budget} tokens")

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        (B, _, T, _), S, device = block.query.shape, block.key.shape[2], block.query.device
        visible = block.visible(1)
        if visible is None:
            protect = torch.arange(S, device=device)[None] < self.sinks
        else:
            visible = visible[:, 0].expand(B, T, S)
            protect = ((visible.cumsum(-1) <= self.sinks) & visible).any(1)  # (B, S); in packed rows, of each document
        seen, _, alive = evict(
            torch.zeros(B, S, device=device),
            torch.ones(B, S, dtype=torch.bool, device=device),
            queries=T,
            first=S - T,
            budget=budget,
            visible=visible,
            protect=protect,
        )
        return seen[:, None], (), alive[:, None]


@dataclass(frozen=True)
class HeavyHitters:
    """The `recent_share` of the budget goes to the most recent tokens, the rest to those that received most attention.

    A token's score is the attention it received from all queries so far, summed over the query heads of its key/value
    head. The paper halves the budget.
    """

    recent_share: float = 0.5
    scored = True
    least = LEAST

    def check(self, budget: int) -> None:
        if not 0.0 <= self.recent_share <= 1.0:
            raise ValueError(f"recent_share is {self.recent_share}; give a share of the budget in [0, 1]")

    def recent(self, budget: int) -> int:
        return max(1, round(budget * self.recent_share))

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        (B, H, T, D), (G, S), device = block.query.shape, block.key.shape[1:3], block.query.device
        wide = torch.float64 if block.query.dtype == torch.float64 else torch.float32
        (received,) = block.scores or (torch.zeros(B, G, S, dtype=wide, device=device),)
        scores = received.detach().reshape(B * G, S)
        alive = torch.ones(B * G, S, dtype=torch.bool, device=device)
        query = block.query.detach().to(wide).reshape(B, G, H // G, T, D)
        keys = block.key.detach().to(wide).transpose(-1, -2)[:, :, None]  # (B, G, 1, D, S)
        visible = block.visible(G)
        if visible is not None:
            visible = visible.expand(B, G, T, S).reshape(B * G, T, S)
        added = None
        if block.attention_mask is not None and block.attention_mask.dtype != torch.bool:
            mask = block.attention_mask.detach()
            added = mask.to(wide).masked_fill(~visible_columns(mask), 0.0)
            shared = added.shape[1] if added.shape[1] in (1, G) else G
            added = added.view(added.shape[0], shared, -1, T, S)
        seen, size = [], max(1, LOGITS // (B * H * S))
        for start in range(0, T, size):
            part = slice(start, min(start + size, T))
            with torch.autocast(device.type, enabled=False):
                logits = query[:, :, :, part] @ keys * block.scaling  # (B, G, H / G, n, S)
            if added is not None:
                logits = logits + added[:, :, :, part]
            rows, scores, alive = evict(
                scores,
                alive,
                queries=part.stop - start,
                first=S - T + start,
                budget=budget,
                logits=logits.flatten(0, 1),
                visible=None if visible is None else visible[:, part],
                recent=self.recent(budget),
            )
            seen.append(rows)
        return torch.cat(seen, 1).view(B, G, T, S), (scores.view(B, G, S),), alive.view(B, G, S)


POLICIES: dict[str, type[Recency] | type[HeavyHitters]] = {"recency": Recency, "h2o": HeavyHitters}


@dataclass(frozen=True)
class Eviction:
    """How a layer evicts; the attribute `eviction` of its attention module."""

    policy: Policy
    """Who decides which tokens stay"""
    budget: int | None
    """How many stay; None is all"""
    given: bool = False
    """By `enable_eviction`; False in layers that evict by themselves"""
    replaced: Eviction | None = None
    """How a layer that evicts by itself did so before it was given another policy"""


def evicting_modules(model: nn.Module) -> list[Any]:
    """The modules that can evict, in the order of their layers."""
    found = (module for module in model.modules() if isinstance(getattr(module, "eviction", None), Eviction))
    return sorted(found, key=lambda module: module.layer_idx)
