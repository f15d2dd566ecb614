"""Rows of text that budgets are found on and caches are measured with. N rows, T tokens of a row"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trialist.models.attention_interface import plain_model
from trialist.models.eviction.cache import cache_bytes

Rows: TypeAlias = Tensor | Mapping[str, Tensor]
"""Token ids `(N, T)` on the model's device, or a batch of N rows with `input_ids` and what else `selected_logprobs` takes"""


def batches(model: nn.Module, rows: Rows, batch_size: int | None = None) -> list[dict[str, Tensor]]:
    """The rows in batches, all in one for None.

    Raises ValueError for rows of another shape, without a token that is no padding, or on another device than the model.
    """
    whole = {"input_ids": rows} if isinstance(rows, Tensor) else dict(rows)
    ids, mask, device = whole["input_ids"], whole.get("attention_mask"), plain_model(model).device
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"rows have shape {tuple(ids.shape)}, wanted token ids (N, T) with at least one row and one token"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 row")
    for name, tensor in whole.items():
        if len(tensor) != len(ids):
            raise ValueError(f"{name} of the rows has {len(tensor)} rows and input_ids {len(ids)}; give equal numbers")
        if tensor.device != device:
            raise ValueError(
                f"{name} of the rows is on {tensor.device} and the model on {device}; move it there: .to({str(device)!r})"
            )
    if mask is not None and mask.dim() == 2 and not mask.any():
        raise ValueError("rows hold nothing but padding: attention_mask is 0 everywhere")
    size = batch_size or len(ids)
    return [
        {name: tensor[start : start + size] for name, tensor in whole.items()} for start in range(0, len(ids), size)
    ]


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a forward pass takes of a batch; padding on the left shifts no position."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    mask = batch.get("attention_mask")
    takes = inspect.signature(plain_model(model).base_model.forward).parameters
    if mask is not None and mask.dim() == 2 and "position_ids" not in batch and "position_ids" in takes:
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return given


@torch.no_grad()
def filled_cache(model: nn.Module, batch: Mapping[str, Tensor]) -> DynamicCache:
    """The cache after a prompt, and the last token of the rows decoded behind it."""
    cache, given = DynamicCache(config=plain_model(model).config), inputs_of(model, batch)
    mask, T = given.pop("attention_mask", None), batch["input_ids"].shape[1]
    for part in (slice(0, T - 1), slice(T - 1, T)) if T > 1 else (slice(0, 1),):
        seen = None if mask is None else mask[..., part, : part.stop] if mask.dim() == 4 else mask[:, : part.stop]
        pieces = {name: tensor[:, part] for name, tensor in given.items()}
        model(**pieces, attention_mask=seen, past_key_values=cache, use_cache=True)
    return cache


def kv_bytes(model: nn.Module, rows: Rows) -> float:
    """Memory that the cache of all layers holds after decoding the last token of the rows, measured, in bytes a row.

    Between two decoding steps a layer holds its budget and the token that is evicted next.
    """
    (batch,) = batches(model, rows)
    with evaluating(model):
        return cache_bytes(filled_cache(model, batch)) / len(batch["input_ids"])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
