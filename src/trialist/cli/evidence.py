"""`trialist evidence`: render EVIDENCE.md and its picture from the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trialist.cli._arguments import console, parse


@dataclass(frozen=True)
class Options:
    """Render EVIDENCE.md and its picture from the JSON files that `trialist run --save-evidence` wrote."""

    folder: str = "evidence"
    """Folder of TRIAL/NAME.json files"""
    output: str = "EVIDENCE.md"
    """Page to write; the picture goes to FOLDER/evidence.svg"""
    index: str | None = None
    """Also write here, as JSON, the line that `trialist list` shows of each result: for a package that brings trials"""
    pages: str | None = None
    """Also write into the Markdown pages below this folder what was measured, between their marks
    <!-- measured: TRIAL ... --> and <!-- end of what was measured -->"""
    check: bool = False
    """Write nothing; exit with 1 when what is written differs from what the files say"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "evidence", arguments)
    import json
    from pathlib import Path

    from trialist.engine.evidence import load_evidence, measured, render_evidence
    from trialist.engine.home import write_atomic
    from trialist.engine.pages import render_pages

    page, picture = render_evidence(Path(options.folder))
    targets = {Path(options.output): page, Path(options.folder) / "evidence.svg": picture}
    if options.index is not None:
        lines = measured(load_evidence(options.folder))
        targets[Path(options.index)] = json.dumps(lines, indent=1, ensure_ascii=False) + "\n"
    if options.pages is not None:
        targets |= render_pages(options.pages, options.folder)
    if options.check:
        stale = [str(target) for target, text in targets.items() if not target.is_file() or target.read_text() != text]
        if stale:
            console().print(f"out of date: {', '.join(stale)}; run `trialist evidence`", markup=False)
        return 1 if stale else 0
    for target, text in targets.items():
        console().print(str(write_atomic(target, text)), markup=False)
    return 0
