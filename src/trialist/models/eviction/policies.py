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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trialist.kernels.eviction import evict
from trialist.models.eviction.budgets import LEAST
from trialist.models.eviction.cache import UNDO_WINDOW, EvictingCacheLayer, State, kept_entries
from trialist.models.masks import narrow, silence_padding, visible_columns

LOGITS = 2**24
"""Attention logits that heavy hitters hold at once, at most"""


@dataclass(frozen=True)
class Block:
    """The queries of one call and what they can look at."""

    query: Tensor
    """(B, H, T, D)"""
    key: Tensor
    """(B, G, S, D); the queries are the last T columns"""
    attention_mask: Tensor | None
    """(B | 1, 1 | R | H, T, S), bool or additive; None is causal"""
    scores: Tensor | None
    """What the policy returned before, over the S columns, 0 for new ones"""
    scaling: float

    def visible(self, rows: int) -> Tensor | None:
        """Where each query may look `(B | 1, 1 | rows, T, S)`; None is everything before it."""
        if self.attention_mask is None:
            return None
        visible = visible_columns(self.attention_mask)
        return visible[:, :: max(1, visible.shape[1] // rows)]


class Policy(Protocol):
    """Decides what is evicted. A policy is asked once per call, with all its queries."""

    scored: bool
    """Whether it must see every call, also while nothing is evicted yet"""

    @property
    def least(self) -> int:
        """The smallest budget that the policy can keep"""

    def check(self, budget: int) -> None:
        """Raises ValueError for a budget that the policy cannot keep."""

    def play(self, block: Block, budget: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What each query sees `(B, R, T, S)`, the scores after them, and what is alive then `(B, R, S)`."""


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

    def play(self, block: Block, budget: int) -> tuple[Tensor, Tensor | None, Tensor]:
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
        return seen[:, None], None, alive[:, None]


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

    def play(self, block: Block, budget: int) -> tuple[Tensor, Tensor | None, Tensor]:
        (B, H, T, D), (G, S), device = block.query.shape, block.key.shape[1:3], block.query.device
        wide = torch.float64 if block.query.dtype == torch.float64 else torch.float32
        before = torch.zeros(B * G, S, dtype=wide, device=device)
        scores = before if block.scores is None else block.scores.detach().reshape(B * G, S)
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
        return torch.cat(seen, 1).view(B, G, T, S), scores.view(B, G, S), alive.view(B, G, S)


POLICIES: dict[str, type[Recency] | type[HeavyHitters]] = {"recency": Recency, "h2o": HeavyHitters}

Attend = Callable[[Tensor | None], tuple[Tensor, Tensor | None]]


def attend_evicting(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    policy: Policy,
    budget: int,
    layer: EvictingCacheLayer | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `attend(mask)` returns for the mask of what each query still sees; `layer` drops what was evicted.

    query `(B, H, T, D)`, key `(B, G, S, D)` as the cache returned it, attention_mask as transformers builds it. While
    nothing is evicted `attend` gets the mask that it would have got anyway.
    """
    (H, T), S = query.shape[1:3], key.shape[2]
    if layer is not None:
        attention_mask = layer.gather_mask(attention_mask)
    evicting = budget < S
    if not evicting and (layer is None or not policy.scored):
        if layer is not None:
            layer.store(None, lambda queries: (None, None), T)
        return attend(_for_heads(attention_mask, H))
    block = Block(query, key, attention_mask, None if layer is None else layer.scores, scaling)
    seen, scores, alive = policy.play(block, budget)
    if layer is not None:
        if T <= UNDO_WINDOW:
            layer.store(scores, _replay(layer, policy, block, budget), T)
        else:  # what would be needed to take a long prompt back is not worth its memory
            layer.calls.clear()
            layer.scores = scores
        if evicting:
            layer.evict(_kept(block, alive, budget, T), at_once=T > UNDO_WINDOW)
    if not evicting:
        return attend(_for_heads(attention_mask, H))
    if attention_mask is not None:
        attention_mask = silence_padding(attention_mask, torch.arange(S - T, S, device=query.device))
    return attend(narrow(_for_heads(attention_mask, H), _for_heads(seen, H)))


def _kept(block: Block, alive: Tensor, budget: int, queries: int) -> Tensor:
    """The entries that stay `(B, R, m)` after the first queries of a block."""
    (B, R, S), visible = alive.shape, block.visible(alive.shape[1])
    if visible is not None:
        visible = visible[:, :, queries - 1, :S].expand(B, R, S)
    return kept_entries(alive, visible, budget)


def _replay(layer: EvictingCacheLayer, policy: Policy, block: Block, budget: int) -> Callable[[int], State]:
    """How to play the first queries of a call through again, for `crop`; the keys are taken from the layer then."""
    query, mask, before, scaling, T = (
        block.query,
        block.attention_mask,
        block.scores,
        block.scaling,
        block.query.shape[2],
    )

    def replay(queries: int) -> State:
        assert layer.keys is not None
        S = layer.keys.shape[2] - T + queries if mask is None else mask.shape[-1] - T + queries
        again = Block(
            query[:, :, :queries],
            layer.keys[:, :, :S],
            None if mask is None else mask[:, :, :queries, :S],
            None if before is None else before[..., :S],
            scaling,
        )
        _, scores, alive = policy.play(again, budget)
        return scores, _kept(again, alive, budget, queries) if budget < S else None

    return replay


def _for_heads(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask of one row a key/value head as one a query head; others as they are."""
    if mask is None or mask.shape[1] in (1, heads):
        return mask
    return mask.repeat_interleave(heads // mask.shape[1], 1)
