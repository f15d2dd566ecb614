"""What a technique saves, and what its gain is worth in budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trialist.engine.contract import COST_UNITS, Endpoint, Items, Replicate, Saving
from trialist.engine.contrasts import Contrast
from trialist.engine.intervals import Array, Interval, Level, from_t, t_interval, undefined
from trialist.engine.records import RunRecord
from trialist.engine.table import Table, items_differ

COUNTED = tuple(unit for unit in COST_UNITS if unit != "seconds")
"""Costs that are counted and not timed: where all runs agree on the saving, it is known and needs no interval"""
DESIGNED = ("tokens", "steps", "flops", "bytes", "bits")
"""Counted costs that a single run of a given model settles (they do not depend on what it generates)"""
MEASURED = ("wall_seconds", "cpu_seconds", "peak_bytes")


def saving_contrast(
    table: Table, setting: str, control: str, treatment: str, saving: Saving, replicate: Replicate, level: Level
) -> Contrast:
    """1 - treatment / control of a cost or metric, paired by seed; over items where the runs report it per item."""
    endpoint = Endpoint(saving.name, unit="share saved", better="higher", margin=saving.least)
    blank = Contrast(endpoint, control, setting, undefined("no seed has finished in both arms", 0, "none", level=level))
    pairs = [
        (table.runs[setting, control, seed], table.runs[setting, treatment, seed])
        for seed in table.seeds(setting, control, treatment)
        if not any(table.diverged(setting, arm, seed) for arm in (control, treatment))
    ]
    if not pairs:
        return blank
    if replicate == "item":
        lists = [(_items(before, saving.name), _items(after, saving.name)) for before, after in pairs]
        known = [(before, after) for before, after in lists if before is not None and after is not None]
        if len(known) == len(pairs) and not any(items_differ(before, after) for before, after in known):
            return replace(blank, interval=_over_items(known, level), items=len(known[0][0].ids))
    values = [(spent(before, saving.name), spent(after, saving.name)) for before, after in pairs]
    if any(before is None or after is None or not before > 0 for before, after in values):
        return replace(
            blank, interval=undefined(f"not every run reports {saving.name}", len(pairs), "none", level=level)
        )
    table_of_costs = np.array(values, dtype=np.float64)
    share = 1.0 - table_of_costs[:, 1] / table_of_costs[:, 0]
    means = table_of_costs.mean(axis=0)
    enough = len(share) >= 3 or (replicate == "item" and saving.name in DESIGNED)
    if saving.name in COUNTED and enough and np.ptp(share) <= 1e-12:
        interval = _counted(float(share[0]), len(share), level)
    else:
        interval = t_interval(share, magnitude=1.0, level=level)
    return replace(blank, interval=interval, control_mean=float(means[0]), treatment_mean=float(means[1]))


def spent(run: RunRecord, name: str) -> float | None:
    """A cost of a run, or a metric of its outcome."""
    cost = _cost(run, name)
    if cost is None and run.outcome is not None:
        cost = run.outcome.metrics.get(name)
    return cost if cost is not None and math.isfinite(cost) else None


def _cost(run: RunRecord, name: str) -> float | None:
    """`RunRecord.cost` without the copy of all costs, which a verdict over thousands of runs would feel."""
    if name in run.measured:
        return run.measured[name]
    return getattr(run.outcome.cost, name) if run.outcome and name in COST_UNITS else None


def cost_ratio(table: Table, setting: str, control: str, treatment: str, price: str = "") -> dict[str, float]:
    """Cost unit -> treatment over control, mean over seeds; units that both arms report in every pair.

    price: a metric of the outcomes that counts as a cost as well.
    """
    pairs = [
        (table.runs[setting, control, seed], table.runs[setting, treatment, seed])
        for seed in table.seeds(setting, control, treatment)
        if not any(table.diverged(setting, arm, seed) for arm in (control, treatment))
    ]
    ratios = {}
    for unit in (*COST_UNITS, *MEASURED, *([price] if price else [])):
        read = spent if unit == price else _cost
        values = [(read(before, unit), read(after, unit)) for before, after in pairs]
        known = [after / before for before, after in values if before and after is not None]
        if known and len(known) == len(pairs):
            ratios[unit] = float(np.mean(known))
    return ratios


def cost_equivalent(
    table: Table, setting: str, control: str, treatment: str, endpoint: Endpoint, unit: str
) -> str | None:
    """How much more budget of the control buys the treatment's gain, read off the mean learning curves."""
    mine, theirs = (
        mean_curve(table, setting, treatment, endpoint.name),
        mean_curve(table, setting, control, endpoint.name),
    )
    if mine is None or theirs is None:
        return None
    unit, sign = unit.replace("_", " "), 1.0 if endpoint.better == "higher" else -1.0
    goal, goal_of_control = sign * mine[-1, 1], sign * theirs[-1, 1]
    if not goal > goal_of_control:
        return None
    spent_by_treatment, spent_by_control = mine[-1, 0], theirs[-1, 0]
    said = []
    bought = _first_reach(theirs, sign, goal)
    if bought is not None:
        said.append(f"{control} needs {bought / spent_by_treatment:.2g} times the {unit} for the same value")
    else:
        said.append(f"{control} does not reach that value within its {_amount(spent_by_control)} {unit}")
    reached = _first_reach(mine, sign, goal_of_control)
    if reached is not None and spent_by_control > 0:
        share = 100 * reached / spent_by_control
        said.append(f"{treatment} reaches the final value of {control} at {share:.0f} % of its {unit}")
    return "; ".join(said)


def mean_curve(table: Table, setting: str, arm: str, metric: str) -> Array | None:
    """(points, 2): budget and mean value over seeds, inside the range that all seeds cover; None without curves."""
    curves = []
    for run in table.of(setting, arm):
        points = sorted(set(run.outcome.curves.get(metric, ()))) if run.outcome else []
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if table.diverged(setting, arm, run.seed):
            continue
        if len(finite) < 2:
            return None
        curves.append(np.array(finite, dtype=np.float64))
    if not curves:
        return None
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    grid = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) < 2:
        return None
    return np.stack([grid, np.mean([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)], axis=1)


def _first_reach(curve: Array, sign: float, goal: float) -> float | None:
    """Budget at which the curve first is as good as `goal` (sign turned so that more is better)."""
    heights = sign * curve[:, 1]
    above = np.flatnonzero(heights >= goal)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(curve[0, 0])
    share = (goal - heights[i - 1]) / (heights[i] - heights[i - 1])
    return float(curve[i - 1, 0] + share * (curve[i, 0] - curve[i - 1, 0]))


def _over_items(pairs: Sequence[tuple[Items, Items]], level: Level) -> Interval:
    """1 - sum / sum over items of one given model, linearised, clusters together."""
    first = pairs[0][1]
    before = np.mean([[dict(zip(c.ids, c.scores))[i] for i in first.ids] for c, _ in pairs], axis=0)
    after = np.mean([[dict(zip(t.ids, t.scores))[i] for i in first.ids] for _, t in pairs], axis=0)
    clusters = first.clusters or first.ids
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    n = int(labels.max()) + 1
    method = f"cluster-robust t over {n} {'items' if first.clusters is None else 'clusters of items'}"
    if n < 2 or before.sum() <= 0:
        return undefined("one item has no variance" if n < 2 else "the control spent nothing", n, method, level=level)
    share = float(after.sum() / before.sum())
    residuals = np.bincount(labels, weights=after - share * before)
    error = math.sqrt(float((residuals**2).sum()) * n / (n - 1)) / float(before.sum())
    if error <= 1e-12:
        return _counted(1.0 - share, n, level)
    return from_t(1.0 - share, [(error, n - 1.0)], n, method, level)


def _counted(share: float, n: int, level: Level) -> Interval:
    """A saving that is counted and the same in every run: it has no error, and its bounds are its value."""

    def p_above(bound: float) -> float:
        return 0.0 if share > bound else 1.0

    def p_below(bound: float) -> float:
        return 0.0 if share < bound else 1.0

    return Interval(
        share, share, share, share, share, None, n, "counted, the same in every run", 0.0, p_below(0.0), p_above(0.0),
        level=level, tails=(p_above, p_below),
    )  # fmt: skip


def _items(run: RunRecord, name: str) -> Items | None:
    return run.outcome.items.get(name) if run.outcome else None


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
