"""`trialist list`: the trials, their claims, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.cli._arguments import console, parse, print_json
from trialist.engine.registry import load_path, trial_paths


@dataclass(frozen=True)
class Options:
    """The trials: claims, and what was measured (from evidence/ below the current folder)."""

    json: bool = False
    """Print JSON"""
    evidence: str = "evidence"
    """Folder of evidence files"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "list", arguments)
    rows: list[dict[str, Any]] = []
    for name, path in trial_paths().items():
        trial = load_path(path)
        rows.append(
            {
                "name": name,
                "claim": trial.claim.statement,
                "source": trial.claim.source,
                "presets": list(trial.presets),
                "verdicts": measured(Path(options.evidence) / name),
            }
        )
    if options.json:
        print_json(rows)
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("trial", "claim", "source", "measured here"):
        table.add_column(column, overflow="fold")
    for row in rows:
        words = ", ".join(f"{preset}: {word}" for preset, word in row["verdicts"].items()) or "not yet"
        table.add_row(row["name"], row["claim"], row["source"], words)
    console().print(table)
    return 0


def measured(folder: Path) -> dict[str, str]:
    """Preset -> verdict of the evidence files in a folder. Raises ValueError for one that is damaged."""
    words = {}
    for file in sorted(folder.glob("*.json")):
        try:
            words[file.stem] = str(json.loads(file.read_text())["verdict"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no evidence file ({type(error).__name__}: {error}); write it again") from error
    return words
