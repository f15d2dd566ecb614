"""One JSON document per trial: what was claimed, measured and spent. Reports and evidence are rendered from it.

Effects keep the orientation of the statistics (positive is better); the values of the arms are raw. Undefined is null,
and the reason stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trialist.engine.contract import OVER, Arm, Endpoint, Trial
from trialist.engine.home import write_atomic
from trialist.engine.plain import clean, dump_json, thin
from trialist.engine.records import Effect, RunRecord, Verdict, primary_setting, settings_of

SCHEMA = 1
EVIDENCE_KEYS = (
    "schema",
    "trial",
    "preset",
    "claim",
    "source",
    "reported",
    "verdict",
    "reason",
    "endpoint",
    "unit",
    "better",
    "margin",
    "replicate",
    "interval_method",
    "treatment",
    "effects",
    "guards",
    "null_effects",
    "settings",
    "arms",
    "cost_ratio",
    "tuning",
    "inputs",
    "versions",
    "hardware",
    "command",
    "date",
)
CONTEXT_KEYS = (
    "technique",
    "kind",
    "scale",
    "per",
    "setting",
    "sentence",
    "advice",
    "co_primary",
    "secondary",
    "readings",
    "references",
    "savings",
    "saving",
    "budget",
    "threats",
    "divergences",
    "cost_equivalent",
    "more_seeds",
    "full_trial_command",
    "stages",
    "totals",
    "items",
    "curve_means",
)
KEPT_REMARKS = 40
"""Distinct remarks of runs that a summary tells"""
KEPT_CURVES = 40
"""Curves kept per arm, setting and metric; the mean is over all of them"""
CURVE_POINTS = 160


def summarize(
    trial: Trial,
    name: str,
    preset: str,
    arms: Iterable[Arm],
    runs: Sequence[RunRecord],
    verdict: Verdict,
    *,
    inputs: Mapping[str, Any],
    versions: Mapping[str, Any],
    hardware: Mapping[str, Any],
    command: str,
    date: str,
    tuning: Mapping[str, Any],
    margin: float | None,
    endpoint: Endpoint | str | None,
    full_trial_command: str | None,
    stages: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The document, clean JSON throughout. `endpoint` and `margin` are those that decided; None: those of the claim."""
    from trialist.engine.effects import per_of

    arms = list(arms)
    claim = trial.claim
    decisive = _endpoint(claim.endpoints, endpoint) or claim.endpoint
    names = list(dict.fromkeys([decisive.name, *(entry.name for entry in claim.endpoints)]))
    grouped: dict[tuple[str, str], dict[int, RunRecord]] = {(arm.setting, arm.name): {} for arm in arms}
    for run in runs:
        if (
            run.purpose == "trial"
            and run.status in ("done", "diverged", "failed")
            and (run.setting, run.arm) in grouped
        ):
            known = grouped[run.setting, run.arm].get(run.seed)
            if known is None or known.outcome is None or run.outcome is not None:
                grouped[run.setting, run.arm][run.seed] = run
    primary = primary_setting(arms)
    curves, means = _curves(arms, grouped)
    replicate = trial.replicates_over()
    document = {
        "schema": SCHEMA,
        "trial": name,
        "preset": preset,
        "technique": (trial.__doc__ or "").strip().partition("\n")[0],
        "claim": claim.statement,
        "source": claim.source,
        "reported": claim.reported,
        "kind": claim.kind,
        "verdict": verdict.word,
        "reason": verdict.reason,
        "sentence": verdict.sentence,
        "advice": verdict.advice,
        "endpoint": decisive.name,
        "unit": decisive.unit,
        "better": decisive.better,
        "scale": decisive.scale,
        "per": per_of(trial.effect),
        "margin": margin if margin is not None else decisive.margin,
        "replicate": replicate,
        "interval_method": next((effect.method for effect in verdict.effects if effect.method), None),
        "treatment": verdict.treatment,
        "setting": verdict.setting or primary,
        "effects": _effects(verdict.effects, claim.endpoints),
        "co_primary": _effects(verdict.co_primary, claim.endpoints),
        "guards": _effects(verdict.guards, claim.endpoints),
        "secondary": _effects(verdict.secondary, claim.endpoints),
        "readings": _effects(verdict.readings, claim.endpoints),
        "settings": _effects(verdict.settings, claim.endpoints),
        "null_effects": _effects(verdict.null_effects, claim.endpoints),
        "references": _effects(verdict.references, claim.endpoints),
        "savings": _effects(verdict.savings, claim.endpoints),
        "saving": dataclasses.asdict(claim.saving) if claim.saving else None,
        "budget": {setting: trial.budget.unit_of(setting) for setting in settings_of(arms)},
        "arms": [_arm(arm, grouped[arm.setting, arm.name], names) for arm in arms],
        "items": _items(arms, grouped, decisive, verdict, primary) if "item" in replicate else [],
        "cost_ratio": verdict.cost_ratio,
        "cost_equivalent": verdict.cost_equivalent,
        "more_seeds": verdict.more_seeds,
        "divergences": verdict.divergences,
        "threats": _threats(verdict.threats, grouped),
        "failures": [
            {
                "run": run.id,
                "arm": run.arm,
                "setting": run.setting,
                "seed": run.seed,
                "attempt": run.attempt,
                "error": run.error or "no message was recorded",
                "traceback": run.traceback,
            }
            for by_seed in grouped.values()
            for run in by_seed.values()
            if run.status == "failed"
        ],
        "tuning": tuning,
        "stages": list(stages),
        "totals": _totals(grouped),
        "inputs": inputs,
        "versions": versions,
        "hardware": hardware,
        "command": command,
        "full_trial_command": full_trial_command,
        "date": date,
        "curves": curves,
        "curve_means": means,
    }
    return clean(document)


def evidence_document(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a summary that is committed: no tracebacks, no curves of single seeds, their means thinned."""
    document = {key: summary[key] for key in EVIDENCE_KEYS}
    document |= {key: summary[key] for key in CONTEXT_KEYS if key in summary}
    document["curve_means"] = [
        entry | {"points": thin(entry["points"], 40)} for entry in summary.get("curve_means", [])
    ]
    document["failures"] = [
        {key: value for key, value in failure.items() if key != "traceback"} for failure in summary.get("failures", [])
    ]
    return document


def write_evidence(summary: Mapping[str, Any], folder: str | Path, name: str) -> Path:
    """Writes `folder/<name>.json` whole or not at all, and returns its path; `folder` is `evidence/<trial>`."""
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"evidence name {name!r} is no file name; pass one without slashes, for example `tiny`")
    return write_atomic(Path(folder) / f"{name}.json", dump_json(evidence_document(summary)))


def _endpoint(endpoints: Sequence[Endpoint], wanted: Endpoint | str | None) -> Endpoint | None:
    if isinstance(wanted, str):
        known = {endpoint.name: endpoint for endpoint in endpoints}
        return known.get(wanted) or Endpoint(wanted)
    return wanted


def _effects(effects: Sequence[Effect], endpoints: Sequence[Endpoint]) -> list[dict[str, Any]]:
    known = {endpoint.name: endpoint for endpoint in endpoints}
    found = []
    for effect in effects:
        entry = {"control": effect.control, **dataclasses.asdict(effect)}
        lost = [
            key for key in ("effect", "low", "high") if isinstance(entry[key], float) and not math.isfinite(entry[key])
        ]
        if lost and not entry["reason"]:
            entry["reason"] = f"{' and '.join(lost)} not finite"
        entry["unit"] = effect.unit or (known[effect.endpoint].unit if effect.endpoint in known else "")
        entry["better"] = known[effect.endpoint].better if effect.endpoint in known else None
        found.append(entry)
    return found


def _arm(arm: Arm, by_seed: Mapping[int, RunRecord], names: Sequence[str]) -> dict[str, Any]:
    runs = [by_seed[seed] for seed in sorted(by_seed) if by_seed[seed].outcome is not None]
    endpoints: dict[str, list[float | None]] = {}
    undefined = []
    for name in names:
        values = []
        for run in runs:
            value = run.outcome.metrics.get(name)  # type: ignore[union-attr]
            reason = run.outcome.undefined.get(name)  # type: ignore[union-attr]
            if value is not None and not math.isfinite(value):
                reason, value = reason or f"the run reported {value}", None
            if reason is not None:
                undefined.append({"endpoint": name, "seed": run.seed, "reason": reason})
            values.append(value)
        if any(value is not None for value in values) or any(entry["endpoint"] == name for entry in undefined):
            endpoints[name] = values
    return {
        "arm": arm.name,
        "setting": arm.setting,
        "role": arm.role,
        "null": arm.null,
        "about": arm.about,
        "options": arm.options,
        "seeds": [run.seed for run in runs],
        "endpoints": endpoints,
        "undefined": undefined,
        "divergences": sum(run.status == "diverged" for run in runs),
        "diverged": [
            {"seed": run.seed, "reason": run.outcome.diverged} for run in runs if run.outcome and run.outcome.diverged
        ],
        "failed": [seed for seed in sorted(by_seed) if by_seed[seed].status == "failed"],
        "cost": _mean_cost(runs),
        "runs": [run.id for run in runs],
    }


def _mean_cost(runs: Sequence[RunRecord]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        for unit, value in {**(run.outcome.cost.as_dict() if run.outcome else {}), **run.measured}.items():
            if value is not None and math.isfinite(value) and not unit.startswith("clock_"):
                values.setdefault(unit, []).append(value)
    return {unit: sum(entries) / len(entries) for unit, entries in values.items()}


def _totals(grouped: Mapping[tuple[str, str], Mapping[int, RunRecord]]) -> dict[str, float]:
    runs = [run for by_seed in grouped.values() for run in by_seed.values()]
    return {
        "runs": len(runs),
        "wall_seconds": sum(run.clock("wall") or 0.0 for run in runs),
        "cpu_seconds": sum(run.clock("cpu") or 0.0 for run in runs),
    }


def _threats(given: Sequence[str], grouped: Mapping[tuple[str, str], Mapping[int, RunRecord]]) -> list[str]:
    """The verdict's threats, then the distinct remarks of the runs, the first `KEPT_REMARKS` of them."""
    found: dict[str, None] = {}
    for by_seed in grouped.values():
        for run in by_seed.values():
            found |= dict.fromkeys(run.outcome.notes if run.outcome else ())
    remarks = [remark for remark in found if remark not in given]
    more = len(remarks) - KEPT_REMARKS
    told = [f"{more:,} further remarks of single runs stand in the ledger"] if more > 0 else []
    return [*given, *remarks[:KEPT_REMARKS], *told]


def _curves(
    arms: Sequence[Arm], grouped: Mapping[tuple[str, str], Mapping[int, RunRecord]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Curves of single seeds (the first `KEPT_CURVES` of each arm) and the mean over all seeds."""
    kept, means = [], []
    for arm in arms:
        by_metric: dict[str, list[tuple[int, Any]]] = {}
        for seed in sorted(grouped[arm.setting, arm.name]):
            run = grouped[arm.setting, arm.name][seed]
            for metric, points in (run.outcome.curves if run.outcome else {}).items():
                finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
                if finite:
                    by_metric.setdefault(metric, []).append((seed, finite))
        for metric, curves in by_metric.items():
            place = {"setting": arm.setting, "arm": arm.name, "metric": metric}
            kept += [
                place | {"seed": seed, "points": thin(points, CURVE_POINTS)} for seed, points in curves[:KEPT_CURVES]
            ]
            mean = _mean_curve([points for _, points in curves], at_points=OVER in metric)
            means.append(place | {"seeds": len(curves), "points": mean})
    return kept, means


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]], at_points: bool) -> list[list[float]]:
    """Mean over seeds at common budgets; interpolated inside the range of all where seeds differ in theirs.

    at_points: points of one place belong together and their budgets are averaged too, as where a size is met only nearly.
    """
    import numpy as np

    first = np.array([x for x, _ in curves[0]])
    if all(len(curve) == len(first) for curve in curves):
        table = np.array(curves)  # (seeds, points, 2)
        if at_points or (table[:, :, 0] == first).all():
            return thin(table.mean(0).tolist(), CURVE_POINTS)
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if low > high:
        return []
    grid = np.linspace(low, high, min(CURVE_POINTS, max(len(curve) for curve in curves)))
    values = [np.interp(grid, [x for x, _ in curve], [y for _, y in curve]) for curve in curves]
    return np.stack([grid, np.mean(values, axis=0)], axis=1).tolist()


def _items(
    arms: Sequence[Arm],
    grouped: Mapping[tuple[str, str], Mapping[int, RunRecord]],
    endpoint: Endpoint,
    verdict: Verdict,
    primary: str,
) -> list[dict[str, Any]]:
    """Per control of the primary setting: items won, lost and tied by the treatment, and the largest changes."""
    scores = {
        arm.name: _item_scores(grouped[primary, arm.name].values(), endpoint.name)
        for arm in arms
        if arm.setting == primary
    }
    treatment = scores.get(verdict.treatment, {})
    sign = 1 if endpoint.better == "higher" else -1
    found = []
    for arm in arms:
        if arm.setting != primary or arm.role != "control" or not scores[arm.name]:
            continue
        gains: list[dict[str, Any]] = [
            {"id": item, "gain": sign * (treatment[item] - score), "control": score, "treatment": treatment[item]}
            for item, score in scores[arm.name].items()
            if item in treatment
        ]
        ordered = sorted(gains, key=lambda entry: (-entry["gain"], entry["id"]))
        found.append(
            {
                "control": arm.name,
                "n": len(gains),
                "won": sum(entry["gain"] > 0 for entry in gains),
                "lost": sum(entry["gain"] < 0 for entry in gains),
                "tied": sum(entry["gain"] == 0 for entry in gains),
                "most_won": [entry for entry in ordered[:5] if entry["gain"] > 0],
                "most_lost": [entry for entry in ordered[::-1][:5] if entry["gain"] < 0],
            }
        )
    return found


def _item_scores(runs: Iterable[RunRecord], name: str) -> dict[str, float]:
    """Mean score per item over the runs (seeds) of one arm."""
    values: dict[str, list[float]] = {}
    for run in runs:
        if run.outcome and name in run.outcome.items:
            items = run.outcome.items[name]
            for item, score in zip(items.ids, items.scores):
                values.setdefault(item, []).append(score)
    return {item: sum(entries) / len(entries) for item, entries in values.items()}
