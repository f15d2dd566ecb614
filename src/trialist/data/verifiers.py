"""Programs that check an answer: by its last number, by mathematics, by its form, or by a function of the user's own.

The `number` verifier is that of the Tulu 3 recipe for grade-school mathematics (arXiv 2411.15124): the last signed number of the
completion, commas removed, must equal the answer as a string. Departure: a comma is removed only where it groups thousands,
so that `(3,4)` ends with 4 and not with 34; a sign behind a digit or a closing bracket is an operation, so that `10-7` ends with
7 and not with -7; and what has an exponent or several points is taken whole, so that `1e5` does not end with 5.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import Any

from trialist.data.answers import Judge
from trialist.data.constraints import meets, read_constraints

SOLUTION = "####"
"""Stands before the answer at the end of a worked solution, as in GSM8K"""
GROUPING = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
MINUS = re.compile(r"[\u2212\u2013](?=\.?[0-9])|(?<==)\s*[-\u2212\u2013]\s*(?=\.?[0-9])")
"""A sign as a minus sign or an en dash, or apart from its number behind an equals sign"""
NUMBER = re.compile(r"(?:(?<![0-9)\]])[-+])?(?:[0-9]+(?:\.[0-9]+)*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Verifier:
    """How the answer of a row is read, and how a completion is held against it."""

    read: Callable[[Any], str]
    """From the value in a row to what `accepts` takes. Raises ValueError that says what is wrong with the value"""
    accepts: Callable[[str, str], bool]
    """Whether a completion agrees with an answer that was read"""


@functools.cache
def load_verifier(name: str) -> Verifier:
    """`number`, `math`, `ifeval`, or `module:function` for `function(completion, answer) -> bool`, both strings.

    `math` needs math-verify and judges in a process of its own, which can be stopped. Raises ValueError for an unknown name
    or a function that cannot be imported, ImportError for `math` where the extra `eval` is not installed.
    """
    if name == "number":
        return Verifier(_number, lambda completion, answer: last_number(completion) == answer)
    if name == "math":
        if missing := [package for package in ("math_verify", "lm_eval") if not importlib.util.find_spec(package)]:
            raise ImportError(f"the verifier math needs {missing[0]}: `pip install 'trialist[eval]'`")
        return Verifier(_expression, lambda completion, answer: bool(_judge().verify(answer, completion)))
    if name == "ifeval":
        return Verifier(
            lambda given: json.dumps(read_constraints(given)),
            lambda completion, answer: meets(completion, [(name, options) for name, options in json.loads(answer)]),
        )
    return Verifier(_text, functools.partial(_own_verdict, name, own_function(name)))


def own_function(name: str) -> Callable[[str, str], Any]:
    """What `module:function` names. Raises ValueError that says what is missing."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(
            f"no verifier {name!r}; there are number, math, ifeval, and module:function for one of your own"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"verifier {name!r}: there is no module {module!r}; add its folder to PYTHONPATH") from error
    if not callable(found):
        raise ValueError(f"verifier {name!r}: the module {module!r} has no function {function!r}")
    return found


def source_of(name: str) -> str | None:
    """The file of a function of the user's own, None for the other verifiers."""
    return inspect.getsourcefile(own_function(name)) if ":" in name else None


def last_number(text: str) -> str | None:
    """The last signed number of a text, without commas and a leading plus; None where there is none.

    `1,234` is 1234, `-3` is -3 (with a typographic minus, and as `= - 3`, too), the full stop of `3.` is none of the number,
    `3.50` stays as it is, and so do `1e5` and `1.2.3`, which equal no plain number.
    """
    found = _numbers(text)
    return found[-1].removeprefix("+") if found else None


def _numbers(text: str) -> list[str]:
    return NUMBER.findall(GROUPING.sub("", MINUS.sub("-", text)))


def _number(given: Any) -> str:
    """The one number of an answer, or of what follows `####` in it: whole ones without a point, exponents written out."""
    if isinstance(given, Real | Decimal) and not isinstance(given, bool):
        value = Decimal(str(given))
        if value.is_finite():
            return str(int(value)) if value == value.to_integral_value() else f"{value:f}"
    if not isinstance(given, str):
        raise ValueError(f"{str(given)[:40]!r} ({type(given).__name__}) is no number")
    text = given.rpartition(SOLUTION)[2].strip()
    found = _numbers(text)
    if len(found) > 1:
        raise ValueError(
            f"more than one number in {text[-40:]!r}; write the one that counts alone, or behind {SOLUTION}"
        )
    try:
        return (f"{Decimal(found[0]):f}" if "e" in found[0].lower() else _plain(found[0])) if found else _none(text)
    except InvalidOperation:
        return _none(text)


def _plain(number: str) -> str:
    Decimal(number)
    return number.removeprefix("+")


def _none(text: str) -> str:
    raise ValueError(f"no number in {text[-40:]!r}")


def _expression(given: Any) -> str:
    r"""The answer in a box: what follows `####`, or stands in the last `\boxed{}`, or between dollar signs, or all of it."""
    text = _text(given).rpartition(SOLUTION)[2].strip()
    start = text.rfind("\\boxed{")
    if start >= 0:
        text = _braced(text[start + len("\\boxed{") :])
    text = text.strip().strip("$").strip()
    if not text:
        raise ValueError(f"no expression in {str(given)[-40:]!r}")
    return f"\\boxed{{{text}}}"


def _braced(text: str) -> str:
    """Up to the brace that closes one before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    raise ValueError(f"a brace is not closed in {text[-40:]!r}")


def _text(given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, str | Real | Decimal) or not str(given).strip():
        raise ValueError(f"{str(given)[:40]!r} is no answer; give a string or a number")
    return str(given)


@functools.cache
def _judge() -> Judge:
    """One process for all answers."""
    judge = Judge()
    atexit.register(judge.close)
    return judge


def _own_verdict(name: str, function: Callable[[str, str], Any], completion: str, answer: str) -> bool:
    verdict = function(completion, answer)
    if verdict not in (0, 1):
        raise ValueError(f"verifier {name!r} returned {verdict!r}; it must answer True or False")
    return bool(verdict)
