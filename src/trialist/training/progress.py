"""What the Hugging Face Trainer logs, as lines in words, and an early end where the loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NAMES = {"loss": "loss", "eval_loss": "validation loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}


class Lines(TrainerCallback):
    """Tells each log as `step 20/100  loss 1.234  ...` through `say`. names: what is told, and in which words.

    Raises ValueError, which ends the training, when a loss or gradient norm is not finite: the checkpoints are older.
    """

    def __init__(self, say: Callable[[str], None], total: int, names: Mapping[str, str] = NAMES) -> None:
        self.say, self.total, self.names = say, total, names

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {label: logs[name] for name, label in self.names.items() if name in (logs or {})} if logs else {}
        for label, value in shown.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"training has diverged: {label} is {value} at step {state.global_step}; lower --learning-rate, lengthen "
                    "--warmup, and give another --output"
                )
        if shown and state.is_world_process_zero:
            numbers = "  ".join(f"{label} {value:.4g}" for label, value in shown.items())
            self.say(f"step {state.global_step}/{self.total}  {numbers}")
