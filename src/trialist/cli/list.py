"""`trialist list`: the trials, their claims, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trialist.cli._arguments import console, parse, print_json
from trialist.engine.registry import load_path, trial_paths


@dataclass(frozen=True)
class Options:
    """The trials: their claims, and what was measured."""

    json: bool = False
    """Print JSON"""
    evidence: str = "evidence"
    """Folder of your own evidence files, shown beside what comes with trialist"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "list", arguments)
    known = packaged()
    if Path(options.evidence).is_dir():
        from trialist.engine.evidence import load_evidence, measured

        known |= measured(load_evidence(options.evidence))
    rows: list[dict[str, Any]] = []
    for name, path in trial_paths().items():
        trial = load_path(path)
        rows.append(
            {
                "name": name,
                "claim": trial.claim.statement,
                "source": trial.claim.source,
                "presets": list(trial.presets),
                "verdicts": known.get(name, {}),
            }
        )
    if options.json:
        print_json(rows)
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("trial", "claim", "source", "measured"):
        table.add_column(column, overflow="fold")
    for row in rows:
        words = ", ".join(f"{preset}: {word}" for preset, word in row["verdicts"].items()) or "not yet"
        table.add_row(row["name"], row["claim"], row["source"], words)
    console().print(table)
    return 0


def packaged() -> dict[str, dict[str, str]]:
    """What was measured of the trials that come with trialist: trial -> name -> verdict with its effect."""
    return json.loads(resources.files("trialist.trials").joinpath("measured.json").read_text(encoding="utf-8"))
