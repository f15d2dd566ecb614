"""Learning-rate schedules: those of transformers by name, or any scheduler of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

NEEDS_METRIC = ("reduce_lr_on_plateau", "greedy")
OPEN_ENDED = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True)
class Schedule:
    """A schedule of `transformers.get_scheduler`."""

    name: str = "cosine"
    """`linear`, `cosine`, `cosine_with_min_lr`, `warmup_stable_decay`, `constant_with_warmup`, ..."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises from 0"""
    steps: int | None = None
    """Optimizer steps until the schedule ends; None: the budget"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. `min_lr_rate=0.1`"""

    def __post_init__(self) -> None:
        from transformers.trainer_utils import SchedulerType

        known = [kind.value for kind in SchedulerType]
        if self.name not in known:
            raise ValueError(f"schedule {self.name!r} is unknown; one of {', '.join(known)}")
        if self.name in NEEDS_METRIC:
            raise ValueError(f"schedule {self.name!r} follows a metric, which fit does not feed it; take cosine")
        if self.warmup < 0:
            raise ValueError(f"schedule {self.name!r}: warmup must be >= 0 steps, not {self.warmup}")

    @property
    def follows_budget(self) -> bool:
        return self.steps is None and self.name not in OPEN_ENDED

    def build(self, optimizer: Optimizer, budget_steps: int | None) -> LRScheduler:
        """`budget_steps`: the length where the schedule follows the budget."""
        from transformers.optimization import get_scheduler

        return get_scheduler(
            self.name,
            optimizer,
            num_warmup_steps=self.warmup,
            num_training_steps=self.steps or budget_steps,
            scheduler_specific_kwargs=dict(self.options),
        )


def build_schedule(
    schedule: Schedule | str | LRScheduler | Callable[[Optimizer], LRScheduler] | None,
    optimizer: Optimizer,
    budget_steps: Callable[[], int],
) -> tuple[LRScheduler | None, dict[str, Any]]:
    """The scheduler, stepped once per optimizer step, and a description by which a checkpoint tells it from another.

    Raises ValueError for an unknown name, for a scheduler of another optimizer, and for one that needs a metric.
    """
    if schedule is None:
        return None, {"name": "none"}
    if isinstance(schedule, str):
        schedule = Schedule(schedule)
    if isinstance(schedule, Schedule):
        steps = budget_steps() if schedule.follows_budget else schedule.steps
        about = {"name": schedule.name, "warmup": schedule.warmup, "steps": steps, "options": dict(schedule.options)}
        return schedule.build(optimizer, steps), about
    scheduler = schedule if isinstance(schedule, LRScheduler) else schedule(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("schedule: ReduceLROnPlateau follows a metric, which fit does not feed it; take cosine")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("schedule: this scheduler was made for another optimizer; make it for the one given to fit")
    return scheduler, {"name": type(scheduler).__qualname__}
