"""Eviction from layers with selective attention: by its penalty (arXiv 2410.02703), or by another policy beside it.

Step by step, in every layer: query i attends to the tokens that are alive and to itself, with F before its own row; then F
gets its row; then, while more than K tokens are alive, one is evicted. `Penalty` evicts the one with the largest F, among
equals the oldest. The first real token of a row (with `protect_bos`) and the current token stay. What an evicted token
selected when it was the query stays in F. Padding is never alive, and its memory goes first.

Of tokens that are alive F depends on queries and keys alone, not on what was evicted, so a block of queries needs no loop
over attention: F is computed for the block, the evictions are played through, and one pass attends with the mask of what
each query sees.

`BesidePenalty` lets another policy decide, which sees attention logits less F. Where it decides for each key/value head, a
token's F grows as long as the selector's key/value head holds the token; other heads that hold it longer keep that F.

B batch, H query heads, G key/value heads, R rows that evict independently (1 or G), T queries, S columns, D head width
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trialist.kernels.eviction import evict, keep_index
from trialist.models.eviction.budgets import LEAST
from trialist.models.eviction.cache import Scores
from trialist.models.eviction.policies import Block, Policy
from trialist.models.masks import visible_columns


def selector_of(block: Block, selector_head: int) -> tuple[Block, int]:
    """The selector's query head with its keys, and which key/value head these are."""
    H, G = block.query.shape[1], block.key.shape[1]
    group = selector_head * G // H
    own, head = block.heads(group), selector_head - group * H // G
    mask = own.attention_mask
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, head, None]
    return replace(own, query=own.query[:, head, None], attention_mask=mask), group


def selections(block: Block) -> Tensor:
    """S `(B, T, S)` of the first query head of `block` on the keys of its only key/value head, after the penalty's formula."""
    query, key, T = block.query[:, 0], block.key[:, 0], block.query.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(wide) @ key.to(wide).transpose(-1, -2) * block.scaling  # (B, T, S)
    assert block.protect is not None
    selectable = ~block.protect[:, 0, None]
    if block.attention_mask is not None:
        mask = block.attention_mask[:, 0]
        own = mask[:, :, -T:].diagonal(dim1=-2, dim2=-1)[..., None]
        visible = visible_columns(mask)
        selectable = selectable & visible & visible_columns(own)  # padding selects nothing
        if mask.dtype != torch.bool:
            logits = logits + mask.to(wide).masked_fill(~visible, 0.0)
    return logits.relu().masked_fill(~selectable, 0.0).tril(block.first - 1)


@dataclass(frozen=True)
class Penalty:
    """What selective attention masks most goes; the score is F. Blocks hold the selector's query head and its keys alone."""

    scored = True
    least = LEAST

    def check(self, budget: int) -> None:
        """Every budget can be kept."""

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        assert block.protect is not None
        selected = selections(block).detach()
        B, T, S = selected.shape
        (before,) = block.scores or (selected.new_zeros(B, S),)
        visible = None if block.attention_mask is None else visible_columns(block.attention_mask[:, 0])
        seen, after, alive = evict(
            before,
            torch.ones(B, S, dtype=torch.bool, device=before.device),
            queries=T,
            first=S - T,
            budget=budget,
            increments=selected,
            visible=visible,
            protect=block.protect[:, 0],
        )
        return seen[:, None], (after,), alive[:, None]

    def kept_after_one(self, block: Block, penalty: Tensor, budget: int) -> Tensor:
        """The entries that stay `(B, 1, m)` after a single query, from F `(B, S)` after it."""
        assert block.protect is not None
        # the current token has F = 0 and is the newest: it stays
        priority = penalty.masked_fill(block.protect[:, 0], -torch.inf)
        if block.attention_mask is not None:
            # padding goes first
            priority = priority.masked_fill(~visible_columns(block.attention_mask[:, 0, -1]), torch.inf)
        return keep_index(priority, min(budget, penalty.shape[1]))[:, None]


@dataclass(frozen=True)
class BesidePenalty:
    """`policy` decides about the tokens of a layer whose attention goes on selecting; scores are F and those of `policy`."""

    policy: Policy
    selector_head: int
    scored = True

    @property
    def least(self) -> int:
        return self.policy.least

    def check(self, budget: int) -> None:
        self.policy.check(budget)

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        hidden, spread = self.hide(block, budget)
        seen, scores, alive = self.policy.play(replace(hidden, scores=block.scores[1:]), budget)
        after = spread.sum(2)
        if block.scores:
            after = after + block.scores[0]
        return seen, (after.detach(), *scores), alive

    def hide(self, block: Block, budget: int) -> tuple[Block, Tensor]:
        """The block with F taken off its logits, as an additive mask `(B, 1 | R, T, S)`; and what F grows by at each query, in
        the entries of each row, of the same shape."""
        S = block.key.shape[2]
        selector, group = selector_of(block, self.selector_head)
        own, selected = block.heads(group), selections(selector)
        before = own.scores[0] if own.scores else selected.new_zeros(1, 1, S)
        seen = self.policy.play(_less(own, before, selected[:, None], own.scores[1:]), budget)[0]
        selected = selected * seen[:, 0]
        spread = _spread(selected, own.columns, block.columns)
        before = block.scores[0] if block.scores else selected.new_zeros(1, 1, S)
        return _less(block, before, spread, ()), spread


def _spread(selected: Tensor, own: Tensor | None, columns: Tensor | None) -> Tensor:
    """Selections `(B, T, S)` of the entries that stand in the columns `own` `(B, 1, S)`, at the entries of every row."""
    if own is None or columns is None or columns.shape[1] == 1:
        return selected[:, None]
    index = torch.searchsorted(own.expand_as(columns).contiguous(), columns.contiguous()).clamp(max=own.shape[-1] - 1)
    held = own.expand_as(columns).gather(-1, index) == columns  # (B, R, S)
    B, R, S = columns.shape
    T = selected.shape[1]
    found = selected[:, None].expand(B, R, T, S).gather(-1, index[:, :, None].expand(B, R, T, S))
    return found * held[:, :, None]


def _less(block: Block, before: Tensor, increments: Tensor, scores: Scores) -> Block:
    """The block whose mask hides by F: `before` `(B, 1 | R, S)` and the `increments` `(B, 1 | R, T, S)` of earlier queries."""
    T, S = increments.shape[-2:]
    F = before[:, :, None] + torch.nn.functional.pad(increments.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
    mask, device = block.attention_mask, F.device
    if mask is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    else:
        visible = visible_columns(mask)
        if 1 < F.shape[1] < mask.shape[1]:
            F = F.repeat_interleave(mask.shape[1] // F.shape[1], 1)
        if mask.dtype != torch.bool:
            F = F - mask.to(F.dtype).masked_fill(~visible, 0.0)
    return replace(block, attention_mask=(-F).masked_fill(~visible, torch.finfo(F.dtype).min), scores=scores)
