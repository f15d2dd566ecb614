"""What layers with selective attention make of their context: what they remember, what they see, what they store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from trialist.models.eviction.cache import layer_bytes
from trialist.models.eviction.measure import Rows, batches, evaluating, filled_cache, inputs_of
from trialist.models.recurrent_depth.cache import RecurrentDepthCache
from trialist.models.selective_attention.memory import record_memory, selective_modules


@dataclass(frozen=True)
class LayerMemory:
    """What one layer makes of its context, over all tokens of a text that are no padding."""

    layer: int
    remembered_mean: float
    """Tokens with a penalty below tau, counted in part: M of the paper, mean over queries"""
    remembered_max: float
    seen_mean: float
    """Tokens that a query can attend to, itself included: all before it without a budget"""
    seen_max: float
    bytes: float
    """Memory of the layer's cache after a row, bytes a row; in a recurrent core of its caches of all steps together"""


@torch.no_grad()
def memory_profile(model: nn.Module, rows: Rows, *, tau: float = 1.0, batch_size: int = 16) -> list[LayerMemory]:
    """What each layer with selective attention remembers, sees and stores, one entry a layer.

    rows: token ids `(N, T)` or a batch of N rows, on the model's device. tau: penalty from which on a token counts as
    forgotten. In a recurrent core M and what is seen are means over the steps.
    Raises ValueError for a model without selective attention, and for rows that hold nothing but padding.
    """
    parts = batches(model, rows, batch_size)
    remembered: list[list[Tensor]] = []
    seen: list[list[Tensor]] = []
    sizes: list[list[int]] = []
    with evaluating(model):
        for batch in parts:
            mask = batch.get("attention_mask")
            real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
            if mask is not None:
                real = mask.bool() if mask.dim() == 2 else real
            with record_memory(model, tau) as records:
                model(**inputs_of(model, batch), use_cache=False)
                remembered.append([torch.stack(record.memories).mean(0)[real].float() for record in records])
                seen.append([torch.stack(record.seen).float().mean(0)[real] for record in records])
            cache = filled_cache(model, batch)
            sizes.append([_bytes(cache, module.layer_idx) for module in selective_modules(model)])
    N = sum(len(batch["input_ids"]) for batch in parts)
    profile = []
    for index, module in enumerate(selective_modules(model)):
        memory, sees = (torch.cat([part[index] for part in values]) for values in (remembered, seen))
        profile.append(
            LayerMemory(
                module.layer_idx,
                remembered_mean=float(memory.mean()),
                remembered_max=float(memory.max()),
                seen_mean=float(sees.mean()),
                seen_max=float(sees.max()),
                bytes=sum(part[index] for part in sizes) / N,
            )
        )
    return profile


def _bytes(cache: Cache, layer_idx: int) -> int:
    layers: list[Any] = (
        cache.of_layer(layer_idx) if isinstance(cache, RecurrentDepthCache) else [cache.layers[layer_idx]]
    )
    return sum(map(layer_bytes, layers))
