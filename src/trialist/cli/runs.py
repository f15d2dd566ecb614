"""`trialist runs`: the runs in the ledger, with errors; stages."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trialist.cli._arguments import console, ledger_path, parse, print_json


@dataclass(frozen=True)
class Options:
    """The runs in the ledger, newest first."""

    trial: str | None = None
    """Only runs of this trial"""
    status: Literal["queued", "running", "done", "diverged", "failed", "stale"] | None = None
    """Only runs in this state"""
    errors: bool = False
    """Show the traceback of every failed run"""
    stages: bool = False
    """List the stages (artefacts shared by runs) instead"""
    clean: bool = False
    """Remove all stages and the folders of finished runs, kept models included"""
    limit: int = 200
    """Most rows to print; 0 prints all (JSON is never cut)"""
    ledger: str | None = None
    """The ledger file"""
    json: bool = False
    """Print JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "runs", arguments)
    if options.limit < 0:
        raise ValueError(f"--limit must be at least 0 (0 prints all), not {options.limit}")
    path = ledger_path(options.ledger)
    if options.clean:
        from trialist.engine.stages import clean_folders

        console().print(f"freed {clean_folders(path) / 2**20:.1f} MiB")
        return 0
    if options.stages:
        return _stages(options, path.parent / "stages")
    from trialist.engine.ledger import Ledger

    ledger = Ledger(path, create=False)
    rows = ledger.rows(trial=options.trial, status=options.status)
    ledger.close()
    if options.json:
        print_json(rows)
        return 0
    out = console()
    shown = rows[: options.limit] if options.limit else rows
    print_rows(shown)
    if len(shown) < len(rows):
        out.print(f"... {len(rows) - len(shown)} more; --limit 0 prints all")
    if options.errors:
        for row in rows:
            if row["error"]:
                out.print(
                    f"\n[bold]{row['id']}[/bold] {row['trial']} · {row['setting']} · {row['arm']} · seed {row['seed']}"
                )
                out.print(row["traceback"] or row["error"], markup=False)
    return 0


COLUMNS = ("id", "trial", "preset", "setting", "arm", "seed", "status", "time", "started", "error")
MOST_STYLED = 500
"""Longer listings are plain columns: laying out thousands of styled cells takes seconds"""


def _passed(measured: Mapping[str, float]) -> float | None:
    """Seconds that passed while a run ran."""
    return measured.get("clock_seconds", measured.get("wall_seconds"))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from trialist.engine.display import STYLES, duration

    cells = [
        (
            row["id"], row["trial"], row["preset"], row["setting"],
            row["arm"] + (" (tuning)" if row["purpose"] == "tuning" else ""), str(row["seed"]), row["status"],
            duration(_passed(row["measured"] or {})), _when(row["started"]), row["error"] or "",
        )
        for row in rows
    ]  # fmt: skip
    if len(cells) > MOST_STYLED:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *cells)]
        for line in (COLUMNS, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in COLUMNS:
        table.add_column(column, no_wrap=column != "error")
    for line in cells:
        status = Text(line[6], style=STYLES.get(line[6], "dim"))
        table.add_row(*line[:6], status, *line[7:])
    console().print(table)


def _stages(options: Options, root: object) -> int:
    from pathlib import Path

    from trialist.engine.display import duration
    from trialist.engine.stages import list_stages

    stages = list_stages(Path(str(root)))
    if options.json:
        print_json(stages)
        return 0
    for entry in stages:
        size, seconds = f"{entry['bytes'] / 2**20:.1f} MiB", duration(entry["wall_seconds"]) or "0 s"
        name = f"{entry['name']}-{entry['key']}"
        console().print(f"{name}  {size}  built in {seconds}  {_when(entry['created'])}", markup=False)
    if not stages:
        console().print("no stages")
    return 0


def _when(stamp: float | None) -> str:
    return "" if stamp is None else datetime.datetime.fromtimestamp(stamp).strftime("%Y-%m-%d %H:%M")
