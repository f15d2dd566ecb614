"""Lets callbacks of the Hugging Face Trainer listen to `fit`, and shows its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trialist.training.parallel import ALONE, Ranks

SWITCHES = ("should_training_stop", "should_evaluate", "should_save", "should_log")
Report = Callable[[float, float, Mapping[str, float]], None]


class Hooks:
    """Calls `transformers.TrainerCallback`s with real TrainingArguments, TrainerState and TrainerControl.

    Events: on_train_begin, on_step_begin, on_substep_end, on_pre_optimizer_step, on_optimizer_step, on_step_end,
    on_log, on_evaluate, on_save, on_train_end. The control's should_training_stop, should_evaluate, should_save and
    should_log work; of several ranks each has its own callbacks, and what one of them asks for all do. Without callbacks
    nothing of transformers is imported.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        arguments: Mapping[str, Any],
        ranks: Ranks = ALONE,
    ) -> None:
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.control: Any = None
        if not self.callbacks:
            return
        from transformers import TrainingArguments
        from transformers.trainer_callback import TrainerControl, TrainerState

        self.objects = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
        self.arguments = TrainingArguments(**arguments)
        self.state = TrainerState(
            max_steps=max(self.arguments.max_steps, 0),
            is_world_process_zero=ranks.first,
            is_local_process_zero=ranks.local_rank == 0,
        )
        self.control = TrainerControl()

    def __call__(self, event: str, **given: Any) -> None:
        for callback in self.callbacks:
            answer = getattr(callback, event)(self.arguments, self.state, self.control, **self.objects, **given)
            self.control = self.control if answer is None else answer

    def at(self, step: int, spent: Mapping[str, float]) -> None:
        if self.callbacks:
            self.state.global_step = step
            self.state.num_input_tokens_seen, self.state.total_flos = int(spent["tokens"]), spent.get("flops", 0.0)

    def wants(self, switch: str) -> bool:
        """Whether a callback has set `switch` of the control. A request is granted once, a stop stays."""
        if not self.callbacks or not getattr(self.control, switch):
            return False
        if switch != "should_training_stop":
            setattr(self.control, switch, False)
        return True


class Progress:
    """A bar on a terminal, a callable that is told, or nothing. Told at most five times a second."""

    def __init__(self, progress: bool | Report, unit: str, total: float) -> None:
        self.unit, self.total, self.last = unit, total, 0.0
        self.report: Report | None = progress if callable(progress) else None
        self.bar: Any = None
        if progress is True and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def __call__(self, done: float, numbers: Mapping[str, float], *, force: bool = False) -> None:
        now = time.monotonic()
        if (self.report is None and self.bar is None) or (now - self.last < 0.2 and not force):
            return
        self.last = now
        if self.report is not None:
            self.report(done, self.total, numbers)
        if self.bar is not None:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            text = f"{done:,.0f}/{self.total:,.0f} {self.unit}  {shown}"
            self.bar.update(self.task, completed=done, description=text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
