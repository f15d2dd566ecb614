"""`trialist report [NAME]`: verdicts, intervals, curves and costs as HTML, Markdown or JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trialist.cli._arguments import console, ledger_path, parse
from trialist.engine.registry import trial_paths, unknown


@dataclass(frozen=True)
class Options:
    """Verdicts, intervals, curves and costs of one trial, or of all in the ledger."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the trial; without it an index of all"""
    format: Literal["html", "md", "json"] = "html"
    """Format of the report"""
    preset: str | None = None
    """The trial's preset; without it the one that ran last"""
    output: str | None = None
    """File to write; `-` is the terminal; without it reports/ beside the ledger for HTML, the terminal for the others"""
    ledger: str | None = None
    """The ledger file"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "report", arguments)
    from trialist.engine.home import write_atomic
    from trialist.engine.ledger import Ledger
    from trialist.engine.report import render, render_index

    path = ledger_path(options.ledger)
    ledger = Ledger(path, create=False)
    stored = [c for c in ledger.configurations(options.name) if options.preset in (None, c.preset)]
    summaries = [summary for c in stored if (summary := ledger.summary(c.key)) is not None]
    known = sorted({c.trial for c in ledger.configurations()})
    ledger.close()
    if options.name is not None:
        if not stored:
            raise ValueError(unknown("stored trial", options.name, known, "`trialist run NAME` runs one"))
        if not summaries and options.name not in trial_paths():
            raise ValueError(
                f"the runs of {options.name} stand alone and have no verdict: `trialist runs --trial {options.name}` lists "
                "them, `trialist compare RUN RUN` compares two"
            )
        if not summaries:
            raise ValueError(f"{options.name} has no verdict yet; `trialist run {options.name}` goes on with it")
        text, stem = render(summaries[0], options.format), f"{summaries[0]['trial']}-{summaries[0]['preset']}"
    else:
        if not summaries:
            raise ValueError(f"no verdict in {path} yet; `trialist run NAME` makes one")
        links = {(s["trial"], s["preset"]): f"{s['trial']}-{s['preset']}.html" for s in summaries}
        text, stem = render_index(summaries, options.format, links), "index"
    if options.output == "-" or (options.output is None and options.format != "html"):
        sys.stdout.write(text + ("" if text.endswith("\n") else "\n"))
        return 0
    target = options.output or path.absolute().parent / "reports" / f"{stem}.{options.format}"
    console().print(str(write_atomic(target, text)), markup=False)
    return 0
