"""Intervals for the mean of paired differences: over seeds, over items, and over both at once.

Every function takes differences that are already oriented (positive is better) and gives an `Interval`. What has no
variance, or too few replicates, gives an interval without numbers and with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

BCA_FROM = 20
"""Clusters from which an interval over items is bootstrapped; below, the bootstrap is too narrow"""
_RESAMPLES = 9_999
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

    label = "95 % interval"

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
    tails: tuple[Callable[[float], float], Callable[[float], float]] | None = field(default=None, compare=False, repr=False)
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
    """Student's t over differences (n,). `magnitude`: size of the values they come from, to tell rounding from spread."""
    d = np.asarray(differences, dtype=np.float64)
    n, method = len(d), f"paired t over {unit}"
    if n < 2:
        return undefined(
            f"{n} {_one(unit, n)}: no variance, so no interval", n, method, float(d[0]) if n else None, level
        )
    if not np.isfinite(d).all():
        return undefined("a difference is not finite", n, method, level=level)
    estimate, spread = float(d.mean()), float(d.std(ddof=1))
    if reason := _no_spread(d, spread, magnitude, unit):
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
    if reason := _no_spread(rows, math.sqrt(v_s * seeds), magnitude, "seeds"):
        return undefined(reason, seeds, method, estimate, level)
    df = v**2 / (v_s**2 / (seeds - 1) + v_i**2 / (columns - 1))
    df = min(max(df, seeds - 1.0), float(seeds * columns))
    sources = (max(v_s - v_r, 0.0) * seeds, max(v_i - v_r, 0.0) * columns, mean_square)
    parts = [(math.sqrt(v_s), seeds - 1.0), (math.sqrt(v), df)]
    interval = from_t(estimate, parts, seeds, method, level, sources, (seeds, columns))
    return replace(interval, method=f"{method}, df {interval.df:.3g}") if interval.defined else interval


def item_interval(
    differences: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    magnitude: float | None = None,
    level: Level = FIXED,
) -> Interval:
    """Interval over items (N,) of one given model; items of one cluster count together.

    Cluster-robust t; from 20 clusters on each bound is the outer one of that and of BCa over clusters, because at 20 to
    50 clusters BCa alone errs on 3 to 6 % of the side that should hold 2.5 % (docs/statistics.md).
    """
    d = np.asarray(differences, dtype=np.float64)
    labels = np.arange(len(d)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(labels).astype(np.float64)
    n, unit = len(sizes), "items" if clusters is None else "clusters of items"
    method = f"cluster-robust t over {unit}"
    if n < 2:
        return undefined(f"{n} {_one(unit, n)}: no variance, so no interval", n, method, level=level)
    if not np.isfinite(d).all():
        return undefined("a difference is not finite", n, method, level=level)
    totals, estimate = np.bincount(labels, weights=d), float(d.mean())
    deviations = totals - sizes * estimate
    error = math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / len(d)
    if reason := _no_spread(d, error * math.sqrt(n), magnitude, unit):
        return undefined(reason, n, method, estimate, level)
    robust = from_t(estimate, [(error, n - 1.0)], n, f"{method}, df {n - 1}", level)
    if n < BCA_FROM:
        return robust
    return _bca_of_mean(estimate, deviations, sizes, robust, unit)


def _bca_of_mean(estimate: float, deviations: Array, sizes: Array, robust: Interval, unit: str) -> Interval:
    """BCa interval of a mean over clusters. Clusters are sorted first, so that their order cannot matter."""
    order = np.lexsort((sizes, deviations))
    deviations, sizes = deviations[order], sizes[order]
    n = len(sizes)
    generator = np.random.default_rng(n)
    resamples = np.empty(_RESAMPLES)
    block = max(1, 4_000_000 // n)
    for start in range(0, _RESAMPLES, block):
        drawn = generator.integers(0, n, size=(min(block, _RESAMPLES - start), n))
        resamples[start : start + len(drawn)] = deviations[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    left_out = (deviations.sum() - deviations) / (sizes.sum() - sizes)
    return _outer(bca(estimate, estimate + resamples, estimate + left_out, n, "BCa", robust), robust, unit)


def _outer(first: Interval, second: Interval, unit: str) -> Interval:
    """Of two intervals around one estimate, each bound that lies further out."""
    if first is second:
        return second
    assert first.low is not None and first.high is not None and first.low90 is not None and first.high90 is not None
    assert second.low is not None and second.high is not None and second.low90 is not None and second.high90 is not None

    def p_above(bound: float) -> float:
        return max(first.p_above(bound), second.p_above(bound))

    def p_below(bound: float) -> float:
        return max(first.p_below(bound), second.p_below(bound))

    return replace(
        second,
        low=min(first.low, second.low),
        high=max(first.high, second.high),
        low90=min(first.low90, second.low90),
        high90=max(first.high90, second.high90),
        method=f"wider of cluster-robust t and BCa over {second.n} {unit}",
        p_worse=p_below(0.0),
        p_better=p_above(0.0),
        tails=(p_above, p_below),
    )


def bca(estimate: float, resamples: Array, left_out: Array, n: int, method: str, fallback: Interval) -> Interval:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) from resampled and leave-one-out values.

    Level, df and standard error are those of `fallback`, which is returned where the bootstrap is degenerate.
    """
    level = fallback.level
    ordered = np.sort(resamples)

    def share_below(value: float) -> float:
        inside = np.searchsorted(ordered, value, "left") + np.searchsorted(ordered, value, "right")
        return float(np.clip(inside / 2 / len(ordered), 0.5 / len(ordered), 1 - 0.5 / len(ordered)))

    centred = left_out.mean() - left_out
    cubes, squares = float((centred**3).sum()), float((centred**2).sum())
    if squares == 0.0 or not ordered[0] < estimate < ordered[-1]:
        return fallback
    bias = float(special.ndtri(share_below(estimate)))
    acceleration = cubes / (6.0 * squares**1.5)

    def quantile(tail: float) -> float:
        z = bias + float(special.ndtri(tail))
        adjusted = float(special.ndtr(bias + z / (1.0 - acceleration * z)))
        return float(np.quantile(ordered, adjusted))

    def p_above(bound: float) -> float:
        z = float(special.ndtri(share_below(bound))) - bias
        return float(special.ndtr(z / (1.0 + acceleration * z) - bias))

    tail, tail90 = level.nominal(level.alpha), level.nominal(level.equivalence)
    return Interval(
        estimate=estimate,
        low=quantile(tail),
        high=quantile(1.0 - tail),
        low90=quantile(tail90),
        high90=quantile(1.0 - tail90),
        df=fallback.df,
        n=n,
        method=method,
        standard_error=fallback.standard_error,
        p_worse=1.0 - p_above(0.0),
        p_better=p_above(0.0),
        level=level,
        tails=(p_above, lambda bound: 1.0 - p_above(bound)),
    )


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


def _no_spread(d: Array, spread: float, magnitude: float | None, unit: str) -> str:
    if not d.any():
        return f"all {len(d)} differences are exactly 0"
    if spread <= _ROUNDING * max(float(np.abs(d).max()), magnitude or 0.0):
        return f"the differences do not vary over {unit}, so there is no variance and no interval"
    return ""


def _one(unit: str, n: int) -> str:
    return unit.replace("seeds", "seed").replace("clusters", "cluster").replace("items", "item") if n == 1 else unit
