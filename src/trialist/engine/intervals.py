"""Intervals for the mean of paired differences: over seeds, over items, and over both at once.

Every function takes differences that are already oriented (positive is better) and gives an `Interval`. What has no
variance, or too few replicates, gives an interval without numbers and with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

_ROUNDING = 1e-12  # differences whose spread is below this share of the values differ by rounding alone


class Undefined(ValueError):
    """A quantity has no value; the message is the reason that the report prints."""


@dataclass(frozen=True)
class Level:
    """The error that each bound of an interval may have; 2.5 % on each side is the usual 95 % interval."""

    alpha: float = 0.025
    """One-sided error of `low` and of `high`"""
    equivalence: float = 0.05
    """One-sided error of `low90` and of `high90`"""

    label: ClassVar[str] = "95 % interval"

    @property
    def design(self) -> str:
        """What the method of an interval adds about looking early; empty where n was fixed beforehand."""
        return ""

    def nominal(self, alpha: float) -> float:
        """The one-sided p value below which a single look errs with probability `alpha` over the whole design."""
        return alpha

    def critical(self, alpha: float, df: float) -> float:
        """The value of |t| that bounds an interval of one-sided error `alpha`."""
        return float(special.stdtrit(df, 1.0 - self.nominal(alpha)))

    def p_value(self, statistic: float, df: float) -> float:
        """One-sided p value of a t statistic; it is compared with `nominal(alpha)`."""
        return float(special.stdtr(df, -statistic))


FIXED = Level()


@dataclass(frozen=True)
class Interval:
    """Mean difference with its bounds. All numbers are None when undefined, and `reason` says why."""

    estimate: float | None
    low: float | None
    high: float | None
    low90: float | None
    high90: float | None
    df: float | None
    n: int
    """Distinct replicates"""
    method: str
    standard_error: float | None = None
    p_worse: float | None = None
    """One-sided p value of `effect < 0`"""
    p_better: float | None = None
    """One-sided p value of `effect > 0`"""
    reason: str | None = None
    sources: tuple[float, float, float] | None = None
    """Variance of one difference due to seeds, items, and what is left (crossed designs)"""
    shape: tuple[int, int] | None = None
    """Seeds and items of a crossed design"""
    level: Level = FIXED
    tails: tuple[Callable[[float], float], Callable[[float], float]] | None = field(
        default=None, compare=False, repr=False
    )
    """One-sided p values of `effect > bound` and `effect < bound`, for intervals that are not made of t statistics"""
    parts: tuple[tuple[float, float], ...] = ()
    """(standard error, df) of the t intervals of which this is the widest"""

    @property
    def defined(self) -> bool:
        return self.low is not None

    def p_above(self, bound: float) -> float:
        """One-sided p value of `effect > bound`; 1 when undefined."""
        if self.estimate is None or not self.defined:
            return 1.0
        if self.tails is not None:
            return self.tails[0](bound)
        return max(self.level.p_value((self.estimate - bound) / error, df) for error, df in self.parts)

    def p_below(self, bound: float) -> float:
        """One-sided p value of `effect < bound`; 1 when undefined."""
        if self.estimate is None or not self.defined:
            return 1.0
        if self.tails is not None:
            return self.tails[1](bound)
        return max(self.level.p_value((bound - self.estimate) / error, df) for error, df in self.parts)

    def lies_above_zero(self) -> bool:
        return self.low is not None and self.low > 0 and (self.p_better is None or self._significant(self.p_better))

    def lies_below_zero(self) -> bool:
        return self.high is not None and self.high < 0 and (self.p_worse is None or self._significant(self.p_worse))

    def _significant(self, p: float) -> bool:
        return p <= self.level.nominal(self.level.alpha) * (1 + 1e-9)


def undefined(reason: str, n: int, method: str, estimate: float | None = None, level: Level = FIXED) -> Interval:
    """An interval without numbers."""
    return Interval(estimate, None, None, None, None, None, n, method, reason=reason, level=level)


def to_scale(values: ArrayLike, scale: str, name: str = "value") -> Array:
    """`identity`, `log` or `logit` of the values. Raises Undefined where the scale has no value."""
    raw = np.asarray(values, dtype=np.float64)
    if scale == "identity":
        return raw
    if scale == "log":
        if (raw <= 0).any():
            raise Undefined(f"{name} is {raw.min():g} in one replicate and has no logarithm; use scale='identity'")
        return np.log(raw)
    if scale == "logit":
        if ((raw <= 0) | (raw >= 1)).any():
            worst = raw[(raw <= 0) | (raw >= 1)][0]
            raise Undefined(f"{name} is {worst:g} in one replicate and has no logit; use scale='identity'")
        return np.log(raw / (1.0 - raw))
    raise ValueError(f"scale {scale!r} is unknown; one of identity, log, logit")


def paired_t(control: ArrayLike, treatment: ArrayLike, *, level: Level = FIXED, unit: str = "seeds") -> Interval:
    """Student's t over pairs: treatment minus control, one value per replicate and arm."""
    before, after = np.asarray(control, dtype=np.float64), np.asarray(treatment, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"paired_t needs two lists of equal length, not {before.shape} and {after.shape}")
    magnitude = float(max(np.abs(before).max(initial=0.0), np.abs(after).max(initial=0.0)))
    return t_interval(after - before, magnitude=magnitude, level=level, unit=unit)


def t_interval(
    differences: ArrayLike, *, magnitude: float | None = None, level: Level = FIXED, unit: str = "seeds"
) -> Interval:
    """Student's t over differences (n,). `magnitude`: size of their terms, to tell rounding from spread."""
    d = np.asarray(differences, dtype=np.float64)
    n, method = len(d), f"paired t over {unit}"
    if n < 2:
        return undefined(
            f"{n} {singular(unit, n)}: no variance, so no interval", n, method, float(d[0]) if n else None, level
        )
    if not np.isfinite(d).all():
        return undefined("a difference is not finite", n, method, level=level)
    estimate, spread = float(d.mean()), float(d.std(ddof=1))
    if reason := no_spread(d, spread, magnitude, unit):
        return undefined(reason, n, method, estimate, level)
    return from_t(estimate, [(spread / math.sqrt(n), n - 1.0)], n, f"{method}, df {n - 1}", level)


def from_t(
    estimate: float,
    parts: Sequence[tuple[float, float]],
    n: int,
    method: str,
    level: Level = FIXED,
    sources: tuple[float, float, float] | None = None,
    shape: tuple[int, int] | None = None,
) -> Interval:
    """The widest of several t intervals around one estimate; `parts` are pairs (standard error, df)."""
    half = [(level.critical(level.alpha, df) * error, error, df) for error, df in parts]
    width, error, df = max(half)
    width90 = max(level.critical(level.equivalence, df) * error for error, df in parts)
    if not math.isfinite(width):
        return undefined(f"{n} replicates: {level.label} is infinite; it needs at least 4", n, method, estimate, level)
    if not math.isfinite(width90):
        width90 = width
    return Interval(
        estimate=estimate,
        low=estimate - width,
        high=estimate + width,
        low90=estimate - width90,
        high90=estimate + width90,
        df=df,
        n=n,
        method=method,
        standard_error=error,
        p_worse=max(level.p_value(-estimate / error, df) for error, df in parts),
        p_better=max(level.p_value(estimate / error, df) for error, df in parts),
        sources=sources,
        shape=shape,
        level=level,
        parts=tuple(parts),
    )


def crossed_t(
    differences: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    magnitude: float | None = None,
    level: Level = FIXED,
) -> Interval:
    """Interval over seeds and items at once: the wider of the t over seeds and the crossed one.

    differences: (S, N), seed by item; all seeds share the items. clusters: cluster of each item (N,).
    Crossed: v = max(v_s + v_i - v_r, v_s, v_i), df by Satterthwaite within [S - 1, S N].
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 2:
        raise ValueError(f"crossed_t needs a matrix of seeds by items, not shape {d.shape}")
    seeds, method = len(d), "crossed t over seeds and items"
    if not np.isfinite(d).all():
        return undefined("a difference is not finite", seeds, method, level=level)
    by_seed = t_interval(d.mean(axis=1), magnitude=magnitude, level=level)
    if clusters is not None:
        d = _by_cluster(d, clusters)
    columns = d.shape[1]
    if seeds < 2 or columns < 2:
        return by_seed
    estimate, rows, cols = float(d.mean()), d.mean(axis=1), d.mean(axis=0)
    residual = d - rows[:, None] - cols[None, :] + estimate
    mean_square = float((residual**2).sum()) / ((seeds - 1) * (columns - 1))
    v_s, v_i = float(rows.var(ddof=1)) / seeds, float(cols.var(ddof=1)) / columns
    v_r = mean_square / (seeds * columns)
    v = max(v_s + v_i - v_r, v_s, v_i)
    if reason := no_spread(rows, math.sqrt(v_s * seeds), magnitude, "seeds"):
        return undefined(reason, seeds, method, estimate, level)
    df = v**2 / (v_s**2 / (seeds - 1) + v_i**2 / (columns - 1))
    df = min(max(df, seeds - 1.0), float(seeds * columns))
    sources = (max(v_s - v_r, 0.0) * seeds, max(v_i - v_r, 0.0) * columns, mean_square)
    parts = [(math.sqrt(v_s), seeds - 1.0), (math.sqrt(v), df)]
    interval = from_t(estimate, parts, seeds, method, level, sources, (seeds, columns))
    return replace(interval, method=f"{method}, df {interval.df:.3g}") if interval.defined else interval


def holm_adjusted(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return tuple(adjusted)


def holm(p_values: Sequence[float], alpha: float, level: Level = FIXED) -> tuple[bool, ...]:
    """Which hypotheses Holm's procedure rejects at family error `alpha`."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level.nominal(alpha / (len(p_values) - rank)):
            break
        rejected[index] = True
    return tuple(rejected)


def _by_cluster(d: Array, clusters: Sequence[str]) -> Array:
    """(S, N) -> (S, G): per seed and cluster a value whose mean over clusters is the seed's mean over items."""
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(labels).astype(np.float64)
    means = d.mean(axis=1, keepdims=True)
    totals = np.stack([np.bincount(labels, weights=row) for row in d])
    return means + (totals - sizes * means) * (len(sizes) / d.shape[1])


def no_spread(d: Array, spread: float, magnitude: float | None, unit: str) -> str:
    if not d.any():
        return f"all {len(d)} differences are exactly 0"
    if spread <= _ROUNDING * max(float(np.abs(d).max()), magnitude or 0.0):
        return f"the differences do not vary over {unit}, so there is no variance and no interval"
    return ""


def singular(unit: str, n: int) -> str:
    return unit.replace("seeds", "seed").replace("clusters", "cluster").replace("items", "item") if n == 1 else unit
