"""The committed results as one page and one picture. Every number comes from the JSON files, and none is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trialist.engine import wording
from trialist.engine.summary import EVIDENCE_KEYS, SCHEMA

WORD_COLOURS = {
    "supported": "#0b6b4f",
    "small": "#0a62a5",
    "no effect": "#4f5866",
    "contradicted": "#b3420a",
    "inconclusive": "#7a5b00",
    "void": "#74408f",
}
AGAIN = "write it again with `trialist run --save-evidence`"
COPIED = ("trial", "name", "path", "verdict", "claim", "source", "reported", "unit", "reason", "date", "command")


def load_evidence(folder: str | Path) -> list[dict[str, Any]]:
    """All `TRIAL/NAME.json` below the folder, what speaks against a claim first.

    Raises FileNotFoundError without the folder, ValueError that names a broken file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; `trialist run NAME --save-evidence` makes it")
    found = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); {AGAIN}") from error
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            schema = document.get("schema") if isinstance(document, dict) else None
            raise ValueError(f"{path}: schema {schema!r}, this version reads {SCHEMA}; {AGAIN}")
        lost = [key for key in EVIDENCE_KEYS if key not in document]
        if lost:
            raise ValueError(f"{path}: lacks {', '.join(lost)}; {AGAIN}")
        if document["verdict"] not in wording.WORDS:
            raise ValueError(f"{path}: verdict {document['verdict']!r} is none of {', '.join(wording.WORDS)}")
        found.append(document | {"name": path.stem, "path": path.relative_to(folder).as_posix()})
    return sorted(found, key=lambda entry: (wording.WORDS.index(entry["verdict"]), entry["trial"], entry["name"]))


def render_evidence(folder: str | Path) -> tuple[str, str]:
    """`EVIDENCE.md` and `evidence.svg` as text; the same files give the same text."""
    from trialist.engine.charts import describe
    from trialist.engine.report import templates

    documents = load_evidence(folder)
    rows = [row_of(document) for document in documents]
    picture = describe(picture_of(rows), "evidence", f"Measured verdicts. {_alt(rows)}") + "\n"
    counts = {word: sum(row["verdict"] == word for row in rows) for word in wording.WORDS}
    page = templates().get_template("evidence.md").render(rows=rows, counts=counts, folder=Path(folder).name)
    return page.strip() + "\n", picture


def measured(documents: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Trial -> name of the evidence file -> verdict with its effect, on one line, as `trialist list` shows it."""
    found: dict[str, dict[str, str]] = {}
    for row in map(row_of, documents):
        text = f"{row['verdict']}, {row['effect']}" if row["n"] else row["verdict"]
        found.setdefault(row["trial"], {})[row["name"]] = text
    return {trial: dict(sorted(entries.items())) for trial, entries in sorted(found.items())}


def row_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of one evidence file, with `name` and `path` of it, in the words that are printed."""
    none = {"effect": None, "control": "", "n": 0, "reason": document["reason"]}
    effect = wording.weakest(document["effects"]) or none
    margin, unit = document["margin"], wording.effect_unit(document)
    scaled = {}
    if margin and effect["effect"] is not None:
        scaled = {key: effect[key] / margin for key in ("effect", "low", "high") if effect.get(key) is not None}
    return {
        **{key: document[key] for key in COPIED},
        "sentence": wording.sentence(document.get("sentence") or document["reason"]),
        "advice": wording.sentence(document.get("advice")),
        "url": wording.source_url(document["source"]),
        "endpoint": document["endpoint"].replace("_", " "),
        "margin": wording.margin_text(margin),
        "kind": document.get("kind") or "superiority",
        "control": effect["control"],
        "effect": wording.effect_text(effect, unit),
        "n": effect["n"],
        "replicate": document["replicate"],
        "lines": [
            *[f"against {entry['control']}: {_line(entry, unit)}" for entry in document["effects"]],
            *[f"saving of {entry['endpoint']}: {_line(entry)}" for entry in document.get("savings") or []],
            *[f"guard {entry['endpoint']} against {entry['control']}: {_line(entry)}" for entry in document["guards"]],
            *[
                f"negative control {entry['setting']}, against {entry['control']}: {_line(entry, unit)}"
                for entry in document["null_effects"]
            ],
            *[f"reference {entry['control']}: {_line(entry, unit)}" for entry in document.get("references") or []],
            *[
                f"setting {entry['setting']}, against {entry['control']}: {_line(entry, unit)}"
                for entry in document["settings"]
            ],
        ],
        "cost": {
            wording.COST_NAMES.get(unit, unit): wording.ratio_text(value)
            for unit, value in document["cost_ratio"].items()
            if value is not None
        },
        "cost_short": wording.cost_ratio(document),
        "scaled": scaled,
        "line": f"{document['endpoint'].replace('_', ' ')}, {document['name']}, n {effect['n']:,}",
    }


def _line(entry: Mapping[str, Any], unit: str = "") -> str:
    word = f" ({entry['null_word']})" if entry.get("null_word") else ""
    return f"{wording.effect_text(entry, unit)}, n {entry['n']:,}{word}"


def _alt(rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        "; ".join(f"{row['trial']} ({row['name']}): {row['verdict']}, {row['effect']}" for row in rows)
        or "no results yet"
    )


def picture_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """All results on one card that stands alone: name, effect in units of its margin, verdict; light and dark.

    rows: `trial`, `line` (what was measured, in short), `scaled` (effect, low, high over the margin; empty where
    undefined), `verdict`, `cost_short`.
    """
    import altair as alt

    from trialist.engine.charts import BAND, GRID, INK, MUTED, PAPER, Board, dark_rules

    board = Board()
    width, step, head, left, right = 860, 62, 74, 300, 640
    height = head + step * len(rows) + 8
    reach = max([3.0, *(abs(value) for row in rows for value in row["scaled"].values())]) * 1.25
    x_scale = alt.Scale(type="symlog", constant=1, domain=[-reach, reach], range=[left, right], nice=False)
    y_scale = alt.Scale(domain=[0, height], range=[0, height], nice=False, zero=False)
    ticks = [sign * size for size in (1, 3, 10, 30, 100, 300, 1000) for sign in (-1, 1) if size < reach]

    def x(field: str) -> Any:
        return alt.X(field, scale=x_scale, axis=None)

    def y(field: str = "y:Q") -> Any:
        return alt.Y(field, scale=y_scale, axis=None)

    def words(values: list[dict[str, Any]], at: float, **style: Any) -> Any:
        return board.chart(values).mark_text(**style).encode(x=alt.value(at), y=y(), text=alt.Text("text:N"))

    spread = {"top": head - 8, "bottom": height - 8}
    vertical = {"y": y("top:Q"), "y2": alt.Y2("bottom:Q")}
    numbers = [{"x": tick, "y": head - 18, "text": f"{tick:+d}".replace("-", "−")} for tick in ticks]
    middle, grey = (left + right) / 2, {"color": MUTED, "fontSize": 11}
    text, colour = alt.Text("text:N"), alt.Color("colour:N", scale=None)
    filled = {"fill": alt.Fill("colour:N", scale=None), "stroke": alt.Stroke("colour:N", scale=None)}
    band = board.chart([{"low": -1, "high": 1, **spread}]).mark_rect(color=BAND)
    zero = board.chart([{"x": 0, **spread}]).mark_rule(color=INK, strokeWidth=1)
    axis = board.chart([*numbers, {"x": 0, "y": head - 18, "text": "0"}]).mark_text(**grey)
    edges = board.chart([{"y": head + step * i - 8} for i in range(len(rows))]).mark_rule(color=GRID, strokeWidth=1)
    layers = [
        band.encode(x=x("low:Q"), x2=alt.X2("high:Q"), **vertical),
        zero.encode(x=x("x:Q"), **vertical),
        axis.encode(x=x("x:Q"), y=y(), text=text),
        words([{"y": 26, "text": "effect in margins (the least worth having is 1)"}], middle, **grey),
        words([{"y": 42, "text": "← worse"}], middle - 12, align="right", **grey),
        words([{"y": 42, "text": "better →"}], middle + 12, align="left", **grey),
        edges.encode(x=alt.value(20), x2=alt.value(width - 20), y=y()),
    ]
    places = [
        {**row, "y": head + step * i + step / 2 - 8, "colour": WORD_COLOURS[row["verdict"]]}
        for i, row in enumerate(rows)
    ]
    names = [{"y": place["y"] - 9, "text": place["trial"]} for place in places]
    below = [{"y": place["y"] + 10, "text": place["line"]} for place in places]
    missing = [{"y": place["y"], "text": "undefined"} for place in places if not place["scaled"]]
    drawn = [{"y": place["y"], "colour": place["colour"], **place["scaled"]} for place in places if place["scaled"]]
    intervals = board.chart([mark for mark in drawn if "low" in mark and "high" in mark])
    estimates = board.chart(drawn).mark_point(shape="diamond", size=110, opacity=1)
    chips = board.chart([{"y": p["y"] - 21, "y2": p["y"] + 3, "colour": p["colour"]} for p in places])
    chips = chips.mark_rect(cornerRadius=12, fillOpacity=0, strokeWidth=1.5)
    chip_left, chip_right = right + 50, width - 24
    verdict = board.chart([{"y": p["y"] - 8.5, "text": p["verdict"], "colour": p["colour"]} for p in places])
    verdict = verdict.mark_text(fontSize=13, fontWeight="bold")
    costs = [{"y": place["y"] + 15, "text": place["cost_short"]} for place in places]
    layers += [
        words(names, 24, align="left", fontSize=15, fontWeight="bold", color=INK, limit=left - 40),
        words(below, 24, align="left", fontSize=12, color=MUTED, limit=left - 40),
        words(missing, middle + 52, align="left", **grey),
        intervals.mark_rule(strokeWidth=3, strokeCap="round").encode(
            x=x("low:Q"), x2=alt.X2("high:Q"), y=y(), color=colour
        ),
        estimates.encode(x=x("effect:Q"), y=y(), **filled),
        chips.encode(
            x=alt.value(chip_left), x2=alt.value(chip_right), y=y(), y2=alt.Y2("y2:Q"), stroke=filled["stroke"]
        ),
        verdict.encode(x=alt.value((chip_left + chip_right) / 2), y=y(), text=text, color=colour),
        words(costs, (chip_left + chip_right) / 2, **grey),
    ]
    svg = board.draw({**board.layer(layers, width, height), "padding": 0})
    style = f"<style>@media (prefers-color-scheme: dark){{{dark_rules('svg')}}}</style>"
    card = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="{PAPER}" stroke="{GRID}"/>'
    return svg.replace(">", f">{style}{card}", 1)
