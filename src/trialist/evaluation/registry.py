"""Evaluations by name: `text`, `blimp`, and the benchmarks that lm-eval runs on local data.

A family maps to `module:Class` and is imported on first use; the class's fields are its options.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from trialist.evaluation.published import PUBLISHED
from trialist.evaluation.results import Evaluation

FAMILIES = {
    "text": "trialist.evaluation.text:Text",
    "blimp": "trialist.evaluation.blimp:Blimp",
    "lm-eval": "trialist.evaluation.harness:Harness",
}
"""Family -> class. `family:ARGUMENT` names the data (`text:notes.txt`) or the task (`lm-eval:hellaswag`)"""
SOURCES = ("trialist.evaluation.harness_model", "trialist.data.answers")
"""Modules that the families use without importing them by name"""


def evaluation_names() -> dict[str, str]:
    """What `load_evaluation` takes -> one line about it. Imports nothing heavy."""
    listed = {
        "text": "bits per byte of any text: text --data FILE, text:FILE",
        "blimp": "grammatical minimal pairs: blimp --data FOLDER, or from the Hub",
    }
    return listed | {name: task.about for name, task in PUBLISHED.items()}


def settle_name(name: str) -> tuple[str, str]:
    """`hellaswag` or `lm-eval:hellaswag` -> ("lm-eval", "hellaswag"); `text:FILE` -> ("text", "FILE").

    Raises ValueError for an unknown name, with the nearest ones.
    """
    family, colon, argument = name.partition(":")
    if family in ("text", "blimp"):
        if colon and not argument:
            raise ValueError(f"{name!r}: name the data behind the colon, for example {family}:FILE")
        return family, argument
    task = argument if family == "lm-eval" and colon else name
    if task in PUBLISHED or (task.startswith("mmlu_") and task[5:].replace("_", "").isalnum()):
        return "lm-eval", task
    near = difflib.get_close_matches(task, evaluation_names(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There is {', '.join(evaluation_names())}."
    raise ValueError(f"no benchmark {task!r}. {hint} `trialist eval` lists them.")


def evaluation_class(name: str) -> type[Evaluation]:
    module, _, attribute = FAMILIES[settle_name(name)[0]].partition(":")
    return getattr(importlib.import_module(module), attribute)


def evaluation_sources(name: str) -> tuple[str, ...]:
    """Modules whose source decides what the evaluation measures."""
    family = settle_name(name)[0]
    return (FAMILIES[family].partition(":")[0], *(SOURCES if family == "lm-eval" else ()))


def load_evaluation(name: str, options: Mapping[str, Any] | None = None) -> Evaluation:
    """The evaluation of that name. options: fields of its class; those that are None keep their defaults.

    Raises ValueError for an unknown name, and for an option that this evaluation does not take.
    """
    family, argument = settle_name(name)
    cls = evaluation_class(name)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    own = "task" if family == "lm-eval" else "data"
    if argument:
        if own in given:
            raise ValueError(f"{name!r} names its data already; leave --data out")
        given[own] = argument
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in given:
        if key not in fields:
            why = (
                "it brings its own data"
                if key in ("data", "split", "columns")
                else f"it takes {', '.join(sorted(fields))}"
            )
            raise ValueError(f"--{key.replace('_', '-')} does not go with {name!r}: {why}")
    if family == "text" and "data" not in given:
        raise ValueError("which text? text --data FILE, or text:FILE (a folder, a Hub id or python-stdlib as well)")
    return cls(**given)


def options_for(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each name the options that its evaluation takes, of those given for all of them together.

    An option that none of them takes goes to all, so that `load_evaluation` refuses it in words.
    """
    takes = {name: _takes(name) for name in names}
    return {
        name: {
            key: value
            for key, value in options.items()
            if key in takes[name] or not any(key in t for t in takes.values())
        }
        for name in names
    }


def _takes(name: str) -> set[str]:
    fields = {field.name for field in dataclasses.fields(evaluation_class(name))} - {"task"}
    return fields - {"data"} if settle_name(name)[1] else fields
