"""Options of one stage of a chain, as NAME=VALUE: which there are, what they say, and errors that name them so."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, Literal

from trialist.training.options import Options

OPTION = re.compile(r"--([a-z][a-z-]*[a-z])")


def stage_values(given: Sequence[str], kinds: typing.Mapping[str, Any], option: str) -> dict[str, Any]:
    """The values of `NAME=VALUE` by name, in the types of `kinds`. option: what errors call the option that holds them.

    Raises ValueError for another form, a name that is unknown or given twice, and a value of another type.
    """
    values: dict[str, Any] = {}
    for entry in given:
        name, equals, text = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--{option} {entry}: write NAME=VALUE, for example learning_rate=1e-5")
        if name not in kinds:
            raise ValueError(f"--{option} {entry}: no option {name!r}; there are {', '.join(sorted(kinds))}")
        if name in values:
            raise ValueError(f"--{option}: {name} is given twice")
        try:
            values[name] = _read(text.strip(), kinds[name])
        except ValueError as error:
            raise ValueError(f"--{option} {entry}: {error}") from error
    return values


def in_words_of_the_chain(text: str, stage: str, chained: Collection[str], named: Collection[str]) -> str:
    """An error of a recipe with its options as the chain has them.

    chained: options that the chain has for all stages. named: those that a stage is given as NAME=VALUE.
    """

    def word(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        if name in ("data", "columns"):
            return f"--{stage}-{name}"
        return f"--{stage}-options {name}=..." if name in named and name not in chained else found[0]

    return OPTION.sub(word, text)


def kinds_of(recipe: type[Options], without: Collection[str]) -> dict[str, Any]:
    """The types of a recipe's options by name."""
    hints = typing.get_type_hints(recipe)
    return {field.name: hints[field.name] for field in fields(recipe) if field.name not in without}  # type: ignore[arg-type]


def _read(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if text not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return choices[text]
    if typing.get_origin(kind) is tuple:
        return tuple(_read(part.strip(), typing.get_args(kind)[0]) for part in text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole number' if kind is int else 'number'}") from None
    if not text:
        raise ValueError("the value is empty")
    return text
