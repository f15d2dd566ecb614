"""The page of a contamination analysis: one HTML file without any reference to the network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

WIDTH = 170
"""Of the drawing of a rate and its interval, in pixels"""
AROUND = 160
"""Characters shown on both sides of the longest match of a long item"""
LONG = 600
"""Characters from which on an item is cut"""


def render(report: Mapping[str, Any], examples: int = 20) -> str:
    """The page. examples: most matches shown of each benchmark and data set, those that contaminate first."""
    trains = [_train(train, report, examples) for train in report["train"]]
    page = _templates().get_template("contamination.html")
    return page.render(report=report, trains=trains, headline=headline(report), rule=rule_in_words(report["settings"]))


def headline(report: Mapping[str, Any]) -> str:
    """What was found, in one sentence, the worst first."""
    entries = [(entry, train["name"]) for train in report["train"] for entry in train["benchmarks"] if entry["items"]]
    above = sorted((found for found in entries if found[0]["above"]), key=lambda found: -found[0]["rate"])
    limit = f"{report['settings']['rate']:.1%}"
    if not above:
        sums = [
            (sum(entry["contaminated"] for entry in train["benchmarks"]), train["name"]) for train in report["train"]
        ]
        most, train = max(sums, key=lambda found: found[0])
        none = (
            "No item is contaminated" if not most else f"No benchmark has more than {limit} of its items contaminated"
        )
        matches = f"{most:,} of {sum(benchmark['items'] for benchmark in report['benchmarks']):,} items match"
        return f"{none}: at most {matches}, in {train}." if len(sums) > 1 and most else f"{none}: {matches}."
    entry, train = above[0]
    settings = report["settings"]
    match = {
        "any": "share an n-gram with the training data",
        "whole": "stand word for word in the training data",
    }.get(settings["rule"], f"stand by more than {settings['coverage']:.0%} in the training data")
    where = f" {train}" if len(report["train"]) > 1 else ""
    rest = "" if len(above) == 1 else f"; {len(above) - 1} more above {limit}"
    return f"{entry['rate']:.1%} of the items of {entry['name']} {match}{where}{rest}."


def rule_in_words(settings: Mapping[str, Any]) -> str:
    unit = "tokens" if settings["words"] == "tokens" else "words"
    grams = f"n-grams of {settings['n']} {unit}"
    share = f"{settings['coverage']:.0%}"
    return {
        "tulu3": f"An item is contaminated when {grams} shared with one training row cover more than {share} of its {unit}.",
        "any": f"An item is contaminated when it shares one n-gram of {settings['n']} {unit} with a training row.",
        "whole": f"An item is contaminated when all its {unit} stand in a training row, one after the other.",
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
    shown = []
    for entry in train["benchmarks"]:
        items = [item for item in train["items"] if item["benchmark"] == entry["name"] and not item["short"]]
        hits = [item for item in items if item["contaminated"]]
        others = [item for item in items if not item["contaminated"]]
        if items:
            shown.append(
                {
                    "name": entry["name"],
                    "hits": [_example(item) for item in hits[:examples]],
                    "others": [_example(item) for item in others[: max(0, examples - len(hits))]],
                    "below": len(others),
                    "largest below": max((item["share"] for item in others), default=0.0),
                    "left out": max(0, len(items) - examples),
                }
            )
    incomparable = any(entry["ignored"] or entry["empty"] for entry in train["benchmarks"])
    return {**train, "rows_of_benchmarks": rows, "shown": shown, "incomparable": incomparable}


def _example(item: Mapping[str, Any]) -> dict[str, Any]:
    fields = []
    for number, text in enumerate(item["fields"]):
        spans = [(begin, end) for field, begin, end in item["spans"] if field == number]
        fields.append(around(text, spans))
    before, behind = item["row goes on"]
    row = [(False, "… ")] * before + marked(item["row text"], item["row spans"]) + [(False, " …")] * behind
    return {**item, "marked": fields, "marked_row": row}


def around(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[bool, str]]:
    """`marked` of the text; of a long one from shortly before the longest span to shortly behind it, or of its beginning."""
    if len(text) <= LONG:
        return marked(text, spans)
    begin, end = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    first, behind = max(0, begin - AROUND), min(len(text), end + AROUND)
    inside = [(max(a, first) - first, min(b, behind) - first) for a, b in spans if b > first and a < behind]
    pieces = marked(text[first:behind], inside)
    return [(False, "… ")] * (first > 0) + pieces + [(False, " …")] * (behind < len(text))


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
