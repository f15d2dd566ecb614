"""The grid of the learning-rate and batch study: its cells, and three rules for how long a cell trains.

One identity rules all of it. With l, b, s the logarithms of peak learning rate, batch and steps, learning-rate time is
t = l + s and the examples seen are n = b + s, so the ratio is r = l - b = t - n. At a fixed number of epochs n does not vary
and r is t: a ratio found there cannot be told from training harder. Given t, a change of r is a change of -n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

RULES = ("equal-epochs", "equal-steps", "equal-lr-time")
LEARNING_RATES, SPREAD = 5, 4
"""Learning rates of the grid, and how many times larger each of its three batches is than the one before"""
PASSES = 2
"""Most passes of a cell over its rows: beyond them more examples would be more repetition"""


@dataclass(frozen=True)
class Point:
    """A place of the grid; with 0 steps it is the model before fine-tuning."""

    learning_rate: float
    batch: int
    steps: int

    @property
    def rows(self) -> int:
        return self.batch * self.steps


BEFORE = Point(0.0, 0, 0)


def points(rule: str, middle: Point, factor: float) -> Iterator[Point]:
    """Five learning rates, each `factor` times the one before, by three batches.

    middle: the cell in the middle, which is the same under every rule. Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; one of {', '.join(RULES)}")
    half = LEARNING_RATES // 2
    for place in range(-half, half + 1):
        for batch in (middle.batch // SPREAD, middle.batch, middle.batch * SPREAD):
            steps = {
                "equal-epochs": middle.rows / batch,
                "equal-steps": middle.steps,
                "equal-lr-time": middle.steps * factor**-place,
            }[rule]
            yield Point(middle.learning_rate * factor**place, batch, max(1, round(steps)))


def grid(middle: Point, factor: float) -> dict[Point, tuple[str, ...]]:
    """Every place, and the rules under which it is one."""
    rules = {rule: set(points(rule, middle, factor)) for rule in RULES}
    together = dict.fromkeys(point for rule in RULES for point in points(rule, middle, factor))
    return {point: tuple(rule for rule in RULES if point in rules[rule]) for point in together}
