"""Losses as plain callables: `loss_sum, {"weight": ...} = objective(model, batch)`.

Names are imported on first use, so that the options of a recipe can be shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.objectives.cross_entropy import CrossEntropy
    from trialist.objectives.memory_loss import MemoryLoss
    from trialist.objectives.preference import D2PO, Preference, preference_loss
    from trialist.objectives.reward import RewardLoss, soft_bradley_terry

__all__ = ["D2PO", "CrossEntropy", "MemoryLoss", "Preference", "RewardLoss", "preference_loss", "soft_bradley_terry"]

HOMES = {
    "CrossEntropy": "cross_entropy",
    "D2PO": "preference",
    "MemoryLoss": "memory_loss",
    "Preference": "preference",
    "RewardLoss": "reward",
    "preference_loss": "preference",
    "soft_bradley_terry": "reward",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
