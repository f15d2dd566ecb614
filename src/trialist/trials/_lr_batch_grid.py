"""The grid of the learning-rate and batch study: its cells, three rules for how long a cell trains, and what is fitted.

One identity rules all of it. With l, b, s the logarithms of peak learning rate, batch and steps, learning-rate time is
t = l + s and the examples seen are n = b + s, so the ratio is r = l - b = t - n. At a fixed number of epochs n does not vary
and r is t: a ratio found there cannot be told from training harder. Given t, a change of r is a change of -n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from trialist.engine.effects import Cell

RULES = ("equal-epochs", "equal-steps", "equal-lr-time")
TASKS = ("reasoning", "pattern", "format")
GIVEN, PUBLISHED, NULL = "all-rules-given-lr-time", "equal-epochs-no-control", "twins"
LAW = {f"law-{task}": task for task in TASKS}
TWINS = ("pattern", "pattern-twin")


@dataclass(frozen=True)
class Point:
    """A place of the grid: how far peak learning rate and batch lie from the middle, and how long is trained."""

    learning_rate: float
    batch: int
    steps: int


def points(
    rule: str, *, learning_rate: float, batch: int, steps: int, learning_rates: int, factor: float, spread: int
) -> Iterator[Point]:
    """`learning_rates` rates, each `factor` times the one before, by three batches, each `spread` times the one before.

    learning_rate, batch, steps: of the middle cell, which is the same under every rule. Raises ValueError for an unknown
    rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; one of {', '.join(RULES)}")
    half = learning_rates // 2
    for place in range(-half, half + 1):
        for size in (batch // spread, batch, batch * spread):
            length = {
                "equal-epochs": steps * batch / size,
                "equal-steps": steps,
                "equal-lr-time": steps * factor**-place,
            }[rule]
            yield Point(learning_rate * factor**place, size, max(1, round(length)))


@dataclass(frozen=True)
class RatioEffect:
    """What a setting's cells say about the ratio, in the metric per doubling, one number a seed.

    Over all rules, and at equal steps: the slope over log2(lr / batch) given log2(learning-rate time) and its square, of
    reasoning minus the mean of the other tasks, which is the interaction of task and ratio. At equal learning-rate time it is
    given by design. At equal epochs the same without control, as it was published. In the settings `law-...` the sum of the
    slopes over log2(lr) and log2(batch), at equal steps: 0 if nothing but the ratio counts.
    """

    metric: str = "score"

    kind: ClassVar[str] = "replicate"
    label: ClassVar[str] = "interaction of task and log2(lr/batch) given learning-rate time"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        setting = cells[0].arm.setting
        if setting in LAW:
            rate = self._slope("log_lr", ("log_batch",))
            size = self._slope("log_batch", ("log_lr",))
            return rate(cells) + size(cells)
        time: tuple[str, ...] = ("log_lr_time", "log_lr_time_squared")
        ratio = self._slope("log_ratio", () if setting in (PUBLISHED, "equal-lr-time") else time)
        first, *others = TWINS if setting == NULL else TASKS
        slopes = {task: ratio([c for c in cells if c.arm["task"] == task]) for task in (first, *others)}
        return slopes[first] - math.fsum(slopes[task] for task in others) / len(others)

    def _slope(self, over: str, given: tuple[str, ...]) -> Callable[[Sequence[Cell]], float]:
        from trialist.engine.effects import slope

        return lambda cells: slope(over, self.metric, given=given)(cells, self.metric)
