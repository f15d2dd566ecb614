"""The training loop, its schedules and its checkpoints."""

from trialist.training.checkpoints import load_checkpoint, save_checkpoint
from trialist.training.fit import FitResult, fit
from trialist.training.schedules import Schedule

__all__ = ["FitResult", "Schedule", "fit", "load_checkpoint", "save_checkpoint"]
