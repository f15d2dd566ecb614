"""What the cells of the learning-rate and batch study say, one number a seed: slopes over the ratio, and the best of a grid.

All of it is fitted on the scale of analysis of the endpoint. There a task that is harder than another lies lower and is as
steep; on the scale of a share it would be flatter too, and a difference of slopes would show which task is harder.

A cell is an arm with the options `task`, `favoured` (whether the claim says that a high ratio favours this task), `rules` and
`steps`; with 0 steps it is the model before fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trialist.trials._lr_batch_grid import RULES

if TYPE_CHECKING:
    from trialist.engine.effects import Cell

TIME = ("log_lr_time", "log_lr_time_squared")
EDGE, LEAST = 0.1, 0.5
"""Share of its reach that counts as a task's floor, and as its ceiling; least share of its cells that must lie in between"""


@dataclass(frozen=True)
class RatioEffect:
    """Slope over log2(lr / batch), given learning-rate time, of the favoured task minus the mean of the others.

    At equal learning-rate time it is given by design, at equal epochs it cannot be given. Undefined where a task lies at a
    floor or at a ceiling in most cells.
    """

    rules: tuple[str, ...] = RULES
    given: tuple[str, ...] = TIME
    where: str = " given learning-rate time"
    said: bool = False

    kind: ClassVar[str] = "replicate"
    per: ClassVar[str] = "doubling"

    @property
    def label(self) -> str:
        return f"interaction of task and log2(lr/batch){self.where}"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        return favoured_minus_others(
            {
                task: _slope("log_ratio", self.given, trained(found, self.rules), endpoint)
                for task, found in within_reach(cells, endpoint).items()
            },
            cells,
        )


CONTROLLED = RatioEffect()
PUBLISHED = RatioEffect(("equal-epochs",), (), " at equal epochs, without control", said=True)
EQUAL_STEPS = RatioEffect(("equal-steps",), TIME, " at equal steps, given learning-rate time")
EQUAL_TIME = RatioEffect(("equal-lr-time",), (), " at equal learning-rate time")


@dataclass(frozen=True)
class TakenAway:
    """How much of the published effect was learning-rate time: what is found without control minus what is found with it."""

    said: ClassVar[bool] = True
    kind: ClassVar[str] = "replicate"
    per: ClassVar[str] = "doubling"
    label: ClassVar[str] = "part of the effect at equal epochs that the control takes away"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        return PUBLISHED(cells, endpoint) - CONTROLLED(cells, endpoint)


@dataclass(frozen=True)
class RatioLaw:
    """Slopes over log2(lr) and log2(batch) of a task added up, at equal steps: 0 if nothing but the ratio counts."""

    task: str

    kind: ClassVar[str] = "replicate"
    per: ClassVar[str] = "doubling"

    @property
    def label(self) -> str:
        return f"slope over log2(lr) plus slope over log2(batch) of {self.task} (0 if only the ratio counts)"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        chosen = trained(within_reach(cells, endpoint)[self.task], ("equal-steps",))
        rate, batch = (
            _slope("log_lr", ("log_batch",), chosen, endpoint),
            _slope("log_batch", ("log_lr",), chosen, endpoint),
        )
        return rate + batch


@dataclass(frozen=True)
class BestRatio:
    """log2(lr / batch) of the cell that validation chooses, of the favoured task minus the mean of the others."""

    rule: str

    kind: ClassVar[str] = "replicate"
    unit: ClassVar[str] = "doublings"

    @property
    def label(self) -> str:
        return f"distance of the best ratio from that of the other tasks, best by validation, {self.rule}"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        best = {task: chosen(found, self.rule).value("log_ratio") for task, found in by_task(cells).items()}
        return favoured_minus_others(best, cells)


@dataclass(frozen=True)
class BestScore:
    """The endpoint of a task on test rows, in the cell of a rule's fifteen that validation chooses."""

    task: str
    rule: str

    kind: ClassVar[str] = "replicate"

    @property
    def label(self) -> str:
        return f"{self.task} at the cell that validation chooses, {self.rule}"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        return chosen(by_task(cells)[self.task], self.rule).value(endpoint)


@dataclass(frozen=True)
class InReach:
    """Share of a task's cells that lie at neither its floor nor its ceiling."""

    task: str

    kind: ClassVar[str] = "replicate"
    unit: ClassVar[str] = "share of cells"

    @property
    def label(self) -> str:
        return f"cells of {self.task} at neither its floor nor its ceiling"

    def __call__(self, cells: Sequence[Cell], endpoint: str) -> float:
        return share_in_reach(by_task(cells)[self.task], endpoint)


def readings(tasks: Sequence[str]) -> tuple[object, ...]:
    """What is read off the cells beside the effect that decides."""
    return (
        PUBLISHED, TakenAway(), EQUAL_STEPS, EQUAL_TIME, *(RatioLaw(task) for task in tasks),
        *(BestRatio(rule) for rule in RULES), *(BestScore(task, rule) for rule in RULES for task in tasks),
        *(InReach(task) for task in tasks),
    )  # fmt: skip


def by_task(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.arm["task"], []).append(cell)
    return found


def trained(cells: Sequence[Cell], rules: Sequence[str] = RULES) -> list[Cell]:
    """The cells of any of these rules, without the model before."""
    return [cell for cell in cells if cell.arm["steps"] and set(rules) & set(cell.arm["rules"].split())]


def within_reach(cells: Sequence[Cell], endpoint: str) -> dict[str, list[Cell]]:
    """The cells by task. Raises Undefined with the task that lies at a floor or a ceiling in most of them."""
    from trialist.engine.intervals import Undefined

    found = by_task(cells)
    for task, own in found.items():
        share = share_in_reach(own, endpoint)
        if share < LEAST:
            raise Undefined(
                f"{endpoint} of {task} with seed {own[0].seed} lies at a floor or a ceiling, where slopes say little, in "
                f"{1 - share:.0%} of the cells; at most {1 - LEAST:.0%} are allowed"
            )
    return found


def share_in_reach(cells: Sequence[Cell], endpoint: str) -> float:
    """Share of a task's cells that lie at neither its floor nor its ceiling.

    At the floor a cell has come less than a tenth of the way from the model before to the best cell; at the ceiling it lies
    below the best cell by less than a tenth of the distance between the best and the worst.
    """
    before = next(cell.value(endpoint) for cell in cells if not cell.arm["steps"])
    values = [cell.value(endpoint) for cell in trained(cells)]
    best, worst = max(values), min(values)
    low, high = before + EDGE * (best - before), best - EDGE * (best - worst)
    return sum(low <= value <= high for value in values) / len(values) if best > before else 0.0


def chosen(cells: Sequence[Cell], rule: str) -> Cell:
    """The cell of a rule with the best score on validation rows; one that diverged has none."""
    from trialist.engine.intervals import Undefined

    known = [cell for cell in trained(cells, (rule,)) if "validation_score" in cell.outcome.metrics]
    if not known:
        raise Undefined(f"no cell of {cells[0].arm['task']}, {rule}, has a validation score")
    return max(known, key=lambda cell: cell.value("validation_score"))


def favoured_minus_others(values: dict[str, float], cells: Sequence[Cell]) -> float:
    favoured = {cell.arm["task"] for cell in cells if cell.arm["favoured"]}
    mine = [value for task, value in values.items() if task in favoured]
    others = [value for task, value in values.items() if task not in favoured]
    return math.fsum(mine) / len(mine) - math.fsum(others) / len(others)


def _slope(over: str, given: tuple[str, ...], cells: Sequence[Cell], endpoint: str) -> float:
    from trialist.engine.effects import slope

    return slope(over, given=given)(cells, endpoint)
