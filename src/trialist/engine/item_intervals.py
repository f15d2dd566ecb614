"""Intervals over the items of one given model: cluster-robust t, and the bias-corrected accelerated bootstrap (BCa)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from trialist.engine.intervals import FIXED, Array, Interval, Level, from_t, no_spread, singular, undefined

BCA_FROM = 20
"""Clusters from which an interval over items is bootstrapped; below, the bootstrap is too narrow"""
_RESAMPLES = 9_999


def item_interval(
    differences: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    magnitude: float | None = None,
    level: Level = FIXED,
) -> Interval:
    """Interval over items (N,) of one given model; items of one cluster count together.

    Cluster-robust t; from 20 clusters on each bound is the outer one of that and of BCa over clusters, because at 20 to
    50 clusters BCa alone errs in 3 to 5.5 % on a side that should hold 2.5 % (docs/statistics.md).
    """
    d = np.asarray(differences, dtype=np.float64)
    labels = np.arange(len(d)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sizes = np.bincount(labels).astype(np.float64)
    n, unit = len(sizes), "items" if clusters is None else "clusters of items"
    method = f"cluster-robust t over {unit}"
    if n < 2:
        return undefined(f"{n} {singular(unit, n)}: no variance, so no interval", n, method, level=level)
    if not np.isfinite(d).all():
        return undefined("a difference is not finite", n, method, level=level)
    totals, estimate = np.bincount(labels, weights=d), float(d.mean())
    deviations = totals - sizes * estimate
    error = math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / len(d)
    if reason := no_spread(d, error * math.sqrt(n), magnitude, unit):
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
    low, low90 = min(_known(first.low), _known(second.low)), min(_known(first.low90), _known(second.low90))
    high, high90 = max(_known(first.high), _known(second.high)), max(_known(first.high90), _known(second.high90))

    def p_above(bound: float) -> float:
        return max(first.p_above(bound), second.p_above(bound))

    def p_below(bound: float) -> float:
        return max(first.p_below(bound), second.p_below(bound))

    return replace(
        second,
        low=low,
        high=high,
        low90=low90,
        high90=high90,
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


def _known(bound: float | None) -> float:
    assert bound is not None
    return bound
