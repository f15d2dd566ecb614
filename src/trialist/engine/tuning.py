"""Equal-effort tuning before the trial: a grid per arm, own metric, own seeds; values may ship with the trial."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from trialist.engine.contract import Arm
from trialist.engine.home import write_atomic
from trialist.engine.plan import Prepared
from trialist.engine.records import RunRecord, primary_setting


@dataclass(frozen=True)
class Tuned:
    """Chosen values by arm name, and the rows they came from."""

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    origin: str = "none"
    """`none`, `this ledger`, or that they shipped with the trial and at which preset they were tuned"""

    def apply(self, arms: Sequence[Arm]) -> tuple[Arm, ...]:
        return tuple(arm.with_options(**self.values.get(arm.tuned_as or arm.name, {})) for arm in arms)

    @property
    def equal(self) -> bool:
        """Whether every tuned arm got the same number of tries."""
        tries: dict[str, int] = {}
        for row in self.rows:
            tries[row["arm"]] = tries.get(row["arm"], 0) + 1
        return len(set(tries.values())) <= 1


def tuned_file(path: str) -> Path:
    """Where the tuned values of a trial (`module:Class`) ship: `tuned/` beside its module."""
    module = import_module(path.partition(":")[0])
    file = Path(str(module.__file__))
    return file.parent / "tuned" / f"{file.stem}.json"


def shipped(prepared: Prepared) -> Tuned | None:
    """The values that ship for this preset; None where there are none, or where they would not be fair (own model or data)."""
    if prepared.own_inputs or prepared.options.tune:
        return None
    file = tuned_file(prepared.path)
    if not file.is_file():
        return None
    stored = json.loads(file.read_text())
    preset = (
        "tiny" if prepared.preset == "demo" and "demo" not in stored else prepared.preset
    )  # a demo is a smaller tiny
    if preset not in stored:
        return None
    return Tuned(
        stored[preset]["values"], tuple(stored[preset]["rows"]), f"shipped with the trial, tuned at preset {preset}"
    )


def ship(prepared: Prepared, tuned: Tuned) -> Path:
    """Stores chosen values beside the trial's module, for later runs of the preset."""
    file = tuned_file(prepared.path)
    stored = json.loads(file.read_text()) if file.is_file() else {}
    stored[prepared.preset] = {"values": tuned.values, "rows": list(tuned.rows)}
    return write_atomic(file, json.dumps(dict(sorted(stored.items())), indent=1) + "\n")


def grid(arm: Arm) -> list[dict[str, Any]]:
    knobs = arm.tune or {}
    return [dict(zip(knobs, point)) for point in itertools.product(*knobs.values())]


def tuning_arms(prepared: Prepared) -> list[Arm]:
    """One arm per grid point, for the arms of the primary setting that have knobs."""
    setting = primary_setting(list(prepared.arms))
    return [
        arm.with_options(**point) for arm in prepared.arms if arm.tune and arm.setting == setting for point in grid(arm)
    ]


def choose(prepared: Prepared, records: Sequence[RunRecord]) -> Tuned:
    """The best grid point of each arm by the mean of the tuning metric over the tuning seeds; divergence is the worst value.

    Raises ValueError where an arm has no usable try.
    """
    tuning = prepared.trial.tuning
    assert tuning is not None
    metric = tuning.metric
    sign = 1.0 if metric.better == "higher" else -1.0
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, str], list[float]] = {}
    for record in records:
        knobs = next(arm.tune for arm in prepared.arms if arm.name == record.arm and arm.tune) or {}
        point = {knob: record.options[knob] for knob in knobs}
        usable = record.status == "done" and record.outcome is not None and metric.name in record.outcome.metrics
        value = record.outcome.metrics[metric.name] if usable and record.outcome is not None else None
        rows.append(
            {
                "run": record.id,
                "arm": record.arm,
                "options": point,
                "seed": record.seed,
                "status": record.status,
                metric.name: value,
            }
        )
        key = (record.arm, json.dumps(point, sort_keys=True))
        scores.setdefault(key, []).append(float("-inf") if value is None else sign * value)
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for (arm, knobs_json), values in scores.items():
        mean = sum(values) / len(values)
        if arm not in best or mean > best[arm][0]:
            best[arm] = (mean, json.loads(knobs_json))
    for arm, (mean, _) in best.items():
        if mean == float("-inf"):
            raise ValueError(
                f"tuning of arm {arm!r} has no usable try: every point diverged or failed; `trialist runs` shows why"
            )
    return Tuned({arm: point for arm, (_, point) in best.items()}, tuple(rows), "this ledger")
