"""The training loop, its schedules and its checkpoints; the adapter to the Hugging Face Trainer; recipes.

Names are imported on first use, so that the options of a recipe can be shown without torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.training.checkpoints import load_checkpoint, save_checkpoint
    from trialist.training.consolidation import consolidate
    from trialist.training.fit import FitResult, fit
    from trialist.training.parallel import initialize_from_torchrun, shard_model
    from trialist.training.preference_reference import reference_logprobs
    from trialist.training.preference_trl import adapt_dpo_trainer
    from trialist.training.recurrence import RecurrenceCallback
    from trialist.training.schedules import Schedule
    from trialist.training.trainer import ObjectiveTrainer

__all__ = [
    "FitResult", "ObjectiveTrainer", "RecurrenceCallback", "Schedule", "adapt_dpo_trainer", "consolidate", "fit",
    "initialize_from_torchrun", "load_checkpoint", "reference_logprobs", "save_checkpoint", "shard_model",
]  # fmt: skip

HOMES = {
    "FitResult": "fit",
    "ObjectiveTrainer": "trainer",
    "RecurrenceCallback": "recurrence",
    "Schedule": "schedules",
    "adapt_dpo_trainer": "preference_trl",
    "consolidate": "consolidation",
    "fit": "fit",
    "initialize_from_torchrun": "parallel",
    "load_checkpoint": "checkpoints",
    "reference_logprobs": "preference_reference",
    "save_checkpoint": "checkpoints",
    "shard_model": "parallel",
}


class _Package(ModuleType):
    """A module-level `__getattr__` would not do: once the file `fit` is imported, the package has an attribute `fit`, and
    that is the file."""

    def __getattribute__(self, name: str) -> Any:
        if name in HOMES:
            return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Package
