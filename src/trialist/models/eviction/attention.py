"""Attention to what a policy has left: the evictions of a call are played through, then one pass attends with the mask of
what each query sees, and the cache layer drops the rest.

The call's last `UNDO_WINDOW` queries are played apart from those before them, because `crop` may have to play them again;
what the earlier queries evict is dropped at once.

B batch, H query heads, G key/value heads, R rows that evict independently (1 or G), T queries, S stored columns,
D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trialist.models.eviction.cache import UNDO_WINDOW, EvictingCacheLayer, Scores, State, Undo
from trialist.models.eviction.policies import Block, Policy
from trialist.models.masks import narrow, silence_padding

Attend = Callable[[Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class PlayedBlock:
    """A call as `crop` needs it: all but its last query, which is never played again, without keys."""

    policy: Policy
    block: Block
    budget: int
    first: int
    """Columns before the first query"""
    group: int | None
    """The key/value head whose keys are played; None is all"""

    def replay(self, layer: EvictingCacheLayer, queries: int) -> State:
        assert layer.keys is not None
        keys = layer.keys if self.group is None else layer.keys[:, self.group, None]
        query = self.block.query[:, :, :queries]
        block = replace(self.block, query=query, key=keys[:, :, : self.first + queries]).part(0, queries)
        _, scores, alive = self.policy.play(block, self.budget)
        return scores, block.kept(alive, self.budget) if self.budget < block.key.shape[2] else None


def recorded(policy: Policy, block: Block, budget: int, group: int | None = None) -> Undo:
    """What the cache layer keeps of a call to take it back."""
    T, first = block.query.shape[2], block.first
    if T == 1 or T > UNDO_WINDOW:
        return Undo(block.scores, T)

    def owned(tensor: Tensor) -> Tensor:
        """Not a view that keeps all heads, or all queries of a prompt."""
        tensor = tensor.detach()
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor

    played = block.part(0, T - 1)
    mask = played.attention_mask
    kept = replace(
        played,
        query=owned(played.query),
        key=played.key[:, :, :0, :0].clone(),
        attention_mask=None if mask is None else owned(mask),
        scores=tuple(owned(score) for score in played.scores),
        protect=None if played.protect is None else owned(played.protect),
        columns=None if played.columns is None else owned(played.columns),
    )
    return Undo(block.scores, T, PlayedBlock(policy, kept, budget, first, group))


def play(
    policy: Policy, block: Block, budget: int, layer: EvictingCacheLayer | None, group: int | None = None
) -> Tensor:
    """What each query of a call sees `(B, R, T, S)`; `layer` keeps the scores and drops what was evicted.

    group: the key/value head that `block` holds; None where it holds all.
    """
    if layer is None:
        return policy.play(block, budget)[0]
    T, S = block.query.shape[2], block.key.shape[2]
    early, late, seen, stays = T - UNDO_WINDOW, block, [], None
    if early > 0:
        first = block.part(0, early)
        sees, scores, alive = policy.play(first, budget)
        seen.append(torch.nn.functional.pad(sees, (0, S - sees.shape[-1])))
        layer.store(_grown(scores, S), recorded(policy, first, budget, group))
        late = replace(block.part(early, T), scores=layer.scores)
        if budget < first.key.shape[2]:
            stays = first.kept(alive, budget)
            new = torch.arange(S - UNDO_WINDOW, S, device=stays.device)
            stays = torch.cat([stays, new.expand(*stays.shape[:2], UNDO_WINDOW)], -1)
            layer.evict(stays, at_once=True)
            assert layer.keys is not None
            late = late.at(stays, layer.keys if group is None else layer.keys[:, group, None])
    sees, scores, alive = policy.play(late, budget)
    layer.store(scores, recorded(policy, late, budget, group))
    if budget < late.key.shape[2]:
        layer.evict(late.kept(alive, budget))
    if stays is not None:
        stays = stays.expand(*sees.shape[:2], -1)[:, :, None].expand(sees.shape)
        sees = sees.new_zeros(*sees.shape[:3], S).scatter(-1, stays, sees)
    return torch.cat([*seen, sees], 2) if seen else sees


def _grown(scores: Scores, columns: int) -> Scores:
    return tuple(torch.nn.functional.pad(score, (0, columns - score.shape[-1])) for score in scores)


def claim(layer: EvictingCacheLayer, policy: Policy, past: bool) -> None:
    """Notes whose scores `layer` holds. Raises ValueError where another policy has scored its tokens."""
    if past and layer.scored_by not in (None, type(policy)):
        raise ValueError(
            f"the given cache was filled while {layer.scored_by.__name__} decided what is evicted, and now it is "  # type: ignore[union-attr]
            f"{type(policy).__name__}, which has not seen its tokens; start from an empty cache"
        )
    layer.scored_by = type(policy)


def attend_evicting(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    policy: Policy,
    budget: int | None,
    layer: EvictingCacheLayer | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `attend(mask)` returns for the mask of what each query still sees; `layer` drops what was evicted.

    query `(B, H, T, D)`, key `(B, G, S, D)` as the cache returned it, attention_mask as transformers builds it. While
    nothing is evicted `attend` gets the mask that it would have got anyway. budget None evicts nothing.
    """
    (H, T), S = query.shape[1:3], key.shape[2]
    budget = S if budget is None else budget
    if layer is not None:
        claim(layer, policy, past=S > T)
        attention_mask = layer.gather_mask(attention_mask)
    evicting = budget < S
    if not evicting and (layer is None or not policy.scored):
        if layer is not None:
            layer.store((), Undo((), T, NOTHING))
        return attend(for_heads(attention_mask, H))
    block = Block(query, key, attention_mask, () if layer is None else layer.scores, scaling)
    seen = play(policy, block, budget, layer)
    if not evicting:
        return attend(for_heads(attention_mask, H))
    if attention_mask is not None:
        attention_mask = silence_padding(attention_mask, torch.arange(S - T, S, device=query.device))
    return attend(narrow(for_heads(attention_mask, H), for_heads(seen, H)))


# what a growing cache holds has another shape at every call
attend_evicting_uncompiled = torch.compiler.disable(attend_evicting)


@dataclass(frozen=True)
class Unscored:
    """A call that scored and evicted nothing: its beginning has done nothing either."""

    def replay(self, layer: EvictingCacheLayer, queries: int) -> State:
        return (), None


NOTHING = Unscored()


def for_heads(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask of one row a key/value head as one a query head; others as they are."""
    if mask is None or mask.shape[1] in (1, heads):
        return mask
    return mask.repeat_interleave(heads // mask.shape[1], 1)
