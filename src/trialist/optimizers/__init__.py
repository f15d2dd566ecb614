"""Optimizers and the parameter groups that language models are trained with."""

from trialist.optimizers.adamw import adamw
from trialist.optimizers.row_adagrad import RowAdagrad

__all__ = ["RowAdagrad", "adamw"]
