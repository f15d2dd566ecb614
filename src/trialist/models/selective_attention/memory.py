"""How many tokens selective attention still remembers: M of every query, handed out while the model runs.

    M[i] = sum over visible j <= i of 1 - min(F[i, j], tau) / tau

M comes out of the attention's own pass over the logits and carries gradients to the selector heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trialist.models.masks import visible_columns


class MemoryRecord:
    """M `(B, T)` of one selective layer, once for every time that the layer ran (often in a recurrent core)."""

    def __init__(self, tau: float, differentiable: bool) -> None:
        self.tau, self.differentiable, self.open = tau, differentiable, True
        self.memories: list[Tensor] = []
        self.seen: list[Tensor] = []
        """How many tokens each query could attend to, (B, T); in passes without gradients only"""

    def wanted(self) -> bool:
        """Whether M is computed now: not in a pass without gradients that runs beside the one with gradients, and still
        when gradient checkpointing repeats the pass later, because both must save the same tensors."""
        return torch.is_grad_enabled() == self.differentiable

    def add(self, memory: Tensor, mask: Tensor | None) -> None:
        """mask: where the queries could look, `(B | 1, 1 | H, T, S)`; None is causal."""
        if not self.open:
            return
        self.memories.append(memory)
        if not self.differentiable:
            T = memory.shape[1]
            counts = (
                torch.arange(1, T + 1, device=memory.device) if mask is None else visible_columns(mask)[:, 0].sum(-1)
            )
            self.seen.append(counts.expand(memory.shape))


def selective_modules(model: nn.Module) -> list[Any]:
    """The modules that attend selectively, in the order of their layers: mixers of the decoder, or swapped attention."""
    return sorted((m for m in model.modules() if hasattr(m, "memory_record")), key=lambda module: module.layer_idx)


@contextlib.contextmanager
def record_memory(model: nn.Module, tau: float) -> Iterator[list[MemoryRecord]]:
    """Collects M of each selective layer, in order, while the block runs.

    The memories are gone when the block ends: read them inside. In a model under gradient checkpointing, which repeats passes
    later and must find the same tensors, passes with gradients go on computing M behind the block.
    tau: penalty from which on a token counts as forgotten, above 0.
    Raises ValueError for a model without selective attention.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    modules = selective_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no selective attention, so nothing of its context is ever forgotten; build it with "
            'layer_types "selective_attention", or call enable_selective_attention first'
        )
    repeated = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    records = [MemoryRecord(tau, torch.is_grad_enabled()) for _ in modules]
    for module, record in zip(modules, records):
        module.memory_record = record
    try:
        yield records
    finally:
        for module, record in zip(modules, records):
            record.open, record.memories, record.seen = False, [], []
            if not (record.differentiable and repeated):
                module.memory_record = None
