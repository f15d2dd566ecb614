"""The finished runs of a trial, and what they say about one endpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from trialist.engine.contract import Arm, Endpoint, Items, Outcome
from trialist.engine.intervals import Array, Undefined
from trialist.engine.records import RunRecord


class Table:
    """The finished runs of a trial by setting, arm and seed. Tuning runs and stale runs are not among them."""

    def __init__(self, arms: Sequence[Arm], runs: Iterable[RunRecord]) -> None:
        self.arms = {(arm.setting, arm.name): arm for arm in arms}
        self.runs: dict[tuple[str, str, int], RunRecord] = {}
        self._seeds: dict[tuple[str, str], set[int]] = {}
        self.failed: list[RunRecord] = []
        for run in sorted(runs, key=lambda run: run.attempt):
            if run.purpose != "trial" or (run.setting, run.arm) not in self.arms:
                continue
            if run.status in ("done", "diverged") and run.outcome is not None:
                self.runs[run.setting, run.arm, run.seed] = run
                self._seeds.setdefault((run.setting, run.arm), set()).add(run.seed)
            elif run.status == "failed":
                self.failed.append(run)

    def seeds(self, setting: str, *arms: str) -> list[int]:
        """Seeds that all these arms have, in order."""
        found = [self._seeds.get((setting, arm), set()) for arm in arms]
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


def distinct_seeds(table: Table, setting: str, arms: tuple[str, ...], names: Sequence[str]) -> tuple[list[int], int]:
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


def items_differ(control: Items, treatment: Items) -> str | None:
    """Why two arms were not measured on the same items; None where they were."""
    mine, theirs = set(control.ids), set(treatment.ids)
    if mine == theirs:
        return None
    example = sorted(mine ^ theirs)[0]
    counts = f"{len(mine - theirs)} items only in the control and {len(theirs - mine)} only in the treatment"
    return f"{counts}, for example {example!r}"


def worst_value(table: Table, setting: str, endpoint: Endpoint) -> float:
    """The worst finite value that any run of the setting reached: what a diverged run counts as."""
    values = [
        value for run in table.in_setting(setting) if (value := _finite(outcome_of(run), endpoint.name)) is not None
    ]
    if not values:
        raise Undefined(f"no run of setting {setting!r} has a finite {endpoint.name}")
    return max(values) if endpoint.better == "lower" else min(values)


def raw_value(run: RunRecord, name: str) -> float:
    """An endpoint of a run; the mean over its items where it reports those alone. Raises Undefined with the reason."""
    outcome, where = outcome_of(run), f"{run.arm}, seed {run.seed}"
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


def worst_items(table: Table, setting: str, endpoint: Endpoint, ids: Sequence[str]) -> Array:
    """(N,): for every item the worst finite score that any run of the setting reached."""
    rows = [
        aligned(items, ids)
        for run in table.in_setting(setting)
        if (items := outcome_of(run).items.get(endpoint.name)) is not None and set(items.ids) == set(ids)
    ]
    scores = np.stack(rows)
    choose: Callable[..., Array] = np.max if endpoint.better == "lower" else np.min
    masked = np.where(np.isfinite(scores), scores, -np.inf if endpoint.better == "lower" else np.inf)
    return choose(masked, axis=0)


def aligned(items: Items, ids: Sequence[str]) -> Array:
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


def outcome_of(run: RunRecord) -> Outcome:
    assert run.outcome is not None
    return run.outcome
