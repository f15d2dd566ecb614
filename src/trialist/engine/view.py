"""Everything that a report says, in words and numbers as they are printed: what the page templates and pictures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trialist.engine import wording
from trialist.engine.contract import OVER
from trialist.engine.plain import thin

MOST_ROWS = 50
"""Rows of the tables of single seeds; the JSON has all"""
MOST_RANGES, MOST_POINTS = 8, 12
"""Readings over a range that are drawn, and their points that stand in words; the JSON has all"""
SECTIONS = (
    ("effects", "What decides"),
    ("co_primary", "Must hold as well"),
    ("guards", "Guards: must not get worse by more than the margin"),
    ("savings", "What it saves"),
    ("settings", "Other settings"),
    ("null_effects", "Negative controls: here the benefit must vanish"),
    ("references", "References, which never decide"),
    ("secondary", "Secondary endpoints, which never decide"),
    ("readings", "What else the same runs say, which never decides"),
)


def view_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page says, in words: what the HTML and the Markdown templates print."""
    arms = summary["arms"]
    primary = summary.get("setting") or next(arm["setting"] for arm in arms if not arm["null"])
    effect = wording.weakest(summary["effects"])
    return {
        "summary": summary,
        "primary": primary,
        "word": summary["verdict"],
        "url": wording.source_url(summary["source"]),
        "margin": wording.margin_text(summary["margin"]),
        "unit": summary["unit"],
        "effect_unit": wording.effect_unit(summary),
        "tiles": _tiles(summary, effect),
        "axis": _axis(summary),
        "sections": [
            {"title": title, "rows": [_comparison(entry, key) for entry in summary.get(key, [])]}
            for key, title in SECTIONS
            if summary.get(key)
        ],
        "measured": [
            {"control": entry["control"], "effect": wording.effect_text(entry, wording.effect_unit(summary))}
            for entry in summary["effects"][:8]
        ],
        "panels": _seed_panels(summary, primary),
        "seed_tables": _seed_tables(summary),
        "curve_panels": _curve_panels(summary, primary),
        "range_panels": range_panels(summary, primary),
        "costs": _costs(summary, primary),
        "stages": _stages(summary.get("stages") or []),
        "items": summary.get("items") or [],
        "arm_rows": [_arm_row(arm, summary) for arm in arms],
        "provenance": _provenance(summary),
        "tuning": _tuning(summary["tuning"]),
        "failures": summary.get("failures") or [],
        "threats": summary.get("threats") or [],
        "full_trial_command": summary.get("full_trial_command"),
    }


def _tiles(summary: Mapping[str, Any], effect: Mapping[str, Any] | None) -> list[dict[str, str]]:
    tiles = []
    if effect is not None:
        many = len(summary["effects"]) > 1
        against = f"against {effect['control']}" + (", the strongest control" if many else "")
        value = wording.signed(effect["effect"], wording.effect_decimals(effect))
        tiles.append(
            {
                "label": ", ".join(filter(None, ("Effect", wording.effect_unit(summary)))),
                "value": value,
                "note": against,
            }
        )
        tiles.append(
            {
                "label": "95 % interval",
                "value": wording.interval(effect).strip("[]").replace(", ", " to ") or "none",
                "note": effect.get("reason") or f"margin {wording.margin_text(summary['margin'])}",
            }
        )
        over = {"seed": "seeds", "item": "items", "seed x item": "seeds and items", "model": "models"}[
            summary["replicate"]
        ]
        tiles.append({"label": f"Replicates, {over}", "value": f"{effect['n']:,}", "note": effect.get("method") or ""})
    ratio = wording.cost_ratio(summary)
    if ratio:
        tiles.append({"label": "Cost ratio", "value": ratio.split(" ", 1)[0], "note": ratio.split(" ", 1)[1]})
    return tiles


def _axis(summary: Mapping[str, Any]) -> str:
    unit = wording.effect_unit(summary) or summary["endpoint"].replace("_", " ")
    return f"{unit}, right is better"


def _comparison(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    notes = [entry.get("null_word"), entry.get("reason")]
    without = entry.get("without_diverged")
    if without and without[0] is not None:
        left_out = dict(zip(("effect", "low", "high"), without))
        notes.append(f"without diverged pairs {wording.effect_text(left_out)}")
    values = [entry.get("control_mean"), entry.get("treatment_mean")]
    places = wording.decimals(*values)
    return {
        "control": entry["control"],
        "setting": entry.get("setting") or "",
        "endpoint": entry.get("endpoint") or "",
        "unit": entry.get("unit") or "",
        "control_mean": "–" if values[0] is None else wording.plain(values[0], places),
        "treatment_mean": "–" if values[1] is None else wording.plain(values[1], places),
        "effect": wording.signed(entry["effect"], wording.effect_decimals(entry)),
        "interval": wording.interval(entry) or "none",
        "margin": "–" if key in ("secondary", "readings", "references") else wording.margin_text(entry.get("margin")),
        "n": f"{entry['n']:,}",
        "note": "; ".join(note for note in notes if note),
    }


def forest_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[Any]] = {}
    for key in ("effects", "settings", "null_effects"):  # references lie far off and would squeeze the rest
        for entry in summary.get(key, []):
            if entry.get("endpoint") in (None, summary["endpoint"]):
                groups.setdefault((key, entry.get("setting") or ""), []).append(entry)
    for (key, setting), entries in groups.items():
        heading = {
            "effects": "This decides" if setting in ("", "main") else f"{setting}: this decides",
            "settings": f"{setting}: another setting",
            "null_effects": f"{setting}: negative control, must show nothing",
        }[key]
        heading = heading[0].upper() + heading[1:]
        rows.append({"heading": heading})
        for entry in entries[:30]:
            text = wording.effect_text(entry) if entry["effect"] is not None else "undefined"
            label = f"against {entry['control']}"
            rows.append(
                {
                    **{k: entry[k] for k in ("effect", "low", "high")},
                    "label": label,
                    "text": text,
                    "null": key == "null_effects",
                }
            )
    return rows


def _seed_panels(summary: Mapping[str, Any], primary: str) -> list[dict[str, Any]]:
    """One panel per setting and control, the deciding setting first: pairs of values of the same seed."""
    arms = {(arm["setting"], arm["arm"]): arm for arm in summary["arms"]}
    panels = []
    name, better = summary["endpoint"], summary["better"]
    for setting in sorted({arm["setting"] for arm in summary["arms"]}, key=lambda s: (s != primary, s)):
        treated = arms.get((setting, summary["treatment"]))
        for arm in summary["arms"]:
            if treated is None or arm["setting"] != setting or arm["role"] != "control":
                continue
            theirs = dict(zip(arm["seeds"], arm["endpoints"].get(name, [])))
            ours = dict(zip(treated["seeds"], treated["endpoints"].get(name, [])))
            pairs = [
                (theirs[seed], ours[seed]) for seed in theirs if theirs[seed] is not None and ours.get(seed) is not None
            ]
            if not pairs or (len(pairs) == 1 and "item" in summary["replicate"]):
                continue
            won = sum((b > a) if better == "higher" else (b < a) for a, b in pairs)
            panels.append(
                {
                    "title": f"against {arm['arm']}",
                    "subtitle": f"{won:,} of {len(pairs):,} better" + ("" if setting == primary else f" · {setting}"),
                    "setting": setting,
                    "null": arm["null"],
                    "control": arm["arm"],
                    "pairs": pairs,
                    "won": won,
                }
            )
    return panels


def _seed_tables(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per setting: a row a seed, a column an arm, the values of the endpoint as measured."""
    tables = []
    for setting in dict.fromkeys(arm["setting"] for arm in summary["arms"]):
        arms = [arm for arm in summary["arms"] if arm["setting"] == setting]
        values = [dict(zip(arm["seeds"], arm["endpoints"].get(summary["endpoint"], []))) for arm in arms]
        diverged = [{entry["seed"] for entry in arm["diverged"]} for arm in arms]
        seeds = sorted({seed for entry in values for seed in entry})
        places = wording.decimals(*[value for entry in values for value in list(entry.values())[:MOST_ROWS]])
        rows = []
        for seed in seeds[:MOST_ROWS]:
            cells = []
            for entry, lost in zip(values, diverged):
                value = entry.get(seed)
                text = "–" if value is None else wording.plain(value, max(places, 3))
                cells.append(text + (" (diverged)" if seed in lost else ""))
            rows.append({"seed": seed, "cells": cells})
        tables.append(
            {"setting": setting, "arms": [arm["arm"] for arm in arms], "rows": rows, "left_out": len(seeds) - len(rows)}
        )
    return tables


def _curve_panels(summary: Mapping[str, Any], primary: str) -> list[dict[str, Any]]:
    means = summary.get("curve_means") or []
    metrics = [name for name in dict.fromkeys(entry["metric"] for entry in means) if not _over_a_range(name, summary)]
    if not metrics:
        return []
    metric = summary["endpoint"] if summary["endpoint"] in metrics else metrics[0]
    unit = (
        f", {summary['unit']}"
        if metric == summary["endpoint"] and summary["unit"] not in ("", metric.replace("_", " "))
        else ""
    )
    panels = []
    for setting in sorted({entry["setting"] for entry in means}, key=lambda s: (s != primary, s))[:5]:
        chosen = [
            entry for entry in means if entry["setting"] == setting and entry["metric"] == metric and entry["points"]
        ]
        if not chosen:
            continue
        budget = (summary.get("budget") or {}).get(setting, "")
        seeds = _single_curves(summary, chosen, 48 if setting == primary else 24)
        xs = [point[0] for entry in chosen for point in entry["points"]]
        start = min(xs) + 0.08 * (max(xs) - min(xs))
        drawn = [point for entry in [*chosen, *seeds] for point in entry["points"]]
        values = [y for x, y in drawn if x >= start] or [y for _, y in drawn]
        pad = 0.06 * (max(values) - min(values) or abs(max(values)) or 1.0)
        domain = (min(values) - pad, max(values) + pad)
        panels.append(
            {
                "title": "Deciding setting" if setting == "main" else setting,
                "x_title": wording.COST_NAMES.get(budget, "budget"),
                "y_title": metric.replace("_", " ") + unit,
                "domain": domain,
                "cut": any(not domain[0] <= y <= domain[1] for _, y in drawn),
                "seeds": seeds,
                "means": chosen,
                "ends": [
                    {
                        "arm": entry["arm"],
                        "budget": wording.cost_text(budget, entry["points"][-1][0]),
                        "mean": wording.plain(entry["points"][-1][1]),
                        "seeds": entry["seeds"],
                    }
                    for entry in chosen
                ],
                "all_seeds": sum(entry["seeds"] for entry in chosen),
            }
        )
    return panels


def range_panels(summary: Mapping[str, Any], primary: str) -> list[dict[str, Any]]:
    """What the runs of the deciding setting read over a range of something else than the budget: a panel a reading."""
    means = [
        entry
        for entry in summary.get("curve_means") or []
        if entry["setting"] == primary and _over_a_range(entry["metric"], summary) and entry["points"]
    ]
    panels = []
    for metric in list(dict.fromkeys(entry["metric"] for entry in means))[:MOST_RANGES]:
        chosen = [entry for entry in means if entry["metric"] == metric]
        seeds = _single_curves(summary, chosen, 24)
        reading, over = metric.rsplit(OVER, 1)
        xs = [x for entry in chosen for x, _ in entry["points"]]
        values = [y for entry in [*chosen, *seeds] for _, y in entry["points"]]
        pad = 0.06 * (max(values) - min(values) or abs(max(values)) or 1.0)
        places = wording.decimals(*values)
        panels.append(
            {
                "title": reading.replace("_", " "),
                "x_title": over.replace("_", " "),
                "y_title": f"by {over.replace('_', ' ')}",
                "log": min(xs) > 0 and max(xs) >= 16 * min(xs),
                "domain": (min(values) - pad, max(values) + pad),
                "seeds": seeds,
                "means": chosen,
                "readings": [
                    {
                        "arm": entry["arm"],
                        "text": ", ".join(
                            f"{x:.3g}: {wording.plain(y, places)}" for x, y in thin(entry["points"], MOST_POINTS)
                        ),
                        "seeds": entry["seeds"],
                    }
                    for entry in chosen
                ],
                "all_seeds": sum(entry["seeds"] for entry in chosen),
            }
        )
    return panels


def _over_a_range(metric: str, summary: Mapping[str, Any]) -> bool:
    return OVER in metric and metric != summary["endpoint"]


def _single_curves(summary: Mapping[str, Any], chosen: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The curves of single seeds behind the means `chosen`, of each arm as many as leave about `most` together."""
    found: list[dict[str, Any]] = []
    for entry in chosen:
        place = [entry[key] for key in ("setting", "metric", "arm")]
        own = [
            curve
            for curve in summary.get("curves") or []
            if [curve[key] for key in ("setting", "metric", "arm")] == place
        ]
        found += own[: max(1, most // len(chosen))]
    return found


def _costs(summary: Mapping[str, Any], primary: str) -> dict[str, Any]:
    """Mean cost of a run, a row an arm of the deciding setting; for controls also treatment / control."""
    arms = [arm for arm in summary["arms"] if arm["setting"] == primary]
    units = [unit for unit in wording.COST_NAMES if any(unit in arm["cost"] for arm in arms)]
    treated = next((arm for arm in arms if arm["arm"] == summary["treatment"]), None)
    rows = []
    for arm in sorted(arms, key=lambda arm: arm is not treated):
        cells = []
        for unit in units:
            value = arm["cost"].get(unit)
            ratio = ""
            if treated is not None and arm is not treated and value and treated["cost"].get(unit) is not None:
                ratio = wording.ratio_text(treated["cost"][unit] / value)
            cells.append({"value": wording.cost_text(unit, value), "ratio": ratio})
        rows.append({"arm": arm["arm"], "role": arm["role"], "cells": cells})
    held = (summary.get("budget") or {}).get(primary)
    return {
        "units": [{"name": wording.COST_NAMES.get(unit, unit), "held": unit == held} for unit in units],
        "rows": rows,
    }


def _stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [key for key in dict.fromkeys(key for stage in stages for key in stage) if key != "key"]
    rows = [[_stage_cell(key, stage.get(key)) for key in columns] for stage in stages[:MOST_ROWS]]
    return {
        "columns": [wording.COST_NAMES.get(column, column.replace("_", " ")) for column in columns],
        "rows": rows,
        "left_out": len(stages) - len(rows),
    }


def _stage_cell(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and key.endswith(("seconds", "bytes")):
        return wording.cost_text(key, value)
    return _text(value)


def _arm_row(arm: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    values = [value for value in arm["endpoints"].get(summary["endpoint"], []) if value is not None]
    return {
        **{key: arm[key] for key in ("arm", "setting", "role", "about", "divergences")},
        "n": len(values),
        "mean": wording.plain(sum(values) / len(values)) if values else "undefined",
        "options": ", ".join(f"{key}={_text(value)}" for key, value in arm["options"].items()),
        "failed": len(arm["failed"]),
        "reasons": list(dict.fromkeys([entry["reason"] for entry in [*arm["diverged"], *arm["undefined"]]]))[:5],
    }


def _provenance(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    totals = summary.get("totals") or {}
    ran = f"{totals['runs']:,} runs, {wording.duration(totals['wall_seconds'])} of wall time together" if totals else ""
    return [
        (name, text)
        for name, text in (
            ("Date", summary["date"]),
            ("Preset", summary["preset"]),
            ("Runs", ran),
            ("Inputs", ", ".join(f"{key} {_text(value)}" for key, value in summary["inputs"].items())),
            ("Interval", summary["interval_method"] or "none"),
            (
                "Hardware",
                ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in summary["hardware"].items()),
            ),
            ("Versions", ", ".join(f"{key} {_text(value)}" for key, value in summary["versions"].items())),
        )
        if text
    ]


def _tuning(tuning: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Name and text of every entry; the single tries stay in the JSON. Empty where nothing was tuned."""
    if not tuning or tuning.get("origin") == "none":
        return []
    return [(key.replace("_", " "), _text(value)) for key, value in tuning.items() if key != "rows"]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) or "none"
    return str(value) if value != "" else "empty"
