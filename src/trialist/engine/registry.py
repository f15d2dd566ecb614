"""Trials by name. A name maps to `module:Class` through the entry-point group `trialist.trials`, and is imported on first use.

The built-in trials register in the same way as those of any other package, so a user's package brings its own with

    [project.entry-points."trialist.trials"]
    my-trial = "my_package.my_trial:MyTrial"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from trialist.engine.contract import Trial

GROUP = "trialist.trials"


def trial_paths() -> dict[str, str]:
    """Trial name -> `module:Class`, sorted by name. Raises ValueError when two packages claim one name."""
    paths: dict[str, str] = {}
    for entry in entry_points(group=GROUP):
        if paths.get(entry.name, entry.value) != entry.value:
            raise ValueError(
                f"trial {entry.name!r} is registered twice, by {paths[entry.name]} and {entry.value}; uninstall one"
            )
        paths[entry.name] = entry.value
    return dict(sorted(paths.items()))


def load_trial(name: str) -> type[Trial]:
    """The trial's class. Raises ValueError for an unknown name, with the nearest ones."""
    paths = trial_paths()
    if name not in paths:
        raise ValueError(unknown("trial", name, paths, "`trialist list` shows all"))
    return load_path(paths[name])


def load_path(path: str) -> type[Trial]:
    module, _, attribute = path.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Trial)):
        raise ValueError(f"{path} is registered as a trial but is not a subclass of trialist.engine.contract.Trial")
    return found


def unknown(kind: str, name: str, known: Iterable[str], rest: str) -> str:
    """The message for a name that does not exist: suggests the nearest, else lists what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"no {kind} {name!r}. Did you mean {' or '.join(repr(candidate) for candidate in near)}? {rest}."
    return f"no {kind} {name!r}. There is {', '.join(known) or 'none'}; {rest}."
