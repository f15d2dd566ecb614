"""The pictures of a report as static SVG, described with altair and drawn by vl-convert without a browser.

Colours are written in their light form; `PALETTE` maps each to its form on a dark ground, and the style sheet swaps them
by attribute, so that one SVG serves both. Each picture exists wide and narrow: scaled-down words are unreadable.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

INK, MUTED, GRID, BAND, PAPER = "#1b1f24", "#667085", "#e3e6ea", "#edf1f5", "#fffffe"
GAIN, LOSS = "#0a62a4", "#c4570c"
TREATMENT = GAIN
CONTROLS = ("#8a7f73", "#b8860f", "#87589e", "#2d8273", "#b0486f", "#4d4d59", "#9c6b30", "#5f7f1f")
DASHES: tuple[list[int], ...] = ([], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [10, 4], [4, 2, 1, 2], [3, 5])
PALETTE = {
    INK: "#eceef1",
    MUTED: "#a0a8b4",
    GRID: "#33383f",
    BAND: "#262d35",
    PAPER: "#15181c",
    GAIN: "#6bb5f2",
    LOSS: "#f0955a",
    "#8a7f73": "#b8ab9d",
    "#b8860f": "#e0b34a",
    "#87589e": "#c39ad8",
    "#2d8273": "#63c2b0",
    "#b0486f": "#ea8fb2",
    "#4d4d59": "#c0c0cc",
    "#9c6b30": "#d3a36a",
    "#5f7f1f": "#a9cc64",
    "#0b6b4f": "#58c9a0",
    "#0a62a5": "#6bb5f2",
    "#4f5866": "#b4bcc8",
    "#b3420a": "#f0955a",
    "#7a5b00": "#e0b84a",
    "#74408f": "#cf9de8",
}
"""Colour on a light ground -> colour on a dark one"""
WIDE, NARROW = 720, 340
MOST_LINES = 60
"""Lines of single seeds drawn per panel"""
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"


def arm_styles(arms: Sequence[str], treatment: str) -> dict[str, tuple[str, list[int]]]:
    """Arm -> colour and dash pattern; the treatment is always the solid blue line."""
    others = [arm for arm in dict.fromkeys(arms) if arm != treatment]
    styles = {arm: (CONTROLS[i % len(CONTROLS)], DASHES[(i + 1) % len(DASHES)]) for i, arm in enumerate(others)}
    return {treatment: (TREATMENT, []), **styles}


def forest(rows: Sequence[Mapping[str, Any]], *, margin: float | None, kind: str, title: str, width: int) -> str:
    """Effects with their intervals, one above the other, against zero and the margin.

    rows: `heading`, or `label`, `text`, `effect`, `low`, `high` (None where undefined) and `null`. Positive is better.
    Wide, the words stand left and right of the intervals; narrow, above them.
    """
    import altair as alt

    board = Board()
    small = width <= 500
    room = 10 + 6.7 * max((len(row["text"]) for row in rows if "text" in row), default=20)  # of the values in words
    left, right = (4, width - 4) if small else (252, width - max(176, min(room, 260)))
    top, marks, headings, labels = 26, [], [], []
    for row in rows:
        if "heading" in row:
            top += 36
            headings.append({"y": top - 10, "text": row["heading"]})
            continue
        lines = [row["label"]] if small else _wrap(row["label"], 38, 3)
        height = 50 if small else 22 + 16 * len(lines)
        middle = top + (36 if small else height / 2)
        words = top + 14 if small else middle
        labels += [{"y": words + 16 * (i - (len(lines) - 1) / 2), "text": line} for i, line in enumerate(lines)]
        entry = {
            "y": middle,
            "words": words,
            "text": row["text"],
            "top": middle - 11 if small else top,
            "bottom": middle + 11 if small else top + height,
        }
        colour = MUTED if row.get("null") else LOSS if (row["effect"] or 0) < 0 else GAIN
        marks.append(
            {
                **entry,
                "x": row["effect"],
                "low": row["low"],
                "high": row["high"],
                "null": bool(row.get("null")),
                "colour": colour,
            }
        )
        top += height
    finite = [mark[key] for mark in marks for key in ("x", "low", "high") if mark[key] is not None]
    at = None if margin is None else margin if kind == "superiority" else -margin
    limits = [0.0, *finite, *([] if at is None else [at]), *([-at] if at is not None and kind == "superiority" else [])]
    low, high = min(limits), max(limits)
    pad = 0.04 * (high - low or 1.0)
    low, high = low - pad, high + pad
    x_scale = alt.Scale(domain=[low, high], range=[left, right], nice=False, zero=False)
    y_scale = alt.Scale(domain=[0, top], range=[0, top], nice=False, zero=False)
    axis = alt.Axis(
        tickCount=4 if small else 6, title=title, grid=False, domain=False, tickColor=GRID, titleX=(left + right) / 2
    )

    def x(field: str) -> Any:
        return alt.X(field, scale=x_scale, axis=axis)

    def y(field: str = "y:Q") -> Any:
        return alt.Y(field, scale=y_scale, axis=None)

    layers = []
    rulers = [{"x": 0.0, "colour": INK}] + ([] if at is None else [{"x": at, "colour": MUTED}])
    if at is not None and kind == "superiority":
        band = [{"low": -at, "high": at, "top": mark["top"], "bottom": mark["bottom"]} for mark in marks]
        layers.append(
            board.chart(band)
            .mark_rect(color=BAND)
            .encode(x=x("low:Q"), x2=alt.X2("high:Q"), y=y("top:Q"), y2=alt.Y2("bottom:Q"))
        )
    for ruler in rulers:
        drawn = [{"x": ruler["x"], "top": mark["top"], "bottom": mark["bottom"]} for mark in marks]
        style = {"strokeDash": [4, 3]} if ruler["x"] else {}
        layers.append(
            board.chart(drawn)
            .mark_rule(color=ruler["colour"], strokeWidth=1, **style)
            .encode(x=x("x:Q"), y=y("top:Q"), y2=alt.Y2("bottom:Q"))
        )
    names = [{"x": 0.0, "text": "no difference", "y": 12}]
    if at is not None:
        apart = abs(at) / (high - low) * (right - left)
        label = {"x": at, "text": f"{'margin' if kind == 'superiority' else 'allowed loss'} {abs(at):g}", "y": 12}
        names = [*names, label] if apart > 90 else [label]
    for name in names:
        place = left + (name["x"] - low) / (high - low) * (right - left)
        align = "left" if place < 45 else "right" if place > width - 45 else "center"
        layers.append(
            board.chart([name])
            .mark_text(color=MUTED, fontSize=11, align=align)
            .encode(x=x("x:Q"), y=y(), text=alt.Text("text:N"))
        )
    layers.append(
        board.chart([mark for mark in marks if mark["low"] is not None and mark["high"] is not None])
        .mark_rule(strokeWidth=2.5, strokeCap="round")
        .encode(x=x("low:Q"), x2=alt.X2("high:Q"), y=y(), color=alt.Color("colour:N", scale=None))
    )
    for null in (False, True):
        chosen = [mark for mark in marks if mark["x"] is not None and mark["null"] is null]
        fill = {"fill": alt.FillValue(PAPER)} if null else {"fill": alt.Fill("colour:N", scale=None)}
        layers.append(
            board.chart(chosen)
            .mark_point(shape="circle" if null else "diamond", size=90, strokeWidth=2, opacity=1)
            .encode(x=x("x:Q"), y=y(), stroke=alt.Stroke("colour:N", scale=None), **fill)
        )
    font = 12 if small else 13
    words = board.chart(labels).mark_text(align="left", color=INK, fontSize=font, limit=width - room if small else 234)
    layers.append(words.encode(y=y(), x=alt.value(0), text=alt.Text("text:N")))
    values = board.chart(marks).mark_text(
        align="right", color=MUTED, fontSize=11.5 if small else 12.5, limit=room if small else width - right - 8
    )
    layers.append(values.encode(y=y("words:Q"), x=alt.value(width), text=alt.Text("text:N")))
    titles = board.chart(headings).mark_text(align="left", color=INK, fontSize=font, fontWeight="bold", limit=width)
    layers.append(titles.encode(y=y(), x=alt.value(0), text=alt.Text("text:N")))
    return board.draw(board.layer(layers, width, top))


def paired(panels: Sequence[Mapping[str, Any]], *, title: str, better: str, width: int) -> str:
    """Each seed as a line from the control's value to the treatment's; the mean bold.

    panels: `title`, `subtitle`, `pairs` [(control, treatment)], `setting`; panels of one setting share their scale.
    """
    import altair as alt

    board = Board()
    columns = min(len(panels), 4 if width > 500 else 2)
    axis_room, gap = 46, 26
    inner = min(190, (width - axis_room - gap * (columns - 1)) // max(columns, 1))
    if width <= 500 and columns == 2:
        inner = (width - 2 * axis_room - gap) // 2
    elif width > 500:
        inner = min(190, (width - columns * (axis_room + gap)) // columns)
    room = max(14, int((inner + 20) / 6.6))
    lines_of = {id(panel): _wrap(panel["title"], room, 4) for panel in panels}
    charts = []
    for number, panel in enumerate(panels):
        row = panels[number // columns * columns : (number // columns + 1) * columns]
        tallest = max(len(lines_of[id(other)]) for other in row)  # plots and titles of a row stand at one height
        pairs = panel["pairs"]
        values = [
            value
            for other in panels
            if other["setting"] == panel["setting"]
            for pair in other["pairs"]
            for value in pair
        ]
        low, high = min(values), max(values)
        pad = 0.08 * (high - low or abs(high) or 1.0)
        y = alt.Y(
            "y:Q",
            scale=alt.Scale(domain=[low - pad, high + pad], nice=False, zero=False),
            axis=alt.Axis(
                title=None, tickCount=4, grid=True, gridColor=GRID, domain=False, ticks=False, labelPadding=6
            ),
        )
        x = alt.X(
            "x:Q",
            scale=alt.Scale(domain=[-0.14, 1.14], nice=False),
            axis=alt.Axis(
                values=[0, 1],
                labelExpr="datum.value == 0 ? 'control' : 'treatment'",
                title=None,
                grid=False,
                domain=False,
                ticks=False,
                labelPadding=8,
                labelAlign="center",
                labelFlush=False,
            ),
        )
        shown = pairs[:: math.ceil(len(pairs) / MOST_LINES)] if pairs else []
        lines = []
        for i, (control, treatment) in enumerate(shown):
            won = treatment > control if better == "higher" else treatment < control
            colour = GAIN if won else LOSS
            lines += [
                {"x": 0, "y": control, "pair": i, "colour": colour},
                {"x": 1, "y": treatment, "pair": i, "colour": colour},
            ]
        means = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
        faint = 0.75 if len(shown) <= 12 else 0.3
        mean = [{"x": 0, "y": means[0]}, {"x": 1, "y": means[1]}]
        color = alt.Color("colour:N", scale=None)
        layers = [
            board.chart(lines)
            .mark_line(strokeWidth=1.3, opacity=faint)
            .encode(x=x, y=y, detail=alt.Detail("pair:N"), color=color),
            board.chart(lines).mark_point(filled=True, size=22, opacity=faint).encode(x=x, y=y, color=color),
        ]
        if len(pairs) > 1:
            layers += [
                board.chart(mean).mark_line(strokeWidth=3.5, color=INK).encode(x=x, y=y),
                board.chart(mean).mark_point(filled=True, size=70, color=INK, opacity=1).encode(x=x, y=y),
            ]
        above = [*lines_of[id(panel)], *[" "] * (tallest - len(lines_of[id(panel)]))]
        heading = _heading(above, _wrap(panel["subtitle"], room + 2, 2), 12)
        charts.append(board.layer(layers, inner, 190 if width > 500 else 160, heading))
    return board.draw({"concat": charts, "columns": columns, "spacing": {"row": 30, "column": gap}})


def curves(
    panels: Sequence[Mapping[str, Any]],
    styles: Mapping[str, tuple[str, list[int]]],
    *,
    width: int,
    large: bool = True,
) -> str:
    """Curves, for example learning curves against the budget: the mean of each arm bold, its seeds faint.

    panels: `title`, `x_title`, `y_title`, `domain` (low, high), `seeds` [{arm, seed, points}], `means` [{arm, points}],
    and `log` where the horizontal axis is logarithmic. `large`: the first panel takes the whole width.
    """
    import altair as alt

    board = Board()
    charts = []
    for number, panel in enumerate(panels):
        leads = large and number == 0
        wide = leads or width <= 500
        inner = width - 56 if wide else (width - 56) // 2 - 36
        ticks = 6 if wide and width > 500 else 4
        x = alt.X(
            "x:Q",
            scale=alt.Scale(type="log", nice=False) if panel.get("log") else alt.Scale(nice=False, zero=False),
            axis=alt.Axis(
                title=panel["x_title"],
                format="~g" if panel.get("log") else "~s",
                tickCount=ticks,
                grid=False,
                domain=True,
                domainColor=GRID,
                tickColor=GRID,
            ),
        )
        y = alt.Y(
            "y:Q",
            scale=alt.Scale(domain=list(panel["domain"]), nice=False, zero=False),
            axis=alt.Axis(
                title=None, tickCount=5, grid=True, gridColor=GRID, domain=False, ticks=False, labelPadding=6
            ),
        )
        layers = []
        for kind, entries in (("seeds", panel["seeds"]), ("means", panel["means"])):
            for arm, (colour, dash) in reversed(list(styles.items())):
                values = [
                    {"x": point[0], "y": point[1], "line": str(entry.get("seed", "mean"))}
                    for entry in entries
                    if entry["arm"] == arm
                    for point in entry["points"]
                ]
                if values:
                    mark: dict[str, Any] = {"strokeWidth": 1.0, "opacity": 0.28}
                    if kind == "means":
                        mark = {"strokeWidth": 2.8, "strokeDash": dash or [1, 0]}
                    layers.append(
                        board.chart(values)
                        .mark_line(color=colour, clip=True, **mark)
                        .encode(x=x, y=y, detail=alt.Detail("line:N"))
                    )
        heading = _heading(_wrap(panel["title"], max(16, inner // 7), 2), [panel["y_title"]], 10)
        height = 170 if not leads else 300 if width > 500 else 220
        charts.append(board.layer(layers, inner, height, heading))
    step = 1 if width <= 500 else 2
    first = [{"hconcat": charts[:1]}] if large else []
    rest = [{"hconcat": charts[start : start + step], "spacing": 34} for start in range(len(first), len(charts), step)]
    return board.draw({"vconcat": [*first, *rest], "spacing": 30})


def dark_rules(scope: str) -> str:
    """CSS that swaps every light colour below `scope` for its dark form."""
    return "".join(
        f"{scope} [fill='{light}']{{fill:{dark}}}{scope} [stroke='{light}']{{stroke:{dark}}}"
        for light, dark in PALETTE.items()
    )


def describe(svg: str, name: str, words: str) -> str:
    """The SVG with a text alternative, and with ids that neither clash on a page nor change from one drawing to the next."""
    from markupsafe import escape

    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)
    for number, found in enumerate(dict.fromkeys(re.findall(r' id="([^"]+)"', svg))):
        svg = svg.replace(f'id="{found}"', f'id="{name}-{number}"').replace(f"url(#{found})", f"url(#{name}-{number})")
    return svg


def _wrap(text: str, width: int, most: int) -> list[str]:
    lines = textwrap.wrap(text, width) or [""]
    return (
        lines
        if len(lines) <= most
        else [*lines[: most - 1], textwrap.shorten(" ".join(lines[most - 1 :]), width, placeholder=" …")]
    )


class Board:
    """Gathers layers as altair makes them, and joins their dicts: altair would copy all data at every composition."""

    def __init__(self) -> None:
        self.datasets: dict[str, list[dict[str, Any]]] = {}

    def chart(self, values: list[dict[str, Any]]) -> Any:
        import altair as alt

        name = f"d{len(self.datasets)}"
        self.datasets[name] = values
        return alt.Chart(alt.NamedData(name))

    def layer(
        self, charts: Sequence[Any], width: float, height: float, title: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        layers = [chart.to_dict(validate=False) for chart in charts]
        parts = [{key: part[key] for key in ("data", "mark", "encoding")} for part in layers]
        return {"layer": parts, "width": width, "height": height, **({"title": title} if title else {})}

    def draw(self, specification: Mapping[str, Any]) -> str:
        import altair as alt
        import vl_convert

        config = {
            "background": "transparent",
            "font": FONT,
            "aria": False,
            "padding": {"left": 2, "right": 8, "top": 2, "bottom": 2},
            "view": {"stroke": None},
            "axis": {
                "labelColor": MUTED,
                "titleColor": MUTED,
                "titleFontWeight": "normal",
                "labelFontSize": 11,
                "titleFontSize": 11,
            },
        }
        whole = {"$schema": alt.SCHEMA_URL, "config": config, "datasets": self.datasets, **specification}
        svg = vl_convert.vegalite_to_svg(whole)
        # hundredths of a pixel are enough; words between tags stay as they are
        return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)


def _heading(title: list[str], subtitle: list[str], offset: int) -> dict[str, Any]:
    return {
        "text": title,
        "subtitle": subtitle,
        "anchor": "start",
        "frame": "group",
        "fontSize": 12,
        "fontWeight": "bold",
        "color": INK,
        "subtitleColor": MUTED,
        "subtitleFontSize": 11,
        "offset": offset,
        "subtitlePadding": 4,
    }
