"""One number from a trade-off curve (quality against size, accuracy against tokens), in a range fixed beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator


@dataclass(frozen=True)
class Reading:
    """What was read off a curve; `value` is None where the curve does not tell, and `reason` says why."""

    value: float | None
    reason: str | None = None

    def entry(self, name: str) -> dict[str, dict[str, float] | dict[str, str]]:
        """Keyword arguments of `Outcome`: the value under `metrics`, or the reason under `undefined`."""
        if self.value is None:
            return {"metrics": {}, "undefined": {name: self.reason or "undefined"}}
        return {"metrics": {name: self.value}, "undefined": {}}


def value_at(points: Iterable[tuple[float, float]], x: float) -> Reading:
    """Height of the curve at x, by monotone (PCHIP) interpolation between the points (x, y)."""
    curve = _curve(points)
    if isinstance(curve, str):
        return Reading(None, curve)
    if reason := _uncovered(curve, x, x):
        return Reading(None, reason)
    return Reading(float(curve(x)))


def area(points: Iterable[tuple[float, float]], x_range: tuple[float, float]) -> Reading:
    """Mean height of the curve over `x_range`: the area under its monotone interpolation divided by the width."""
    low, high = x_range
    if not low < high:
        raise ValueError(f"x_range must be (low, high) with low < high, not {x_range}")
    curve = _curve(points)
    if isinstance(curve, str):
        return Reading(None, curve)
    if reason := _uncovered(curve, low, high):
        return Reading(None, reason)
    return Reading(float(curve.integrate(low, high)) / (high - low))


def _curve(points: Iterable[tuple[float, float]]) -> PchipInterpolator | str:
    """The interpolated curve, or why there is none. Points of equal x count as their mean."""
    data = np.array(sorted((float(x), float(y)) for x, y in points), dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(data).all():
        return "a point of the curve is not finite"
    x, where = np.unique(data[:, 0], return_inverse=True)
    if len(x) < 2:
        return f"the curve has {len(x)} point{'s' * (len(x) != 1)}; at least 2 are needed"
    return PchipInterpolator(x, np.bincount(where, weights=data[:, 1]) / np.bincount(where))


def _uncovered(curve: PchipInterpolator, low: float, high: float) -> str | None:
    first, last = float(curve.x[0]), float(curve.x[-1])
    if first <= low and high <= last:
        return None
    wanted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"the curve covers {first:g} to {last:g} and not {wanted}"
