"""From runs to contrasts: pairs treatment and control, counts equal replicates once, and hands each pair to its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trialist.engine.contract import Arm, Endpoint, Items, Outcome, Replicate
from trialist.engine.effects import Cell, kind_of, label_of, with_metric
from trialist.engine.intervals import (
    FIXED,
    Array,
    Interval,
    Level,
    Undefined,
    crossed_t,
    item_interval,
    t_interval,
    to_scale,
    undefined,
)
from trialist.engine.records import Effect, RunRecord


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
            method=i.method,
            p_worse=i.p_worse,
            margin=self.endpoint.margin,
            low90=i.low90,
            high90=i.high90,
            treatment_mean=self.treatment_mean,
            control_mean=self.control_mean,
            correlation=self.correlation,
            without_diverged=None if w is None else (w.estimate, w.low, w.high),
            reason=i.reason,
        )


class Table:
    """The finished runs of a trial by setting, arm and seed. Tuning runs and stale runs are not among them."""

    def __init__(self, arms: Sequence[Arm], runs: Iterable[RunRecord]) -> None:
        self.arms = {(arm.setting, arm.name): arm for arm in arms}
        self.runs: dict[tuple[str, str, int], RunRecord] = {}
        self.failed: list[RunRecord] = []
        for run in sorted(runs, key=lambda run: run.attempt):
            if run.purpose != "trial" or (run.setting, run.arm) not in self.arms:
                continue
            if run.status in ("done", "diverged") and run.outcome is not None:
                self.runs[run.setting, run.arm, run.seed] = run
            elif run.status == "failed":
                self.failed.append(run)

    def seeds(self, setting: str, *arms: str) -> list[int]:
        """Seeds that all these arms have, in order."""
        found = [{seed for (s, a, seed) in self.runs if (s, a) == (setting, arm)} for arm in arms]
        return sorted(set.intersection(*found)) if found else []

    def of(self, setting: str, arm: str) -> list[RunRecord]:
        return [self.runs[setting, arm, seed] for seed in self.seeds(setting, arm)]

    def outcome(self, setting: str, arm: str, seed: int) -> Outcome:
        outcome = self.runs[setting, arm, seed].outcome
        assert outcome is not None
        return outcome

    def diverged(self, setting: str, arm: str, seed: int) -> bool:
        run = self.runs[setting, arm, seed]
        return run.status == "diverged" or (run.outcome is not None and run.outcome.diverged is not None)

    def divergences(self, setting: str, arm: str) -> int:
        return sum(self.diverged(setting, arm, seed) for seed in self.seeds(setting, arm))

    def in_setting(self, setting: str) -> list[RunRecord]:
        return [run for (s, _, _), run in sorted(self.runs.items()) if s == setting]


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
    """Treatment against one control, positive is better. `tell_apart`: metrics that make two seeds different replicates."""
    seeds, repeated = _distinct(table, setting, (control, treatment), (endpoint.name, *tell_apart))
    blank = Contrast(endpoint, control, setting, undefined("no seed has finished in both arms", 0, "none", level=level))
    if not seeds:
        return blank
    blank = replace(blank, repeated=repeated)
    broken = [s for s in seeds if any(table.diverged(setting, arm, s) for arm in (control, treatment))]
    with_items = any(endpoint.name in _outcome(run).items for run in table.in_setting(setting))
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
    """An effect that is fitted over all arms of a setting: per seed, or over all models at once."""
    names = [name for (s, name), arm in table.arms.items() if s == setting and arm.role != "reference"]
    sign, label = _sign(endpoint), label_of(effect)
    blank = Contrast(endpoint, label, setting, undefined("no seed has finished in all arms", 0, "none", level=level))
    models = kind_of(effect) == "models"
    seeds, repeated = _distinct(table, setting, tuple(names), (endpoint.name, *tell_apart))
    if models:
        cells = [Cell(table.arms[setting, run.arm], run.seed, _outcome(run)) for run in table.in_setting(setting)]
        cells = [cell for cell in cells if cell.arm.role != "reference"]
    else:
        cells = [Cell(table.arms[setting, name], seed, table.outcome(setting, name, seed)) for seed in seeds for name in names]
    if not cells:
        return blank
    broken = {(cell.arm.name, cell.seed) for cell in cells if table.diverged(setting, cell.arm.name, cell.seed)}
    metric = getattr(effect, "metric", None) or getattr(effect, "y", None) or endpoint.name

    def interval(chosen: Sequence[Cell]) -> Interval:
        try:
            if models:
                return effect.interval(chosen, sign=sign, level=level)
            kept = sorted({cell.seed for cell in chosen})
            values = [sign * float(effect([c for c in chosen if c.seed == seed], endpoint.name)) for seed in kept]
            return t_interval(values, level=level)
        except Undefined as error:
            return undefined(str(error), len(chosen), "none", level=level)

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
    before, after = _aligned(control, treatment.ids), np.array(treatment.scores, dtype=np.float64)
    blank = Contrast(endpoint, control_name, "items", undefined("no items", 0, "none", level=level))
    try:
        return _items_contrast(before[None, :], after[None, :], treatment.clusters or control.clusters, endpoint, "item", level, blank)
    except Undefined as error:
        return replace(blank, interval=undefined(str(error), len(treatment.ids), "none", level=level))


def items_differ(control: Items, treatment: Items) -> str | None:
    """Why two arms were not measured on the same items; None where they were."""
    mine, theirs = set(control.ids), set(treatment.ids)
    if mine == theirs:
        return None
    example = sorted(mine ^ theirs)[0]
    return f"{len(mine - theirs)} items only in the control and {len(theirs - mine)} only in the treatment, for example {example!r}"


def worst_value(table: Table, setting: str, endpoint: Endpoint) -> float:
    """The worst finite value that any run of the setting reached: what a diverged run counts as."""
    values = [value for run in table.in_setting(setting) if (value := _finite(_outcome(run), endpoint.name)) is not None]
    if not values:
        raise Undefined(f"no run of setting {setting!r} has a finite {endpoint.name}")
    return max(values) if endpoint.better == "lower" else min(values)


def raw_value(run: RunRecord, name: str) -> float:
    """An endpoint of a run; the mean over its items where it reports those alone. Raises Undefined with the reason."""
    outcome, where = _outcome(run), f"{run.arm}, seed {run.seed}"
    if name in outcome.undefined:
        raise Undefined(f"{name} is undefined in {where}: {outcome.undefined[name]}")
    if name in outcome.metrics:
        value = float(outcome.metrics[name])
    elif name in outcome.items and outcome.items[name].scores:
        value = float(np.mean(outcome.items[name].scores))
    else:
        raise Undefined(f"{where} reports no {name}; it has {', '.join(outcome.metrics) or 'no metrics'}")
    if not math.isfinite(value):
        raise Undefined(f"{name} is {value} in {where}, and the run does not say that it diverged")
    return value


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
                filler if filler is not None and table.diverged(setting, arm, run.seed) else raw_value(run, endpoint.name)
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
        raise Undefined(f"{label_of(effect)} compares values per seed; an endpoint with items needs the paired difference")
    if not seeds:
        raise Undefined("every pair has a diverged run")
    reference = next(
        items for run in table.in_setting(setting) if (items := _outcome(run).items.get(endpoint.name)) is not None
    )
    worst = _worst_items(table, setting, endpoint, reference.ids)

    def matrix(arm: str) -> Array:
        rows = []
        for seed in seeds:
            items = table.outcome(setting, arm, seed).items.get(endpoint.name)
            if table.diverged(setting, arm, seed):
                rows.append(worst)
            elif items is None:
                raise Undefined(f"{arm}, seed {seed} reports no {endpoint.name} per item")
            else:
                rows.append(_aligned(items, reference.ids))
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


def _distinct(table: Table, setting: str, arms: tuple[str, ...], names: Sequence[str]) -> tuple[list[int], int]:
    """The seeds whose runs are not bit-for-bit those of an earlier seed, and how many were."""
    seen: set[Any] = set()
    kept = []
    seeds = table.seeds(setting, *arms)
    for seed in seeds:
        key = tuple(_content(table.outcome(setting, arm, seed), names) for arm in arms)
        if key not in seen or any(table.diverged(setting, arm, seed) for arm in arms):
            kept.append(seed)
        seen.add(key)
    return kept, len(seeds) - len(kept)


def _content(outcome: Outcome, names: Sequence[str]) -> tuple[Any, ...]:
    """What makes a run's result its own: decisive metrics, item scores, covariates and curves (not its times)."""
    return (
        tuple((name, outcome.metrics.get(name)) for name in names),
        tuple((name, outcome.items[name].ids, outcome.items[name].scores) for name in names if name in outcome.items),
        tuple(sorted(outcome.covariates.items())),
        tuple((name, tuple(y for _, y in points)) for name, points in sorted(outcome.curves.items())),
    )


def _worst_items(table: Table, setting: str, endpoint: Endpoint, ids: Sequence[str]) -> Array:
    """(N,): for every item the worst finite score that any run of the setting reached."""
    rows = [
        _aligned(items, ids)
        for run in table.in_setting(setting)
        if (items := _outcome(run).items.get(endpoint.name)) is not None and set(items.ids) == set(ids)
    ]
    scores = np.stack(rows)
    choose: Callable[..., Array] = np.max if endpoint.better == "lower" else np.min
    masked = np.where(np.isfinite(scores), scores, -np.inf if endpoint.better == "lower" else np.inf)
    return choose(masked, axis=0)


def _aligned(items: Items, ids: Sequence[str]) -> Array:
    if items.ids == tuple(ids):
        return np.array(items.scores, dtype=np.float64)
    by_id = dict(zip(items.ids, items.scores))
    if set(by_id) != set(ids):
        raise Undefined("the items differ between runs")
    return np.array([by_id[item] for item in ids], dtype=np.float64)


def _finite(outcome: Outcome, name: str) -> float | None:
    if name in outcome.metrics:
        value = float(outcome.metrics[name])
    elif name in outcome.items and outcome.items[name].scores:
        value = float(np.mean(outcome.items[name].scores))
    else:
        return None
    return value if math.isfinite(value) else None


def _outcome(run: RunRecord) -> Outcome:
    assert run.outcome is not None
    return run.outcome


def _sign(endpoint: Endpoint) -> float:
    return 1.0 if endpoint.better == "higher" else -1.0


def _magnitude(*arrays: Array) -> float:
    return max((float(np.abs(array).max(initial=0.0)) for array in arrays), default=0.0)


def _correlation(before: Array, after: Array) -> float | None:
    if len(before) < 3 or before.std() == 0 or after.std() == 0:
        return None
    return float(np.corrcoef(before, after)[0, 1])
