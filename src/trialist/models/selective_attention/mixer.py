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

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from trialist.kernels.selective import selective_attention
from trialist.models.attention import FullAttention
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.eviction.budgets import spread_budgets
from trialist.models.eviction.cache import UNDO_WINDOW
from trialist.models.masks import first_tokens, narrow, silence_padding
from trialist.models.selective_attention.cache import SelectiveCacheLayer, StaticSelectiveCacheLayer
from trialist.models.selective_attention.eviction import Selector, refuse_static
from trialist.models.selective_attention.memory import MemoryRecord

CacheLayer = SelectiveCacheLayer | StaticSelectiveCacheLayer


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
    memory: MemoryRecord | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Output `(B, T, H, D)` of selective attention; with `layer`, F continues from earlier calls and is stored back.

    query `(B, H, T, D)`; key, value `(B, G, S, D)` as the cache returned them; attention_mask as transformers builds
    it. With `budget`, a query sees at most that many tokens and itself (see `trialist.models.selective_attention.eviction`), and
    `layer` drops what was evicted. `memory` takes M of this layer.
    """
    (B, H, T, _), S, device = query.shape, key.shape[2], query.device
    own = torch.arange(S - T, S, device=device)
    if isinstance(layer, StaticSelectiveCacheLayer):
        refuse_static(budget, layer.max_cache_len)
        if T == 1:
            own = layer.cumulative_length - 1 + torch.arange(1, device=device)
        else:  # the prompt: the columns behind it are empty, and without them the queries are the last columns again
            S = int(layer.cumulative_length)
            own = torch.arange(S - T, S, device=device)
            key, value = key[:, :, :S], value[:, :, :S]
    elif layer is not None:
        attention_mask = layer.gather_mask(attention_mask)
    evicting = budget is not None and budget < S
    whole_mask = attention_mask
    if attention_mask is not None:
        whole_mask = attention_mask = attention_mask[..., :S]
        if layer is not None or evicting:
            attention_mask = silence_padding(attention_mask, own)
    if protect_bos:
        protect = first_tokens(attention_mask, B, S, device)
    else:
        protect = torch.zeros(B, S, dtype=torch.bool, device=device)

    memory = memory if memory is not None and memory.wanted() else None

    def call(mask: Tensor | None, penalty: Tensor | None, protect: Tensor) -> tuple[Tensor, Tensor]:
        output, after, *remaining = selective_attention(
            query,
            key,
            value,
            mask,
            scaling=scaling,
            selector_head=selector_head,
            protect=protect,
            penalty=penalty,
            dropout=dropout,
            training=training,
            tau=None if memory is None else memory.tau,
        )
        if memory is not None:
            memory.add(remaining[0], mask)
        return output, after

    if isinstance(layer, StaticSelectiveCacheLayer):
        assert layer.penalty is not None
        if T == 1:  # the query's own column is not the last one here
            protect = protect.index_fill(1, own, True)
        output, penalty = call(attention_mask, layer.penalty[:, :S], protect)
        layer.penalty[:, :S] = penalty
        return output

    before = None if layer is None else layer.penalty
    group = selector_head * key.shape[1] // H
    head = 0 if whole_mask is None else min(selector_head, whole_mask.shape[1] - 1)
    selector = Selector(
        query[:, selector_head].detach(),
        key[:, group].detach(),
        None if whole_mask is None else whole_mask[:, head].detach(),
        protect,
        before,
        scaling,
        budget,
    )
    if not evicting or T == 1:
        output, penalty = call(attention_mask, before, protect)
    else:
        seen, penalty, alive = selector.run(T)
        output, _ = call(narrow(attention_mask, seen[:, None]), before, protect)
    if layer is not None:
        layer.store(penalty, selector.without_states(layer, group), T)
        if evicting:
            kept = selector.after_one(penalty) if T == 1 else selector.after_many(alive)
            assert kept is not None
            layer.evict(kept, at_once=T > UNDO_WINDOW)
    return output


class SelectiveAttention(FullAttention):
    """The mixer `selective_attention` of the modular decoder: the projections of full attention, no further
    parameter."""

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.settings("selective")
        self.selector_head = settings["selector_head"]
        self.protect_bos = settings["protect_bos"]
        selective = [index for index, kind in enumerate(config.layer_types or ()) if kind == "selective_attention"]
        self.budget = spread_budgets(settings["budgets"], len(selective))[selective.index(layer_idx)]
        self.memory_record: MemoryRecord | None = None

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
            budget=self.budget,
            memory=self.memory_record,
            dropout=self.attention_dropout,
            training=self.training,
        )
        return output, None


def _layer_of(cache: Cache, layer_idx: int) -> CacheLayer:
    layer = cache.layers[layer_idx]
    if not isinstance(layer, SelectiveCacheLayer | StaticSelectiveCacheLayer):
        raise ValueError(
            f"layer {layer_idx} needs a cache with a selective layer and got a {type(layer).__name__}; "
            "build it from the model's configuration: DynamicCache(config=model.config)"
        )
    return layer
