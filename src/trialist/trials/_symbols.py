"""Tasks of generated symbols: their place in a vocabulary, and what a model answers where labels end every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def symbol_ids(vocabulary: int, symbols: int) -> Any:
    """Distinct token ids for the task's symbols, spread over a model's vocabulary."""
    import torch

    if vocabulary < symbols:
        raise ValueError(f"the model's vocabulary has {vocabulary} tokens, the task needs {symbols}")
    return torch.arange(symbols) * (vocabulary // symbols) + (vocabulary // symbols) // 2  # (symbols,)


def accuracy(model: Any, batch: Mapping[str, Any]) -> float:
    """Share of answers whose most probable token is right. The answers stand at the end of every row."""
    import torch

    labels = batch["labels"]
    answers = int((labels[0] >= 0).sum())
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], logits_to_keep=answers + 1, use_cache=False
        ).logits  # (B, answers + 1, V)
    return float((logits[:, :-1].argmax(-1) == labels[:, -answers:]).float().mean())


def mean_loss(model: Any, batches: list[dict[str, Any]]) -> float:
    """Nats per answer."""
    import torch

    from trialist.objectives.cross_entropy import CrossEntropy

    total = weight = 0.0
    with torch.no_grad():
        for batch in batches:
            loss, stats = CrossEntropy()(model, batch)
            total += float(loss)
            weight += float(stats["weight"])
    return total / weight
