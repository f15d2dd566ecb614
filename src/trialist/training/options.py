"""Options that trainings share, and checks of options, whose errors name them as they are written on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


class Options:
    """Ranges that a dataclass of options holds its own fields to."""

    def require(self, **least: int) -> None:
        """Raises ValueError for a named option that is less than that; None is none."""
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")

    def require_above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be > 0, not {value}")

    def require_not_negative(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Options of any training, of a recipe as of a chain of them."""

    max_examples: int | None = None
    """Most rows to read"""
    validation: float = 0.05
    """Share of the rows held out, by prompt; 0 for none; unused where the data bring a validation split or you name one"""
    chat_template: str | None = None
    """File with a Jinja chat template instead of the tokenizer's own; saved with the model"""
    lora: int = 0
    """Rank of LoRA adapters on all linear layers (alpha is twice the rank); 0 trains all weights"""
    steps: int | None = None
    """Optimizer steps, instead of epochs"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16; trained weights stay float32, with LoRA the frozen ones are stored in bfloat16"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time"""
    checkpoint_every: int | None = None
    """Steps between checkpoints; without it ten in a run"""
    report_to: tuple[str, ...] = ()
    """Loggers of the Trainer, for example tensorboard (into OUTPUT/logs), wandb, trackio"""
    seed: int = 0
    """Of everything that is drawn"""
