"""`trialist export RUN --to DIR`: copy the model of a run to a folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from trialist.cli._arguments import console, ledger_path, parse


@dataclass(frozen=True)
class Options:
    """Copy the model of a run to a folder. Without a kept model (`run --keep-models`) the run is trained again."""

    run: Annotated[str, tyro.conf.Positional]
    """Id of the run, or the beginning of it (`trialist runs`)"""
    to: str
    """Folder to create"""
    yes: bool = False
    """Train the run again without asking, when its model was not kept"""
    ledger: str | None = None
    """The ledger file"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "export", arguments)
    from rich.console import Console

    from trialist.cli.run import ask
    from trialist.engine.repeat import export

    progress = Console(stderr=True)

    def agree(question: str) -> bool:
        return options.yes or (sys.stdin.isatty() and ask(progress, question))

    folder = export(
        ledger_path(options.ledger), options.run, options.to, agree, lambda text: progress.print(text, highlight=False)
    )
    console().print(str(folder), markup=False)
    return 0
