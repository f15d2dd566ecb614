"""`trialist verify RUN`: run a stored run again and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from trialist.cli._arguments import console, ledger_path, parse, print_json


@dataclass(frozen=True)
class Options:
    """Run a stored run again, with the present source, and compare every number; exit code 1 when one differs."""

    run: Annotated[str, tyro.conf.Positional]
    """Id of the run, or the beginning of it (`trialist runs`)"""
    tolerance: float = 0.0
    """Largest relative difference that passes; 0 asks for equality bit for bit"""
    ledger: str | None = None
    """The ledger file"""
    json: bool = False
    """Print JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "verify", arguments)
    if not options.tolerance >= 0:
        raise ValueError(f"--tolerance must be at least 0, not {options.tolerance}")
    from rich.console import Console

    from trialist.engine.repeat import verify

    progress = Console(stderr=True)
    result = verify(
        ledger_path(options.ledger), options.run, options.tolerance, lambda text: progress.print(text, highlight=False)
    )
    if options.json:
        print_json(result)
    else:
        for difference in result["differences"]:
            console().print(
                f"{difference['what']}: stored {difference['stored']}, now {difference['now']}", markup=False
            )
        equal = f"equal: {result['compared']} numbers of run {result['run']} came out the same"
        console().print(
            equal
            if not result["differences"]
            else f"{len(result['differences'])} of {result['compared']} numbers differ"
        )
        if result["source_changed"]:
            console().print("the source of the trial or its parts has changed since that run")
    return 1 if result["differences"] else 0
