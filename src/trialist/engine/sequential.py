"""Looking at a trial before its last seed without fooling oneself.

Two designs. Declared looks (`--looks 3,5,8`): every look uses the same nominal p value, calibrated so that the chance
of a false alarm at any of the looks is the level. Any time (`--looks any`): the anytime-valid t of a right-Haar prior
on the standard deviation and a normal prior on the effect in standard deviations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from scipy import special

from trialist.engine.intervals import FIXED, Array, Level

_PATHS = 500_000
_KEPT = 0.2  # two-sided nominal p values above this never matter for a level of 10 % or less


@dataclass(frozen=True)
class Look:
    """How a trial is looked at: at declared numbers of seeds, or (`looks=None`) whenever one likes."""

    looks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.looks is not None:
            _check(self.looks)

    @property
    def level(self) -> Level:
        return AnytimeLevel() if self.looks is None else GroupSequentialLevel(looks=self.looks)

    @property
    def least(self) -> int:
        """Replicates before which no verdict is possible."""
        return 4 if self.looks is None else self.looks[0]


@dataclass(frozen=True)
class GroupSequentialLevel(Level):
    """Repeated intervals: right at all declared looks together with the stated probability."""

    looks: tuple[int, ...] = (3, 5, 8)

    label: ClassVar[str] = "95 % repeated interval"

    @property
    def design(self) -> str:
        return f", repeated interval for looks at {', '.join(map(str, self.looks))} seeds"

    def nominal(self, alpha: float) -> float:
        return nominal_p(self.looks, 2.0 * alpha) / 2.0


@dataclass(frozen=True)
class AnytimeLevel(Level):
    """Confidence sequence: right at all numbers of seeds together with the stated probability."""

    tau: float = 2.0

    label: ClassVar[str] = "95 % anytime interval"

    @property
    def design(self) -> str:
        return f", anytime-valid, tau {self.tau:g}"

    def critical(self, alpha: float, df: float) -> float:
        return anytime_threshold(df + 1.0, 2.0 * alpha, self.tau)

    def p_value(self, statistic: float, df: float) -> float:
        return 1.0 if statistic <= 0 else min(1.0, 0.5 * math.exp(-log_e_value(statistic, df + 1.0, self.tau)))


@lru_cache(maxsize=1024)
def nominal_p(looks: tuple[int, ...], alpha: float = 0.05) -> float:
    """Two-sided nominal p of one look so that looking at all `looks` (numbers of seeds) errs with probability `alpha`.

    Calibrated on half a million seeded paths of a paired t statistic under no effect; one look needs no correction.
    """
    _check(looks)
    if len(looks) == 1:
        return alpha
    smallest = _smallest_p(looks)
    rank = alpha * _PATHS
    if rank >= len(smallest):
        raise ValueError(f"alpha must be at most {len(smallest) / _PATHS:.2g} for looks {looks}, not {alpha}")
    low = int(rank)
    return float(smallest[low - 1] + (rank - low) * (smallest[low] - smallest[low - 1])) if low else float(smallest[0])


@lru_cache(maxsize=32)
def _smallest_p(looks: tuple[int, ...]) -> Array:
    """The smaller half of the sorted minima over the looks of the two-sided p value, over `_PATHS` null paths."""
    generator = np.random.default_rng(20_250_101)
    minima = []
    for _ in range(10):
        paths = _PATHS // 10
        total, squares, smallest, done = np.zeros(paths), np.zeros(paths), np.ones(paths), 0
        for n in looks:
            step = generator.standard_normal((n - done, paths), dtype=np.float32)
            total += step.sum(axis=0)
            squares += np.einsum("ij,ij->j", step, step)
            done = n
            statistic = np.abs(total) / np.sqrt(np.maximum(squares - total**2 / n, 1e-12) * n / (n - 1.0))
            extreme = np.flatnonzero(statistic > special.stdtrit(n - 1.0, 1.0 - _KEPT / 2))
            p = 2.0 * special.stdtr(n - 1.0, -statistic[extreme])
            smallest[extreme] = np.minimum(smallest[extreme], p)
        minima.append(smallest[smallest < _KEPT])
    return np.sort(np.concatenate(minima))


def log_e_value(statistic: float, n: float, tau: float = 2.0) -> float:
    """Log of the e-value of a t statistic over n replicates; E >= 1 / alpha rejects at any time."""
    nu, k = n - 1.0, 1.0 + n * tau**2
    square = statistic**2
    return -0.5 * math.log(k) + 0.5 * (nu + 1.0) * (math.log1p(square / nu) - math.log1p(square / (k * nu)))


def anytime_threshold(n: float, alpha: float = 0.05, tau: float = 2.0) -> float:
    """The |t| at which n replicates reject at two-sided `alpha` whenever one looks; infinite for few replicates."""
    nu, k = n - 1.0, 1.0 + n * tau**2
    if nu <= 0:
        return math.inf
    c = (math.sqrt(k) / alpha) ** (2.0 / (nu + 1.0))
    return math.inf if c >= k else math.sqrt(nu * (c - 1.0) / (1.0 - c / k))


def level_of(look: Look | None) -> Level:
    return FIXED if look is None else look.level


def _check(looks: tuple[int, ...]) -> None:
    if not looks or list(looks) != sorted(set(looks)) or looks[0] < 3:
        raise ValueError(f"looks must be increasing numbers of seeds from 3 on, such as 3,5,8; not {looks}")
