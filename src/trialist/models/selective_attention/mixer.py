"""Selective attention (arXiv 2410.02703): one existing head decides which earlier tokens all heads may forget.

    S[i, j] = relu(l[sel][i, j])  for j < i, 0 for a protected first token        l[h] = q[h] k[h]^T / sqrt(D), causal
    F[i, j] = sum over m < i of S[m, j]                                           a query does not see its own selection
    out[h]  = softmax(l[h] - F) v[h]                                              for all heads, the selector included

It has no parameters; gradients reach the selector's query and key through F. The formula is computed by
`trialist.kernels.selective`; here are its use with masks and caches of transformers, and the
mixer of the modular decoder.

Departures: "the first token" is the first token that is not padding, in packed rows that of each document. With grouped
keys the selector uses the key/value head of its group. No official code exists to compare with.

B batch, T queries, S columns, H query heads, G key/value heads, D head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from trialist.kernels.selective import selective_attention
from trialist.models.attention import FullAttention
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.eviction.attention import claim, for_heads, play, recorded
from trialist.models.eviction.budgets import spread_budgets
from trialist.models.eviction.cache import UNDO_WINDOW, Scores, Undo, pick, refuse_static
from trialist.models.eviction.policies import Block, Eviction, Policy
from trialist.models.masks import first_tokens, narrow, silence_padding
from trialist.models.selective_attention.cache import SelectiveCacheLayer, StaticSelectiveCacheLayer
from trialist.models.selective_attention.eviction import BesidePenalty, Penalty, selections, selector_of
from trialist.models.selective_attention.memory import MemoryRecord

PENALTY = Penalty()
CacheLayer = SelectiveCacheLayer | StaticSelectiveCacheLayer
Call = Callable[..., tuple[Tensor, Tensor]]
"""The kernel on the queries of a call: from a mask, F before it and first tokens to the output and F after it"""


def attend_selectively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    selector_head: int = 0,
    protect_bos: bool = True,
    layer: CacheLayer | None = None,
    budget: int | None = None,
    policy: Policy = PENALTY,
    memory: MemoryRecord | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Output `(B, T, H, D)` of selective attention; with `layer`, F continues from earlier calls and is stored back.

    query `(B, H, T, D)`; key, value `(B, G, S, D)` as the cache returned them; attention_mask as transformers builds
    it. With `budget`, a query sees at most that many tokens and itself, by the largest penalty or by another `policy` (see
    `trialist.models.selective_attention.eviction`), and `layer` drops what was evicted. `memory` takes M of this layer.
    """
    memory = memory if memory is not None and memory.wanted() else None

    def call(
        mask: Tensor | None, penalty: Tensor | None, protect: Tensor, key: Tensor = key, value: Tensor = value
    ) -> tuple[Tensor, Tensor]:
        output, after, *remaining = selective_attention(
            query, key, value, mask, scaling=scaling, selector_head=selector_head, protect=protect, penalty=penalty,
            dropout=dropout, training=training, tau=None if memory is None else memory.tau,
        )  # fmt: skip
        if memory is not None:
            memory.add(remaining[0], mask)
        return output, after

    if isinstance(layer, StaticSelectiveCacheLayer):
        return _attend_static(call, layer, query, key, value, attention_mask, protect_bos, budget)
    attend = _attend if layer is None else _attend_uncompiled
    return attend(call, query, key, attention_mask, scaling, selector_head, protect_bos, layer, budget, policy, memory)


def _attend(
    call: Call,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    selector_head: int,
    protect_bos: bool,
    layer: SelectiveCacheLayer | None,
    budget: int | None,
    policy: Policy,
    memory: MemoryRecord | None,
) -> Tensor:
    T, S, device = query.shape[2], key.shape[2], query.device
    minds_padding = layer is not None or (budget is not None and budget < S)
    length = S if layer is None else layer.cumulative_length
    protect = _protected(attention_mask, query, length, protect_bos, minds_padding)[:, None]  # (B, 1, length)
    scores: Scores = ()
    columns = torch.arange(S, dtype=torch.int32, device=device).expand(len(query), 1, S)
    if layer is not None:
        if budget is None and layer.scored_by is not type(policy):
            policy = PENALTY
        claim(layer, policy, past=S > T)
        attention_mask, scores = layer.gather_mask(attention_mask), layer.scores
        if layer.columns is not None:
            columns, protect = layer.columns, pick(protect, layer.columns.long())
    silenced = attention_mask = None if attention_mask is None else attention_mask[..., :S]
    if silenced is not None and minds_padding:
        silenced = silence_padding(silenced, torch.arange(S - T, S, device=device))
    block = Block(query, key, attention_mask, scores, scaling, protect, columns)
    budget = S if budget is None else budget
    if isinstance(policy, Penalty):
        return _attend_by_penalty(call, block, silenced, selector_head, budget, layer)
    return _attend_beside_penalty(call, block, silenced, BesidePenalty(policy, selector_head), budget, layer, memory)


# what a growing cache holds has another shape at every call
_attend_uncompiled = torch.compiler.disable(_attend)


def _attend_by_penalty(
    call: Call,
    block: Block,
    silenced: Tensor | None,
    selector_head: int,
    budget: int,
    layer: SelectiveCacheLayer | None,
) -> Tensor:
    """silenced: the mask without the rows of padding."""
    T, S = block.query.shape[2], block.key.shape[2]
    own, group = selector_of(block, selector_head)
    own = replace(own, query=own.query.detach(), key=own.key.detach(), columns=None)
    before = block.scores[0] if block.scores else None
    assert own.protect is not None
    if budget < S and T > 1:
        seen = play(PENALTY, own, budget, layer, group)
        return call(narrow(silenced, seen), before, own.protect[:, 0])[0]
    output, penalty = call(silenced, before, own.protect[:, 0])
    if layer is None:
        return output
    early = T - UNDO_WINDOW
    if early > 0:
        layer.store((penalty,), Undo(own.scores, early))
        own = own.part(early, T)
        own = replace(own, scores=((penalty - selections(own).sum(1)).clamp(min=0.0),))
    layer.store((penalty,), recorded(PENALTY, own, budget, group))
    if budget < S:
        layer.evict(PENALTY.kept_after_one(own, penalty, budget))
    return output


def _attend_beside_penalty(
    call: Call,
    block: Block,
    silenced: Tensor | None,
    beside: BesidePenalty,
    budget: int,
    layer: SelectiveCacheLayer | None,
    memory: MemoryRecord | None,
) -> Tensor:
    H, S = block.query.shape[1], block.key.shape[2]
    assert block.protect is not None
    assert block.columns is not None
    seen = play(beside, block, budget, layer) if layer is not None or budget < S else None
    if block.columns.shape[1] == 1:
        if seen is not None and budget < S:
            silenced = narrow(for_heads(silenced, H), for_heads(seen, H))
        output, penalty = call(silenced, block.scores[0][:, 0] if block.scores else None, block.protect[:, 0])
        if layer is not None and budget >= S:  # F to the bit as without the policy
            layer.scores = (penalty[:, None], *layer.scores[1:])
        return output
    if memory is not None:
        raise ValueError(
            f"{type(beside.policy).__name__} keeps other tokens for each head, so what the layer remembers of cached ones is not "
            "one number; measure it in a pass without a cache"
        )
    assert seen is not None
    # every row has columns of its own, so F comes in as a mask of its own
    hidden = for_heads(beside.hide(block, budget)[0].attention_mask, H)
    return call(narrow(hidden, for_heads(seen, H)), None, torch.ones_like(block.protect[:, 0]))[0]


def _attend_static(
    call: Call,
    layer: StaticSelectiveCacheLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    protect_bos: bool,
    budget: int | None,
) -> Tensor:
    refuse_static(budget, layer.max_cache_len)
    T, S, device = query.shape[2], key.shape[2], query.device
    if T == 1:
        own = layer.cumulative_length - 1 + torch.arange(1, device=device)
    else:  # the prompt: the columns behind it are empty, and without them the queries are the last columns again
        S = int(layer.cumulative_length)
        own = torch.arange(S - T, S, device=device)
        key, value = key[:, :, :S], value[:, :, :S]
    if attention_mask is not None:
        attention_mask = silence_padding(attention_mask[..., :S], own)
    protect = _first(attention_mask, len(query), S, protect_bos, device)
    if T == 1:  # the query's own column is not the last one here
        protect = protect.index_fill(1, own, True)
    assert layer.penalty is not None
    output, penalty = call(attention_mask, layer.penalty[:, :S], protect, key, value)
    layer.penalty[:, :S] = penalty
    return output


def _first(mask: Tensor | None, batch: int, columns: int, protect_bos: bool, device: torch.device) -> Tensor:
    """Bool `(B, columns)`: what is never hidden."""
    if protect_bos:
        return first_tokens(mask, batch, columns, device)
    return torch.zeros(batch, columns, dtype=torch.bool, device=device)


def _protected(mask: Tensor | None, query: Tensor, length: int, protect_bos: bool, minds_padding: bool) -> Tensor:
    """Bool `(B, length)`, over all tokens of the text: a first token that was evicted has no successor."""
    (B, _, T, _), device = query.shape, query.device
    if mask is not None and protect_bos:
        mask = mask[..., :length]
        if minds_padding:
            mask = silence_padding(mask, torch.arange(length - T, length, device=device))
    return _first(mask, B, length, protect_bos, device)


class SelectiveAttention(FullAttention):
    """The mixer `selective_attention` of the modular decoder: the projections of full attention, no further
    parameter."""

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.settings("selective")
        self.selector_head = settings["selector_head"]
        self.protect_bos = settings["protect_bos"]
        selective = [index for index, kind in enumerate(config.layer_types or ()) if kind == "selective_attention"]
        budgets = spread_budgets(settings["budgets"], len(selective))
        self.eviction = Eviction(PENALTY, budgets[selective.index(layer_idx)])
        self.memory_record: MemoryRecord | None = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = None if past_key_values is None else _layer_of(past_key_values, self.layer_idx)
        if isinstance(layer, SelectiveCacheLayer):
            layer.expect()
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        output = attend_selectively(
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            selector_head=self.selector_head,
            protect_bos=self.protect_bos,
            layer=None if past_key_values is None else _layer_of(past_key_values, self.layer_idx),
            budget=self.eviction.budget,
            policy=self.eviction.policy,
            memory=self.memory_record,
            dropout=self.attention_dropout,
            training=self.training,
        )
        return output, None


def _layer_of(cache: Cache, layer_idx: int) -> CacheLayer:
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, SelectiveCacheLayer | StaticSelectiveCacheLayer):
        found = "none" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"layer {layer_idx} needs a cache with a selective layer and got {found}; "
            "build it from the model's configuration: DynamicCache(config=model.config)"
        )
    return layer
