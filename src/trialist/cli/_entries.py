"""What `train`, `apply` and `analyze` share: an entry of a registry becomes a command with options, progress and a result.

An entry is `module:Class`, imported when it is named. The class is a frozen dataclass: its fields are the options, the
docstring below a field is its help, and `__call__(say)` does the work: it tells what is worth knowing on the way through
`say` and returns what is to be shown at the end, label by label. Its module imports heavy libraries within functions only.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console

from trialist.cli._arguments import console, parse
from trialist.engine.registry import unknown


class Entry(Protocol):
    def __call__(self, say: Callable[[str], None] = ...) -> Mapping[str, Any]: ...


def load_entry(path: str) -> type[Entry]:
    """The class at `module:Class`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def own_first(entry: type[Entry]) -> type[Entry]:
    """The class with its fields in the order of help: what must be given, what is its own, what it shares with others.

    A dataclass has the fields of its bases first, and help shows them in that order.
    """
    declared: dict[str, int] = {}
    for distance, cls in enumerate(entry.__mro__):
        declared |= dict.fromkeys(cls.__dict__.get("__dataclass_fields__", ()), distance)  # the farthest base wins
    required = (dataclasses.MISSING, dataclasses.MISSING)
    order = sorted(
        dataclasses.fields(entry),  # type: ignore[arg-type]
        key=lambda field: ((field.default, field.default_factory) != required, declared[field.name]),
    )
    names = {"__module__": entry.__module__, "__doc__": entry.__doc__}
    return type(entry.__name__, (entry,), {**names, "__dataclass_fields__": {field.name: field for field in order}})


def run_entry(verb: str, kind: str, entries: Mapping[str, str], arguments: Sequence[str], *, resumes: bool) -> int:
    """`VERB NAME [options]`: runs the entry of that name; without a name lists them.

    kind: what an entry is called in messages. resumes: whether an interrupted one goes on where it was, if it does
    not say so itself.
    """
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] not in ("-h", "--help"):
            raise ValueError(f"which {kind}? `trialist {verb} NAME [options]`; `trialist {verb}` lists them")
        print(f"usage: trialist {verb} NAME [options]\n")
        width = max(map(len, entries), default=0)
        for name, path in entries.items():
            print(f"  {name:<{width}}  {(load_entry(path).__doc__ or '').strip().splitlines()[0]}")
        print(f"\n`trialist {verb} NAME --help` shows the options, with units and defaults.")
        return 0
    name = arguments[0]
    if name not in entries:
        raise ValueError(unknown(kind, name, entries, f"`trialist {verb}` lists them"))
    entry = parse(own_first(load_entry(entries[name])), f"{verb} {name}", arguments[1:])
    progress = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        result = entry(say=lambda text: progress.print(text, markup=False, emoji=False))
    except KeyboardInterrupt:
        resumes = getattr(entry, "resumes", resumes)
        goes_on = "the same command goes on from the last checkpoint" if resumes else "nothing half-written is left"
        progress.print(f"interrupted; {goes_on}")
        return 130
    out = console()
    width = max(map(len, result), default=0)
    for label, value in result.items():
        out.print(f"{label:<{width}}  {value}", markup=False, emoji=False)
    return 0
