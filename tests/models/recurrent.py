"""Tiny decoders of recurrent depth; the expectation of their tests is written out with the same weights, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trialist.models import ModularDecoderForCausalLM

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def recurrent(
    decoder: Callable[..., ModularDecoderForCausalLM], *layer_types: str, changes: dict | None = None, **settings: Any
) -> ModularDecoderForCausalLM:
    """One layer before, two inside and one after the loop unless settings say otherwise; five steps, two with gradient."""
    names = layer_types or ("full_attention",) * 4
    defaults = {
        "prelude_layers": 1,
        "core_layers": len(names) - 2,
        "coda_layers": 1,
        "mean_recurrence": 5,
        "backprop_depth": 2,
    }
    architecture = {"depth": "recurrent", "norm_style": "sandwich", **(changes or {})}
    model = decoder(*names, **architecture, recurrent={**defaults, **settings})
    with torch.no_grad():  # norms that are no identity on what is normalised already
        model.model.norm.weight.copy_(torch.linspace(0.5, 1.5, 24))
    return model


def written_out(
    model: ModularDecoderForCausalLM, ids: Tensor, s0: Tensor, steps: int, without_gradient: int = 0
) -> Tensor:
    """Logits of a pass over whole sequences without padding."""
    inner, depth = model.model, model.model.layers
    positions = torch.arange(ids.shape[1])[None]
    own = {"position_embeddings": inner.rotary_emb(s0, positions)}  # no mask: causal
    e = inner.embed_tokens(ids)
    for block in depth.prelude:
        e = block(e, **own)
    s = s0
    for step in range(steps):
        s = depth.core.adapter.weight @ torch.cat([s, e], -1)[..., None]
        s = s[..., 0]
        for block in depth.core.blocks:
            s = block(s, **own)
        if step < without_gradient:
            s = s.detach()
    y = inner.norm(s)
    for block in depth.coda:
        y = block(y, **own)
    return model.lm_head(inner.norm(y))
