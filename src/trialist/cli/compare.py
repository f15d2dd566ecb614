"""`trialist compare A B`: a paired verdict on two result files that the user already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trialist.cli._arguments import console, parse, print_json


@dataclass(frozen=True)
class Options:
    """A paired verdict on two result files: lm-eval sample logs, or any JSONL with an item id and a score. A is the control."""

    a: Annotated[str, tyro.conf.Positional]
    """Result file of the control"""
    b: Annotated[str, tyro.conf.Positional]
    """Result file of the treatment, over the same items"""
    metric: str | None = None
    """Field that holds the score; without it the only one there is"""
    better: Literal["higher", "lower"] = "higher"
    """Direction of the metric"""
    margin: float | None = None
    """Smallest difference worth having; without it effect and interval only"""
    cluster: str | None = None
    """Field that names the cluster of an item (document, prompt), whose items are not independent"""
    json: bool = False
    """Print JSON"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "compare", arguments)
    from trialist.engine.compare import compare_files, render_comparison

    result = compare_files(
        options.a,
        options.b,
        metric=options.metric,
        better=options.better,
        margin=options.margin,
        cluster=options.cluster,
    )
    if options.json:
        print_json(result)
    else:
        console().print(render_comparison(result), markup=False)
    return 0
