"""From runs to contrasts: pairs treatment and control, counts equal replicates once, and gives each an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trialist.engine.contract import Endpoint, Items, Replicate
from trialist.engine.effects import Cell, fitted_metric, kind_of, label_of, on_scale, per_of, unit_of, with_metric
from trialist.engine.intervals import (
    FIXED,
    Array,
    Interval,
    Level,
    Undefined,
    crossed_t,
    t_interval,
    to_scale,
    undefined,
)
from trialist.engine.item_intervals import item_interval
from trialist.engine.records import Effect
from trialist.engine.table import (
    Table,
    aligned,
    distinct_seeds,
    items_differ,
    outcome_of,
    raw_value,
    worst_items,
    worst_value,
)


@dataclass(frozen=True)
class Contrast:
    """The effect on one endpoint against one control in one setting, with the statistics behind it."""

    endpoint: Endpoint
    control: str
    setting: str
    interval: Interval
    without: Interval | None = None
    """With the pairs left out in which a run diverged; None where none did"""
    treatment_mean: float | None = None
    control_mean: float | None = None
    correlation: float | None = None
    repeated: int = 0
    """Replicates left out because they equal another bit for bit"""
    items: int | None = None
    clusters: int | None = None
    per: str = ""
    """What an effect over arms is counted by, such as `doubling`"""
    unit: str = ""
    """Of an effect over arms"""

    @property
    def margin(self) -> float:
        return self.endpoint.margin or 0.0

    def effect(self) -> Effect:
        i, w = self.interval, self.without
        return Effect(
            endpoint=self.endpoint.name,
            control=self.control,
            setting=self.setting,
            effect=i.estimate,
            low=i.low,
            high=i.high,
            n=i.n,
            method=i.method + (i.level.design if i.defined else ""),
            p_worse=i.p_worse,
            margin=self.endpoint.margin,
            low90=i.low90,
            high90=i.high90,
            treatment_mean=self.treatment_mean,
            control_mean=self.control_mean,
            correlation=self.correlation,
            without_diverged=None if w is None else (w.estimate, w.low, w.high),
            reason=i.reason,
            unit=self.unit,
        )


def contrast(
    table: Table,
    setting: str,
    control: str,
    treatment: str,
    endpoint: Endpoint,
    replicate: Replicate,
    level: Level = FIXED,
    effect: Any = None,
    tell_apart: Sequence[str] = (),
) -> Contrast:
    """Treatment against one control, positive is better. `tell_apart`: metrics that make seeds different."""
    seeds, repeated = distinct_seeds(table, setting, (control, treatment), (endpoint.name, *tell_apart))
    blank = Contrast(endpoint, control, setting, undefined("no seed has finished in both arms", 0, "none", level=level))
    if not seeds:
        return blank
    blank = replace(blank, repeated=repeated)
    broken = [s for s in seeds if any(table.diverged(setting, arm, s) for arm in (control, treatment))]
    with_items = any(endpoint.name in outcome_of(run).items for run in table.in_setting(setting))
    build = _by_item if "item" in replicate and with_items else _by_seed
    try:
        full = build(table, setting, control, treatment, endpoint, seeds, replicate, level, effect, blank)
    except Undefined as error:
        return replace(blank, interval=undefined(str(error), len(seeds), "none", level=level))
    if not broken:
        return full
    kept = [seed for seed in seeds if seed not in broken]
    try:
        part = build(table, setting, control, treatment, endpoint, kept, replicate, level, effect, blank).interval
    except Undefined as error:
        part = undefined(str(error), len(kept), "none", level=level)
    return replace(full, without=part)


def grid_contrast(
    table: Table, setting: str, endpoint: Endpoint, effect: Any, level: Level = FIXED, tell_apart: Sequence[str] = ()
) -> Contrast:
    """An effect that is fitted over all arms of a setting: per seed, or over all models at once.

    It finds the metric that it is fitted to on the endpoint's scale of analysis.
    """
    names = [name for (s, name), arm in table.arms.items() if s == setting and arm.role != "reference"]
    sign, label = _sign(endpoint), label_of(effect)
    missing = undefined("no seed has finished in all arms", 0, "none", level=level)
    blank = Contrast(endpoint, label, setting, missing, per=per_of(effect), unit=unit_of(effect, endpoint))
    models = kind_of(effect) == "models"
    seeds, repeated = distinct_seeds(table, setting, tuple(names), (endpoint.name, *tell_apart))
    if models:
        cells = [Cell(table.arms[setting, run.arm], run.seed, outcome_of(run)) for run in table.in_setting(setting)]
        cells = [cell for cell in cells if cell.arm.role != "reference"]
    else:
        cells = [
            Cell(table.arms[setting, name], seed, table.outcome(setting, name, seed))
            for seed in seeds
            for name in names
        ]
    if not cells:
        return blank
    broken = {(cell.arm.name, cell.seed) for cell in cells if table.diverged(setting, cell.arm.name, cell.seed)}
    metric = fitted_metric(effect, endpoint.name)

    def interval(measured: Sequence[Cell]) -> Interval:
        chosen = measured
        try:
            chosen = [on_scale(cell, metric, endpoint.scale) for cell in measured]
            if models:
                return effect.interval(chosen, sign=sign, level=level)
            kept = sorted({cell.seed for cell in chosen})
            values = [sign * float(effect([c for c in chosen if c.seed == seed], endpoint.name)) for seed in kept]
            return t_interval(values, level=level)
        except Undefined as error:
            return undefined(str(error), len(chosen) if models else len({c.seed for c in chosen}), "none", level=level)

    if not broken:
        return replace(blank, interval=interval(cells), repeated=repeated)
    try:
        filler = worst_value(table, setting, replace(endpoint, name=metric))
    except Undefined as error:
        return replace(blank, interval=undefined(str(error), len(seeds), "none", level=level), repeated=repeated)
    filled = [with_metric(c, metric, filler) if (c.arm.name, c.seed) in broken else c for c in cells]
    spoilt = {seed for _, seed in broken}
    left = [c for c in cells if ((c.arm.name, c.seed) not in broken if models else c.seed not in spoilt)]
    return replace(blank, interval=interval(filled), without=interval(left), repeated=repeated)


def contrast_items(
    control: Items, treatment: Items, endpoint: Endpoint, control_name: str = "A", level: Level = FIXED
) -> Contrast:
    """Paired comparison of two score lists over the same items. Raises ValueError where the items differ."""
    if reason := items_differ(control, treatment):
        raise ValueError(reason)
    before, after = aligned(control, treatment.ids), np.array(treatment.scores, dtype=np.float64)
    blank = Contrast(endpoint, control_name, "items", undefined("no items", 0, "none", level=level))
    try:
        return _items_contrast(
            before[None, :], after[None, :], treatment.clusters or control.clusters, endpoint, "item", level, blank
        )
    except Undefined as error:
        return replace(blank, interval=undefined(str(error), len(treatment.ids), "none", level=level))


def _by_seed(
    table: Table,
    setting: str,
    control: str,
    treatment: str,
    endpoint: Endpoint,
    seeds: Sequence[int],
    replicate: Replicate,
    level: Level,
    effect: Any,
    blank: Contrast,
) -> Contrast:
    def values(arm: str) -> Array:
        runs = [table.runs[setting, arm, seed] for seed in seeds]
        filler = worst_value(table, setting, endpoint) if any(table.diverged(setting, arm, s) for s in seeds) else None
        return np.array(
            [
                filler
                if filler is not None and table.diverged(setting, arm, run.seed)
                else raw_value(run, endpoint.name)
                for run in runs
            ],
            dtype=np.float64,
        )

    before, after, unit = values(control), values(treatment), "models" if replicate == "model" else "seeds"
    if effect is not None:
        d = np.array([effect(c, t) for c, t in zip(before, after)])
        scaled_before, scaled_after, magnitude = before, after, 1.0
    else:
        scaled_before = to_scale(before, endpoint.scale, endpoint.name)
        scaled_after = to_scale(after, endpoint.scale, endpoint.name)
        d, magnitude = scaled_after - scaled_before, _magnitude(scaled_before, scaled_after)
    return replace(
        blank,
        interval=t_interval(_sign(endpoint) * d, magnitude=magnitude, level=level, unit=unit),
        treatment_mean=float(after.mean()) if len(after) else None,
        control_mean=float(before.mean()) if len(before) else None,
        correlation=_correlation(scaled_before, scaled_after),
    )


def _by_item(
    table: Table,
    setting: str,
    control: str,
    treatment: str,
    endpoint: Endpoint,
    seeds: Sequence[int],
    replicate: Replicate,
    level: Level,
    effect: Any,
    blank: Contrast,
) -> Contrast:
    if effect is not None:
        raise Undefined(
            f"{label_of(effect)} compares values per seed; an endpoint with items needs the paired difference"
        )
    if not seeds:
        raise Undefined("every pair has a diverged run")
    reference = next(
        items for run in table.in_setting(setting) if (items := outcome_of(run).items.get(endpoint.name)) is not None
    )
    worst = worst_items(table, setting, endpoint, reference.ids)

    def matrix(arm: str) -> Array:
        rows = []
        for seed in seeds:
            items = table.outcome(setting, arm, seed).items.get(endpoint.name)
            if table.diverged(setting, arm, seed):
                rows.append(worst)
            elif items is None:
                raise Undefined(f"{arm}, seed {seed} reports no {endpoint.name} per item")
            else:
                rows.append(aligned(items, reference.ids))
        return np.stack(rows)

    before, after = matrix(control), matrix(treatment)
    return _items_contrast(before, after, reference.clusters, endpoint, replicate, level, blank)


def _items_contrast(
    before: Array,
    after: Array,
    clusters: Sequence[str] | None,
    endpoint: Endpoint,
    replicate: Replicate,
    level: Level,
    blank: Contrast,
) -> Contrast:
    """before, after: raw scores (seeds, items)."""
    if not np.isfinite(before).all() or not np.isfinite(after).all():
        raise Undefined(f"{endpoint.name} of an item is not finite")
    scaled_before = to_scale(before, endpoint.scale, f"{endpoint.name} of an item")
    scaled_after = to_scale(after, endpoint.scale, f"{endpoint.name} of an item")
    d, magnitude = _sign(endpoint) * (scaled_after - scaled_before), _magnitude(scaled_before, scaled_after)
    if replicate == "item":
        # Averaging over seeds first leaves the items as the only sample: the model is given.
        interval = item_interval(d.mean(axis=0), clusters, magnitude=magnitude, level=level)
        correlation = _correlation(scaled_before.mean(axis=0), scaled_after.mean(axis=0))
    else:
        interval = crossed_t(d, clusters, magnitude=magnitude, level=level)
        correlation = _correlation(scaled_before.mean(axis=1), scaled_after.mean(axis=1))
    return replace(
        blank,
        interval=interval,
        treatment_mean=float(after.mean()),
        control_mean=float(before.mean()),
        correlation=correlation,
        items=d.shape[1],
        clusters=None if clusters is None else len(set(clusters)),
    )


def _sign(endpoint: Endpoint) -> float:
    return 1.0 if endpoint.better == "higher" else -1.0


def _magnitude(*arrays: Array) -> float:
    return max((float(np.abs(array).max(initial=0.0)) for array in arrays), default=0.0)


def _correlation(before: Array, after: Array) -> float | None:
    if len(before) < 3 or before.std() == 0 or after.std() == 0:
        return None
    return float(np.corrcoef(before, after)[0, 1])
