"""Recipes by name, for `trialist train NAME`: `module:Class`, imported on first use.

A recipe is a frozen dataclass. Its fields are the options, the docstring below a field is its help, and `__call__(say)`
does the work: it tells what is worth knowing on the way through `say` and returns what is to be shown at the end. Its
module imports torch within functions only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

RECIPES = {
    "sft": "trialist.training.sft:SupervisedFineTuning",
}


class Recipe(Protocol):
    def __call__(self, say: Callable[[str], None] = ...) -> Mapping[str, Any]: ...


def load_recipe(name: str) -> type[Recipe]:
    """The class of a recipe, by one of the names in `RECIPES`."""
    module, _, attribute = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
