"""Requests and the principles that an answer to them should follow, taken apart from instructions that hold both.

An instruction of IFEval (arXiv 2311.07911) asks for a text and constrains its form. Where sentences of their own state the
constraint, they are the principle, in their own words, and the rest is the request; a program says whether an answer follows it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trialist.data.constraints import Constraint, read_constraints
from trialist.data.corpora import load_rows, parse_columns

MARKERS: Mapping[str, str] = {
    "keywords:existence": r"keyword|\binclude\b",
    "keywords:forbidden_words": r"keyword|\bavoid|do not (?:include|use|say|mention)|don't (?:include|use|say|mention)|without",
    "keywords:frequency": r"\bword\b|appear|at least|mention",
    "length_constraints:number_words": r"\d+\+? (?:or more )?words?\b|words",
    "length_constraints:number_sentences": r"sentences?\b",
    "length_constraints:number_paragraphs": r"paragraph|sections?\b|\*\*\*|divider",
    "detectable_content:number_placeholders": r"placeholder",
    "detectable_format:number_bullet_lists": r"bullet|^\s*\*",
    "detectable_format:title": r"title|angular|<<",
    "detectable_format:json_format": r"json|markdown ticks",
    "change_case:english_lowercase": r"lower ?case|capital",
    "change_case:english_capital": r"capital|upper ?case",
    "startend:end_checker": r"\bend\b|last sentence|finish|follow this|other words",
    "startend:quotation": r"quotation|double quote",
    "punctuation:no_comma": r"comma",
}
"""Constraint -> what a sentence has that states it"""
SENTENCE = re.compile(r'(?<=[.!?])["\u201d)]?\s+(?=[A-Z"\u201c(*])|\n+')


@dataclass(frozen=True)
class Principled:
    """A request, the principle in words, and the constraint as a check."""

    key: str
    request: str
    principle: str
    constraints: tuple[Constraint, ...]


def read_principles(
    data: str, *, columns: str = "", split: str | None = None, max_examples: int | None = None
) -> list[Principled]:
    """The rows of IFEval (`prompt`, `instruction_id_list`, `kwargs`) with one constraint that can be checked and is stated apart;
    rows with a `principle` of their own are taken as they are.

    Raises ValueError where no row is left, for a constraint that cannot be read, naming the row, and the errors of `load_rows`.
    """
    rows = load_rows(
        data, required=("prompt", "instruction_id_list", "kwargs"), columns=parse_columns(columns), split=split,
        max_examples=None,
    )  # fmt: skip
    found: list[Principled] = []
    for number, row in enumerate(rows, start=1):
        names = row["instruction_id_list"]
        own = row.get("principle")
        if not own and (len(names) != 1 or names[0] not in MARKERS):
            continue
        parts = (row["prompt"], own) if own else taken_apart(row["prompt"], names[0])
        if parts is None:
            continue
        request, principle = parts
        try:
            constraints = tuple(read_constraints({"instruction_id_list": list(names), "kwargs": list(row["kwargs"])}))
        except ValueError as error:
            raise ValueError(f"{data} row {number}: {error}") from error
        found.append(Principled(str(row.get("key") or number), request, principle, constraints))
    if not found:
        raise ValueError(
            f"{data} has no row with one constraint that a program checks and sentences of its own state; the constraints are "
            f"{', '.join(MARKERS)}, or give a column `principle`"
        )
    return found if max_examples is None else found[:max_examples]


def taken_apart(instruction: str, constraint: str) -> tuple[str, str] | None:
    """The request and the principle of an instruction; None where the constraint is not stated in sentences of its own behind
    the request."""
    starts = [0, *(gap.end() for gap in SENTENCE.finditer(instruction)), len(instruction)]
    sentences = [instruction[start:end] for start, end in itertools.pairwise(starts)]
    stated = [bool(re.search(MARKERS[constraint], sentence, re.IGNORECASE)) for sentence in sentences]
    if not any(stated) or stated[0]:
        return None
    first = stated.index(True)
    if not all(stated[first:]):
        return None
    return instruction[: starts[first]].strip(), instruction[starts[first] :].strip()
