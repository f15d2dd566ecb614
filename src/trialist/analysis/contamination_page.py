"""The page of a contamination analysis: one HTML file without any reference to the network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

WIDTH = 220
"""Of the drawing of a rate and its interval, in pixels"""


def render(report: Mapping[str, Any], examples: int = 20) -> str:
    """The page. examples: most matches shown of each benchmark and data set."""
    trains = [_train(train, report, examples) for train in report["train"]]
    page = _templates().get_template("contamination.html")
    return page.render(report=report, trains=trains, headline=headline(report), rule=rule_in_words(report["settings"]))


def headline(report: Mapping[str, Any]) -> str:
    """What was found, in one sentence, the worst first."""
    entries = [(entry, train["name"]) for train in report["train"] for entry in train["benchmarks"] if entry["items"]]
    above = sorted((found for found in entries if found[0]["above"]), key=lambda found: -found[0]["rate"])
    limit = f"{report['settings']['rate']:.1%}"
    if not above:
        total = sum(entry["contaminated"] for entry, _ in entries)
        none = (
            "No item is contaminated" if not total else f"No benchmark has more than {limit} of its items contaminated"
        )
        return f"{none}: {total:,} of {sum(entry['items'] for entry, _ in entries):,} items match."
    entry, train = above[0]
    where = f" in {train}" if len(report["train"]) > 1 else ""
    rest = "" if len(above) == 1 else f", and {len(above) - 1} more above {limit}"
    return f"{entry['rate']:.1%} of {entry['name']} stands in the training data{where}{rest}."


def rule_in_words(settings: Mapping[str, Any]) -> str:
    unit = "tokens" if settings["words"] == "tokens" else "words"
    grams = f"n-grams of {settings['n']} {unit}"
    share = f"{settings['coverage']:.0%}"
    return {
        "tulu3": f"An item is contaminated when {grams} shared with one training row cover more than {share} of its {unit}.",
        "any": f"An item is contaminated when it shares one n-gram of {settings['n']} {unit} with a training row.",
        "longest": f"An item is contaminated when {grams} shared with one training row cover more than {share} of it in one run.",
        "union": f"An item is contaminated when {grams} shared with any training rows together cover more than {share} of it.",
    }[settings["rule"]]


def _train(train: Mapping[str, Any], report: Mapping[str, Any], examples: int) -> dict[str, Any]:
    rate = report["settings"]["rate"]
    widest = max([rate * 1.5, *(entry["high"] or 0.0 for entry in train["benchmarks"])])
    rows = []
    for entry in train["benchmarks"]:
        scaled = {key: round((entry[key] or 0.0) / widest * WIDTH, 1) for key in ("rate", "low", "high")}
        rows.append({**entry, "drawn": scaled, "limit": round(rate / widest * WIDTH, 1), "width": WIDTH})
    shown: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, int] = {}
    for item in train["items"]:
        if item["short"]:
            continue
        matches = shown.setdefault(item["benchmark"], [])
        if len(matches) < examples:
            matches.append(_example(item))
        else:
            left_out[item["benchmark"]] = left_out.get(item["benchmark"], 0) + 1
    return {**train, "rows_of_benchmarks": rows, "shown": shown, "left_out": left_out}


def _example(item: Mapping[str, Any]) -> dict[str, Any]:
    fields = []
    for number, text in enumerate(item["fields"]):
        spans = [(begin, end) for field, begin, end in item["spans"] if field == number]
        fields.append(marked(text, spans))
    before, behind = item["row goes on"]
    row = [(False, "… ")] * before + marked(item["row text"], item["row spans"]) + [(False, " …")] * behind
    return {**item, "marked": fields, "marked_row": row}


def marked(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it lies within a span; spans are sorted and do not overlap."""
    pieces = []
    at = 0
    for begin, end in spans:
        pieces += [(False, text[at:begin]), (True, text[begin:end])]
        at = end
    return [piece for piece in [*pieces, (False, text[at:])] if piece[1]]


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
