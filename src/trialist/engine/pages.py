"""What was measured, written into pages about techniques: between two marks, from the evidence files, by the tool alone.

A page says where: `<!-- measured: TRIAL TRIAL ... -->`, and `<!-- end of what was measured -->` below. All that stands between
the two is replaced.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trialist.engine import wording
from trialist.engine.evidence import load_evidence, row_of
from trialist.engine.plain import thin
from trialist.engine.view import range_panels

BEGIN = re.compile(r"^<!-- measured: ([^\n]*?) -->$", re.MULTILINE)
END = "<!-- end of what was measured -->"
MOST_ENDPOINTS, MOST_COLUMNS = 5, 16
"""Columns of the tables of arms and of readings; the report has all"""


def render_pages(folder: str | Path, evidence: str | Path) -> dict[Path, str]:
    """Text of every Markdown page below `folder` that has marks, with what the files below `evidence` say between them.

    Raises FileNotFoundError without either folder; ValueError for a mark that names no trial, or has no end.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found: dict[str, list[dict[str, Any]]] = {}
    for document in load_evidence(evidence):
        found.setdefault(document["trial"], []).append(document)
    pages = {}
    for path in sorted(Path(folder).rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if BEGIN.search(text):
            pages[path] = fill(text, found, str(path))
    return pages


def fill(text: str, found: Mapping[str, Sequence[Mapping[str, Any]]], page: str = "the page") -> str:
    """A page with each stretch between marks written anew. found: documents by trial. page: what errors call it."""
    written, place = [], 0
    for mark in BEGIN.finditer(text):
        names = mark[1].split()
        end = text.find(END, mark.end())
        following = BEGIN.search(text, mark.end())
        if not names:
            raise ValueError(f"{page}: {mark[0]} names no trial")
        if end < 0 or (following is not None and following.start() < end):
            raise ValueError(f"{page}: {mark[0]} has no {END} below it")
        sections = [section(name, found.get(name, ())) for name in names]
        written += [text[place : mark.end()], "\n\n", "\n\n".join(sections), "\n\n"]
        place = end
    return "".join(written) + text[place:]


def section(trial: str, documents: Sequence[Mapping[str, Any]]) -> str:
    """What was measured of one trial, as Markdown."""
    from trialist.engine.report import templates

    template = templates().get_template("measured.md")
    return template.render(trial=trial, entries=[_entry(document) for document in documents]).strip()


def _entry(document: Mapping[str, Any]) -> dict[str, Any]:
    primary = document.get("setting") or next(arm["setting"] for arm in document["arms"] if not arm["null"])
    return {
        **row_of({**document, "name": document["preset"], "path": ""}),
        "arms": _arms(document, primary),
        "readings": _readings(range_panels(document, primary)),
    }


def _arms(document: Mapping[str, Any], primary: str) -> dict[str, Any]:
    """Means over seeds in the deciding setting, with their standard deviation: a row an arm, a column an endpoint."""
    arms = [arm for arm in document["arms"] if arm["setting"] == primary]
    names = dict.fromkeys(name for arm in arms for name in arm["endpoints"])
    order = sorted(names, key=lambda name: name != document["endpoint"])[:MOST_ENDPOINTS]
    places = {name: _places([arm["endpoints"].get(name) for arm in arms]) for name in order}
    rows = []
    for arm in sorted(arms, key=lambda arm: arm["arm"] != document["treatment"]):
        cells = [_spread(arm["endpoints"].get(name), places[name]) for name in order]
        rows.append({"arm": arm["arm"], "role": arm["role"], "about": arm.get("about") or "", "cells": cells})
    return {"columns": [name.replace("_", " ") for name in order], "rows": rows}


def _places(columns: Sequence[Sequence[float | None] | None]) -> int:
    """Decimals that show two digits of the largest standard deviation, or three of the largest mean where none differs."""
    defined = [[value for value in values or () if value is not None] for values in columns]
    spread = max((statistics.stdev(values) for values in defined if len(values) > 1), default=0.0)
    if spread > 0:
        return max(0, wording.decimals(spread) - 1)
    return wording.decimals(*(statistics.fmean(values) for values in defined if values))


def _spread(values: Sequence[float | None] | None, places: int) -> str:
    defined = [value for value in values or () if value is not None]
    if not defined:
        return "–"
    text = wording.plain(statistics.fmean(defined), places)
    return f"{text} ± {wording.plain(statistics.stdev(defined), places)}" if len(defined) > 1 else text


def _readings(panels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Readings over a range as tables: a row an arm, a column a point. What one arm alone reads over one range is one table, a
    row a reading; where the arms' points are not the same ones, each arm has its own line."""
    tables: list[dict[str, Any]] = []
    for panel in panels:
        points = {entry["arm"]: dict(thin(entry["points"], MOST_COLUMNS)) for entry in panel["means"]}
        digits = wording.decimals(*(y for found in points.values() for y in found.values()))
        texts = {arm: [wording.plain(y, digits) for y in found.values()] for arm, found in points.items()}
        columns = [[f"{x:.4g}" for x in found] for found in points.values()]
        over, alone = panel["x_title"], next(iter(points)) if len(points) == 1 else None
        if any(own != columns[0] for own in columns):
            lines = {arm: list(zip(own, texts[arm])) for arm, own in zip(points, columns)}
            tables.append({"title": panel["title"], "over": over, "lines": lines})
        elif (
            alone
            and tables
            and [tables[-1].get(key) for key in ("arm", "over", "columns")] == [alone, over, columns[0]]
        ):
            tables[-1]["rows"][panel["title"]] = texts[alone]
        else:
            rows = {panel["title"] if alone else arm: cells for arm, cells in texts.items()}
            title = alone or panel["title"]
            tables.append({"title": title, "over": over, "arm": alone, "columns": columns[0], "rows": rows})
    return tables
