"""Losses as plain callables: `loss_sum, {"weight": ...} = objective(model, batch)`."""

from trialist.objectives.cross_entropy import CrossEntropy
from trialist.objectives.memory_loss import MemoryLoss

__all__ = ["CrossEntropy", "MemoryLoss"]
