"""`trialist train NAME`: run a training recipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from trialist.cli._arguments import console, parse
from trialist.engine.registry import unknown
from trialist.training.recipes import RECIPES, load_recipe


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] not in ("-h", "--help"):
            raise ValueError("which recipe? `trialist train NAME [options]`; `trialist train` lists them")
        print("usage: trialist train NAME [options]\n")
        for name in RECIPES:
            print(f"  {name:<8} {(load_recipe(name).__doc__ or '').strip().splitlines()[0]}")
        print("\n`trialist train NAME --help` shows the options, with units and defaults.")
        return 0
    name = arguments[0]
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES, "`trialist train` lists them"))
    recipe = parse(load_recipe(name), f"train {name}", arguments[1:])
    progress = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        result = recipe(say=lambda text: progress.print(text, markup=False))
    except KeyboardInterrupt:
        progress.print("interrupted; the same command goes on from the last checkpoint")
        return 130
    out = console()
    width = max(map(len, result), default=0)
    for label, value in result.items():
        out.print(f"{label:<{width}}  {value}", markup=False)
    return 0
