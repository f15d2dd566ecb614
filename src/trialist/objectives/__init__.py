"""Losses as plain callables: `loss_sum, {"weight": ...} = objective(model, batch)`."""

from trialist.objectives.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy"]
