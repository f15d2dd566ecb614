"""What the Hugging Face Trainer logs, as lines in words, and an early end where the numbers are no numbers any more."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NAMES = {"loss": "loss", "eval_loss": "validation loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}


class Lines(TrainerCallback):
    """Tells each log as `step 20/100  loss 1.234  ...` through `say`. names: what is told, and in which words."""

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
        shown = {label: logs[name] for name, label in self.names.items() if name in logs} if logs else {}
        if shown and state.is_world_process_zero:
            numbers = "  ".join(f"{label} {value:.4g}" for label, value in shown.items())
            self.say(f"step {state.global_step}/{self.total}  {numbers}")


class Divergence(TrainerCallback):
    """Ends a training that has diverged: ValueError when something logged is not finite, and before a checkpoint of weights
    that are not, so that every checkpoint can be gone on from. names: what is looked at in a log, and in which words.

    A loss that is no number makes weights that are none in the same step, so between two logs nothing has to be looked at,
    and a save reads the weights anyway: no step waits for the device.
    """

    def __init__(self, names: Mapping[str, str] = NAMES) -> None:
        self.names = names

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, label in self.names.items():
            if logs and not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(_diverged(f"{label} is {logs[name]}", state.global_step))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if control.should_save:
            require_finite(model, state.global_step)


def require_finite(model: nn.Module, step: int) -> None:
    """Raises ValueError that names the first trained weight that is not finite, after `step` steps."""
    for name, weight in model.named_parameters():
        if (
            weight.requires_grad
            and weight.numel()
            and not torch.linalg.vector_norm(weight.detach(), torch.inf).isfinite()
        ):
            raise ValueError(_diverged(f"the weights {name} are not finite", step))


def _diverged(what: str, step: int) -> str:
    return f"training has diverged: {what} at step {step}; lower --learning-rate, lengthen --warmup, and give another --output"
