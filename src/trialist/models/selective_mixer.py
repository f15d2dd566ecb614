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

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from trialist.kernels.selective import selective_attention
from trialist.models.attention import FullAttention
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.selective_cache import SelectiveCacheLayer, StaticSelectiveCacheLayer

CacheLayer = SelectiveCacheLayer | StaticSelectiveCacheLayer


def first_tokens(attention_mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    """Bool `(B, S)`: the first column that some query sees, which is the first real token of a row or of a document.

    attention_mask: bool or additive `(B | 1, H | 1, T, S)`; None is causal without padding, its first token column 0.
    """
    if attention_mask is None:
        first = torch.zeros(batch, columns, dtype=torch.bool, device=device)
        first[:, 0] = True
        return first
    seen = visible_columns(attention_mask)[:, 0]  # (B, T, S)
    sees, column = seen.max(-1)  # the first maximum: the first visible column
    marks = torch.zeros(seen.shape[0], columns, dtype=torch.int32, device=device)
    return marks.scatter_reduce_(1, column, sees.int(), "amax").bool().expand(batch, columns)


def visible_columns(attention_mask: Tensor) -> Tensor:
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def _silence_padding(attention_mask: Tensor, own: Tensor) -> Tensor:
    """The mask without the rows of padding queries, which do not see themselves; they must select nothing.

    own: columns `(T,)` of the queries.
    """
    index = own.view(1, 1, -1, 1).expand(*attention_mask.shape[:3], 1)
    if attention_mask.dtype == torch.bool:
        return attention_mask & attention_mask.gather(-1, index)
    return attention_mask.masked_fill(
        ~visible_columns(attention_mask.gather(-1, index)), torch.finfo(attention_mask.dtype).min
    )


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
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Output `(B, T, H, D)` of selective attention; with `layer`, F continues from earlier calls and is stored back.

    query `(B, H, T, D)`; key, value `(B, G, S, D)` as the cache returned them; attention_mask as transformers builds
    it.
    """
    (B, H, T, _), S, device = query.shape, key.shape[2], query.device
    own = torch.arange(S - T, S, device=device)
    if isinstance(layer, StaticSelectiveCacheLayer):
        if T == 1:
            own = layer.cumulative_length - 1 + torch.arange(1, device=device)
        else:  # the prompt: the columns behind it are empty, and without them the queries are the last columns again
            S = int(layer.cumulative_length)
            own = torch.arange(S - T, S, device=device)
            key, value = key[:, :, :S], value[:, :, :S]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :S]
        if layer is not None:
            attention_mask = _silence_padding(attention_mask, own)
    if protect_bos:
        protect = first_tokens(attention_mask, B, S, device)
    else:
        protect = torch.zeros(B, S, dtype=torch.bool, device=device)
    call = functools.partial(
        selective_attention, scaling=scaling, selector_head=selector_head, dropout=dropout, training=training
    )
    if layer is None:
        return call(query, key, value, attention_mask, protect=protect)[0]

    if isinstance(layer, StaticSelectiveCacheLayer):
        assert layer.penalty is not None
        if T == 1:  # the query's own column is not the last one here
            protect = protect.index_fill(1, own, True)
        output, penalty = call(query, key, value, attention_mask, protect=protect, penalty=layer.penalty[:, :S])
        layer.penalty[:, :S] = penalty
        return output

    before = layer.penalty
    output, penalty = call(query, key, value, attention_mask, protect=protect, penalty=before)
    group = selector_head * key.shape[1] // H
    selector = query[:, selector_head : selector_head + 1].clone()  # (B, 1, T, D), not a view that keeps all heads
    layer.store(
        penalty,
        functools.partial(_reselect, layer, selector, group, attention_mask, protect, before, scaling, selector_head),
        T,
    )
    return output


def _reselect(
    layer: SelectiveCacheLayer,
    selector: Tensor,
    group: int,
    attention_mask: Tensor | None,
    protect: Tensor,
    before: Tensor | None,
    scaling: float,
    selector_head: int,
    queries: int,
) -> Tensor:
    """F `(B, S')` after the first `queries` of a call, recomputed from its selector head alone."""
    S = protect.shape[1] - selector.shape[2] + queries
    keys = layer.keys[:, group : group + 1, :S]  # type: ignore[index]
    if attention_mask is not None:
        head = min(selector_head, attention_mask.shape[1] - 1)
        attention_mask = attention_mask[:, head : head + 1, :queries, :S]
    return selective_attention(
        selector[:, :, :queries],
        keys,
        keys,
        attention_mask,
        scaling=scaling,
        protect=protect[:, :S],
        penalty=None if before is None else before[:, :S],
    )[1]


class SelectiveAttention(FullAttention):
    """The mixer `selective_attention` of the modular decoder: the projections of full attention, no further
    parameter."""

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.settings("selective")
        self.selector_head = settings["selector_head"]
        self.protect_bos = settings["protect_bos"]

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
