"""`trialist compare A B`: a paired verdict on two runs in the ledger, or on two result files that the user already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trialist.cli._arguments import console, ledger_path, parse, print_json


@dataclass(frozen=True)
class Options:
    """A paired verdict on two runs (`trialist eval`), or on two result files: lm-eval sample logs, or any JSONL with an item
    id and a score. A is the control."""

    a: Annotated[str, tyro.conf.Positional]
    """The control: id of a run or the beginning of it, or a result file"""
    b: Annotated[str, tyro.conf.Positional]
    """The treatment, over the same items: another run, or another file"""
    metric: str | None = None
    """Score to compare; without it the first one of runs, or the only one of files"""
    better: Literal["higher", "lower"] | None = None
    """Direction of the metric; without it what a run knows of it, and higher for files"""
    margin: float | None = None
    """Smallest difference worth having; without it effect and interval only"""
    cluster: str | None = None
    """Field of a file that names the cluster of an item (document, prompt), whose items are not independent"""
    ledger: str | None = None
    """The ledger file"""
    json: bool = False
    """Print JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "compare", arguments)
    from trialist.engine.pairs import render_comparison

    files = [looks_like_a_file(name) for name in (options.a, options.b)]
    if files[0] != files[1]:
        raise ValueError(f"{options.a} and {options.b}: compare two runs or two files, not one of each")
    if files[0]:
        from trialist.engine.compare import compare_files

        result = compare_files(
            options.a,
            options.b,
            metric=options.metric,
            better=options.better or "higher",
            margin=options.margin,
            cluster=options.cluster,
        )
    else:
        from trialist.engine.compare_runs import compare_runs

        if options.cluster is not None:
            raise ValueError("--cluster names a field of a file; the items of a run are stored with their clusters")
        result = compare_runs(
            ledger_path(options.ledger),
            options.a,
            options.b,
            metric=options.metric,
            better=options.better,
            margin=options.margin,
        )
    if options.json:
        print_json(result)
    else:
        console().print(render_comparison(result), markup=False)
    return 0


def looks_like_a_file(name: str) -> bool:
    """Whether a name is that of a file rather than the beginning of a run's id, which is made of hexadecimal digits."""
    return Path(name).exists() or not name or any(character not in "0123456789abcdef" for character in name)
