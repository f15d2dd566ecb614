"""Optimizers and the parameter groups that language models are trained with."""

from trialist.optimizers.adamw import adamw

__all__ = ["adamw"]
