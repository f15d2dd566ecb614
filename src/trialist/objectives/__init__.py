"""Losses as plain callables: `loss_sum, {"weight": ...} = objective(model, batch)`."""

from trialist.objectives.cross_entropy import CrossEntropy
from trialist.objectives.memory_loss import MemoryLoss
from trialist.objectives.preference import D2PO, Preference, preference_loss
from trialist.objectives.reward import RewardLoss, soft_bradley_terry

__all__ = ["D2PO", "CrossEntropy", "MemoryLoss", "Preference", "RewardLoss", "preference_loss", "soft_bradley_terry"]
