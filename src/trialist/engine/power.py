"""How large an effect a trial can see, and how many more seeds or items would decide an open one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
from scipy import optimize, special

from trialist.engine.intervals import Array, Interval, from_t

MOST_SEEDS = 1_000
MOST_ITEMS = 1_000_000


def power_at(effect: float, n: int, alpha: float = 0.025) -> float:
    """Chance that a paired t over n replicates excludes 0, for an effect in standard deviations of the difference."""
    critical, shift, spread = float(special.stdtrit(n - 1.0, 1.0 - alpha)), effect * math.sqrt(n), _spreads(n)
    return float((special.ndtr(shift - critical * spread) + special.ndtr(-shift - critical * spread)).mean())


@lru_cache(maxsize=64)
def _spreads(n: int) -> Array:
    """Equally likely values of the estimated over the true standard deviation (noncentral t as a mean of normals)."""
    probability = (np.arange(4_000) + 0.5) / 4_000
    return np.sqrt(2.0 * special.gammaincinv((n - 1) / 2.0, probability) / (n - 1))


@lru_cache(maxsize=1024)
def detectable_effect(n: int, power: float = 0.8, alpha: float = 0.025) -> float:
    """Smallest effect, in standard deviations of the paired difference, that n replicates show with this power.

    Raises ValueError below 2 replicates: one has no variance.
    """
    if n < 2:
        raise ValueError(f"a detectable effect needs at least 2 replicates, not {n}")
    if not 0 < power < 1:
        raise ValueError(f"power must lie in (0, 1), not {power}")
    return float(optimize.brentq(lambda effect: power_at(effect, n, alpha) - power, 1e-6, 200.0))


def seeds_needed(effect: float, power: float = 0.8, alpha: float = 0.025) -> int:
    """Least number of replicates (3 or more) that shows an effect given in standard deviations of the difference."""
    if not effect > 0:
        raise ValueError(f"effect must be > 0, not {effect}")
    n = 3
    while detectable_effect(n, power, alpha) > effect:
        n += max(1, n // 20)
        if n > MOST_ITEMS:
            raise ValueError(f"an effect of {effect:g} standard deviations needs more than {MOST_ITEMS} replicates")
    while n > 3 and detectable_effect(n - 1, power, alpha) <= effect:
        n -= 1
    return n


def project(interval: Interval, seeds: int | None = None, items: int | None = None) -> Interval:
    """The interval to expect with other numbers of seeds or items, if estimate and variances stay as they are."""
    if interval.estimate is None or not interval.standard_error or not interval.defined:
        return interval
    if interval.sources is not None and interval.shape is not None:
        s, i = seeds or interval.shape[0], items or interval.shape[1]
        from_seeds, from_items, rest = interval.sources
        v_s, v_i = (from_seeds + rest / i) / s, (from_items + rest / s) / i
        v = max(v_s + v_i - rest / (s * i), v_s, v_i)
        df = min(max(v**2 / (v_s**2 / (s - 1) + v_i**2 / (i - 1)), s - 1.0), float(s * i))
        parts = [(math.sqrt(v_s), s - 1.0), (math.sqrt(v), df)]
        return from_t(interval.estimate, parts, s, interval.method, interval.level, interval.sources, (s, i))
    n = seeds or items or interval.n
    error = interval.standard_error * math.sqrt(interval.n / n)
    return replace(
        from_t(interval.estimate, [(error, n - 1.0)], n, interval.method, interval.level), reason=interval.reason
    )


def least_number(decides: Callable[[int], bool], now: int, most: int) -> int | None:
    """Smallest n in (now, most] at which `decides(n)` holds (and then goes on to hold); None if there is none."""
    if now >= most:
        return None
    low, step = now, 1
    while not decides(min(low + step, most)):
        low += step
        if low >= most:
            return None
        step *= 2
    high = min(low + step, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high
