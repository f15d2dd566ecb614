"""Cross entropy plus a price on the context that selective attention keeps (arXiv 2410.02703, section on memory)."""

# B batch, T time

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trialist.models.selective_attention.memory import record_memory
from trialist.objectives.cross_entropy import IGNORED, CrossEntropy, labels_of


@dataclass(frozen=True)
class MemoryLoss:
    """Cross entropy, in nats summed over the tokens that count, plus `epsilon` times the share of tokens kept:

        M[i] = sum over visible j <= i of 1 - min(F[i, j], tau) / tau          tokens that query i still remembers
        L    = L_ce + epsilon * mean over layers of max over i of M[i] / n     n: tokens of the document

    `stats["weight"]` is that of `CrossEntropy`; `stats["memory"]` is the share itself, weighted the same way. A document
    (a row, or a piece of a packed row) counts by its scored tokens, so batching and packing change nothing.
    epsilon=0 is exactly `CrossEntropy`. Gradients reach the selector heads through F; F above `tau` gets none. In a recurrent
    core every step with gradient counts as a layer. Under budgets M counts what is still there.

    tau: penalty from which on a token counts as forgotten, above 0.   epsilon: price of keeping everything, in nats a token.
    reduction: "max" is the paper's largest M of a document, "mean" its mean M.
    Raises ValueError for a model without selective attention, and under reentrant gradient checkpointing, which hides M
    from the loss.
    """

    tau: float = 1.0
    epsilon: float = 0.1
    reduction: Literal["max", "mean"] = "max"
    cross_entropy: CrossEntropy = field(default_factory=CrossEntropy)

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau is {self.tau}; it must be finite and above 0")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; it must be finite and at least 0 (0 is cross entropy alone)")
        if self.reduction not in ("max", "mean"):
            raise ValueError(f'reduction is {self.reduction!r}; choose "max" or "mean"')

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.epsilon == 0:
            return self.cross_entropy(model, batch)
        with record_memory(model, self.tau) as records:
            loss, stats = self.cross_entropy(model, batch)
            memories = [memory for record in records for memory in record.memories]
        if not memories:
            raise ValueError(
                "the memory of the selective layers did not reach the loss: gradient checkpointing must not be reentrant; "
                'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        share = self._share(torch.stack(memories), batch)
        return loss + self.epsilon * share.to(loss.dtype), {**stats, "memory": share.detach()}

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of tokens that `batch` scores, without a forward pass."""
        return self.cross_entropy.weight(batch)

    def _share(self, memories: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Share of tokens kept, summed over the scored tokens; memories `(L, B, T)`."""
        documents, real = documents_of(batch)
        L, count = memories.shape[0], documents.numel()  # at most; the number itself would wait for the accelerator
        documents = torch.where(real, documents, count)  # padding goes to a document that is dropped
        flat = documents.flatten()

        def totals(values: Tensor) -> Tensor:
            return values.new_zeros(count + 1).index_add_(0, flat, values.flatten())[:count]

        tokens = totals(real.to(memories.dtype))
        scored = torch.nn.functional.pad(labels_of(batch)[:, 1:] != IGNORED, (1, 0))
        weights = totals(scored.to(memories.dtype))
        index = flat.expand(L, -1)
        kept = memories.new_zeros(L, count + 1)
        if self.reduction == "max":
            kept = kept.scatter_reduce(1, index, memories.flatten(1), "amax")[:, :count]
        else:
            kept = kept.scatter_add(1, index, memories.flatten(1))[:, :count] / tokens.clamp(min=1)
        return (kept.mean(0) / tokens.clamp(min=1) * weights).sum()


def documents_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A number for the document of each token, `(B, T)` from 0 on, and bool `(B, T)` where a token is no padding.

    A document begins with a row and wherever the position is 0.
    """
    input_ids, position_ids = batch["input_ids"], batch.get("position_ids")
    mask = batch.get("attention_mask")
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    starts = torch.zeros_like(real) if position_ids is None else (position_ids == 0) & real
    starts = starts.clone()
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view(input_ids.shape) - 1, real
