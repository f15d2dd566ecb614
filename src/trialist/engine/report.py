"""The report of a trial as one self-contained HTML page, as Markdown and as JSON, all from the summary document."""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine import wording
from trialist.engine.home import write_atomic
from trialist.engine.plain import dump_json
from trialist.engine.records import Verdict
from trialist.engine.view import forest_rows, view_of

if TYPE_CHECKING:
    from jinja2 import Environment

FORMATS = ("html", "md", "json")
MOST_PANELS = 8


def write_report(summary: Mapping[str, Any], path: str | Path | None = None, format: str | None = None) -> Path:
    """Writes the report and returns its path. The format is `html`, `md` or `json`; else the path's ending decides.

    Without a path the page goes to a new temporary folder. Raises ValueError for an ending that names no format.
    """
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="trialist-")) / f"{summary['trial']}.{format or 'html'}"
    chosen = format or {"htm": "html", "markdown": "md"}.get(Path(path).suffix[1:], Path(path).suffix[1:])
    if chosen not in FORMATS:
        raise ValueError(
            f"report {path}: format {chosen!r} is unknown; end the path in .html, .md or .json, or pass --format"
        )
    return write_atomic(path, render(summary, chosen))


def render(summary: Mapping[str, Any], format: str = "html") -> str:
    """The report in one of the formats `html`, `md` and `json`."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    return {"html": render_html, "md": render_markdown, "json": render_json}[format](summary)


def render_html(summary: Mapping[str, Any]) -> str:
    """One page without any reference to the network; pictures are inline SVG, wide and narrow."""
    view = view_of(summary)
    return templates().get_template("report.html").render(**view, figures=_figures(summary, view), style=_style())


def render_markdown(summary: Mapping[str, Any]) -> str:
    return templates().get_template("report.md").render(**view_of(summary)).strip() + "\n"


def render_json(summary: Mapping[str, Any]) -> str:
    return dump_json(dict(summary))


def render_index(
    summaries: Sequence[Mapping[str, Any]], format: str = "html", links: Mapping[tuple[str, str], str] | None = None
) -> str:
    """All trials on one page: verdict, effect, cost. `links` maps `(trial, preset)` to the address of a report."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; one of {', '.join(FORMATS)}")
    ordered = sorted(
        summaries, key=lambda entry: (wording.WORDS.index(entry["verdict"]), entry["trial"], entry["preset"])
    )
    if format == "json":
        return dump_json({"schema": 1, "trials": [dict(summary) for summary in ordered]})
    rows = []
    for summary in ordered:
        effect = wording.weakest(summary["effects"])
        rows.append(
            {
                **{
                    key: summary[key]
                    for key in ("trial", "preset", "verdict", "claim", "date", "endpoint", "unit", "margin")
                },
                "sentence": wording.sentence(summary.get("sentence") or summary["reason"]),
                "advice": wording.sentence(summary.get("advice")),
                "effect": wording.effect_text(effect, wording.effect_unit(summary)) if effect else "none",
                "control": effect["control"] if effect else "",
                "n": effect["n"] if effect else 0,
                "cost": wording.cost_ratio(summary),
                "link": (links or {}).get((summary["trial"], summary["preset"])),
            }
        )
    counts = {word: sum(row["verdict"] == word for row in rows) for word in wording.WORDS}
    page = templates().get_template(f"index.{format}")
    return page.render(rows=rows, counts=counts, meaning=wording.MEANING, style=_style()).strip() + "\n"


def verdict_html(verdict: Verdict) -> str:
    """A small card for notebooks; it carries its own style and follows the notebook's light or dark ground."""
    effects = [
        {"control": effect.control, "n": effect.n, "text": wording.effect_text(dataclasses.asdict(effect))}
        for effect in verdict.effects
    ]
    return templates().get_template("card.html").render(verdict=verdict, effects=effects)


@functools.cache
def templates() -> Environment:
    """The page templates; HTML is escaped, `cell` makes text safe inside a Markdown table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    environment.filters["code"] = lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
    environment.filters["sentence"] = wording.sentence
    environment.globals |= {"symbols": wording.SYMBOLS, "meaning": wording.MEANING, "Markup": Markup}
    return environment


@functools.cache
def _style() -> str:
    from markupsafe import Markup

    from trialist.engine.charts import dark_rules

    text = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    return Markup(text + "@media screen and (prefers-color-scheme: dark){" + dark_rules("svg") + "}\n")


def _figures(summary: Mapping[str, Any], view: Mapping[str, Any]) -> dict[str, Any]:
    """Picture name -> the SVG twice, wide and narrow, with its text alternative."""
    from markupsafe import Markup

    from trialist.engine import charts

    def both(name: str, words: str, draw: Any) -> dict[str, Any]:
        return {
            size: Markup(charts.describe(draw(width), f"{name}-{size}", words))
            for size, width in (("wide", charts.WIDE), ("narrow", charts.NARROW))
        }

    figures: dict[str, Any] = {"forest": None, "seeds": None, "curves": None, "ranges": None}
    rows = forest_rows(summary)
    if any(row.get("effect") is not None for row in rows):
        words = "; ".join(f"{row['label']}: {row['text']}" for row in rows if "label" in row)
        figures["forest"] = both(
            "forest",
            f"Effects with 95 % intervals, margin {view['margin']}. {words}",
            lambda width: charts.forest(
                rows,
                margin=summary["margin"],
                kind=summary.get("kind") or "superiority",
                title=view["axis"],
                width=width,
            ),
        )
    panels = view["panels"][:MOST_PANELS]
    if panels:
        words = "; ".join(f"{panel['setting']}, {panel['title']}: {panel['subtitle']}" for panel in panels)
        figures["seeds"] = both(
            "seeds",
            f"{summary['endpoint']} of each seed under the control and under the treatment. {words}",
            lambda width: charts.paired(panels, title=view["axis"], better=summary["better"], width=width),
        )
        figures["seeds_note"] = _left_out(view["panels"], panels, charts.MOST_LINES)
    shown = view["curve_panels"]
    arms = [entry["arm"] for panel in [*shown, *view["range_panels"]] for entry in panel["means"]]
    styles = charts.arm_styles(arms, summary["treatment"])
    if shown:
        words = "; ".join(
            f"{panel['title']}, {entry['arm']}: ends at {wording.plain(entry['points'][-1][1])}"
            for panel in shown
            for entry in panel["means"]
        )
        figures["curves"] = both(
            "curves", f"Learning curves. {words}", lambda width: charts.curves(shown, styles, width=width)
        )
        figures["curves_legend"] = _legend(shown, styles)
        notes = _not_drawn(shown)
        if any(panel["cut"] for panel in shown):
            notes.append("The steep start is cut off so that the end can be read.")
        figures["curves_note"] = " ".join(notes)
    ranges = view["range_panels"]
    if ranges:
        words = "; ".join(
            f"{panel['title']} {panel['y_title']}, {entry['arm']}: {entry['text']}"
            for panel in ranges
            for entry in panel["readings"]
        )
        figures["ranges"] = both(
            "ranges", f"Readings over a range. {words}",
            lambda width: charts.curves(ranges, styles, width=width, large=len(ranges) == 1),
        )  # fmt: skip
        figures["ranges_legend"] = _legend(ranges, styles)
        figures["ranges_note"] = " ".join(_not_drawn(ranges))
    return figures


def _legend(panels: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, list[int]]]) -> list[dict[str, str]]:
    arms = {entry["arm"] for panel in panels for entry in panel["means"]}
    return [
        {"arm": arm, "colour": colour, "dash": " ".join(map(str, dash))}
        for arm, (colour, dash) in styles.items()
        if arm in arms
    ]


def _not_drawn(panels: Sequence[Mapping[str, Any]]) -> list[str]:
    drawn, total = sum(len(panel["seeds"]) for panel in panels), sum(panel["all_seeds"] for panel in panels)
    return [f"{drawn:,} of {total:,} single curves are drawn; the means are over all."] if drawn < total else []


def _left_out(panels: Sequence[Any], drawn: Sequence[Any], most: int) -> str:
    notes = []
    if len(drawn) < len(panels):
        notes.append(f"{len(drawn)} of {len(panels)} comparisons are drawn; the table below has all.")
    if any(len(panel["pairs"]) > most for panel in drawn):
        notes.append(f"At most {most} lines per panel are drawn; means and counts are over all seeds.")
    return " ".join(notes)
