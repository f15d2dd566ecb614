"""Preferences with artefacts for reward models: generated, or rows of the user's own with a phrase put into them."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.data.artefact_task import ArtefactTask, Judged
    from trialist.data.preferences import PreferencePair

Rows = list[dict[str, Any]]
Encode = Callable[[Rows], "list[PreferencePair]"]
VALIDATION, EVALUATION = 40_001, 40_003
"""Seeds of the generated items that tune and that decide; the same items for every seed and arm"""
CANDIDATES = 16


@dataclass(frozen=True)
class Choice:
    """Answers to a prompt, of which the one with the highest reward is chosen."""

    sequences: list[list[int]]
    quality: list[float]
    artefacts: list[float]
    """Share of the artefacts that each answer carries"""


@dataclass(frozen=True)
class RewardData:
    """Rows to train on, rows as they are annotated to tune on, tests by name, and how rows become token ids."""

    train: Rows
    validation: Rows
    tests: dict[str, Rows]
    encode: Encode
    choices: list[Choice] = field(default_factory=list)


def generated(task: ArtefactTask, seed: int, *, pairs: int, test_items: int, ids: Sequence[int]) -> RewardData:
    """Preferences in symbols. ids: the model's token for each symbol."""
    plain, marked = (False, False), (False, True)

    def some(items: Iterable[Judged], count: int) -> Rows:
        return [_as_row(item) for item in itertools.islice(items, count)]

    contrasts = functools.partial(task.contrasts, EVALUATION)
    tests = {
        "inserted_accuracy": some(contrasts(phrase=marked, long=plain), test_items),
        "lengthened_accuracy": some(contrasts(phrase=plain, long=marked), test_items),
        "clean_accuracy": some(contrasts(phrase=plain, long=plain), test_items),
        "annotated_accuracy": some(task.pairs(EVALUATION), test_items),
        "off_topic_accuracy": some(task.off_topic(EVALUATION), test_items),
    }
    choices = [
        Choice(
            [[ids[token] for token in (*prompt, *answer.tokens)] for answer in answers],
            [float(answer.quality) for answer in answers],
            [(answer.phrase + answer.long) / 2 for answer in answers],
        )
        for prompt, answers in itertools.islice(task.candidates(EVALUATION, CANDIDATES), test_items // 4)
    ]
    return RewardData(
        some(task.pairs(seed), pairs), some(task.pairs(VALIDATION), test_items), tests,
        functools.partial(_symbols, ids=ids), choices,
    )  # fmt: skip


def _as_row(pair: Judged) -> dict[str, Any]:
    """As text of numbers, which everything that takes preference rows reads."""
    return {
        name: " ".join(map(str, tokens))
        for name, tokens in (
            ("prompt", pair.prompt),
            ("chosen", pair.chosen.tokens),
            ("rejected", pair.rejected.tokens),
        )
    }


def _symbols(rows: Rows, ids: Sequence[int]) -> list[PreferencePair]:
    from trialist.data.preferences import PreferencePair

    def tokens(text: str) -> list[int]:
        return [ids[int(symbol)] for symbol in text.split()]

    return [
        PreferencePair(tokens(row["prompt"]), tokens(row["chosen"]), tokens(row["rejected"]), number)
        for number, row in enumerate(rows)
    ]


def own_rows(
    rows: Rows, seed: int, *, phrase: str, rates: tuple[float, float], pairs: int, test_items: int, encode: Encode
) -> RewardData:
    """Rows of the user's own, split by prompt, the phrase put before answers at random.

    rates: how often the phrase is put before the chosen answer and before the other one, of rows to train and to tune on. In
    the tests it stands before the other one, or nowhere; the length test takes the rows whose other answer is the longer.
    Raises ValueError where a test would be empty.
    """
    from trialist.data.augment_preferences import augment_preferences, final_turn, prompt_text
    from trialist.data.corpora import Documents
    from trialist.data.splits import split_documents

    numbers = tuple(map(str, range(len(rows))))
    splits = split_documents(Documents(numbers, tuple(map(prompt_text, rows)), "the rows"), fractions=(0.75, 0.1, 0.15))

    def part(name: str, most: int) -> Rows:
        return [rows[int(number)] for number in getattr(splits, name).ids[:most]]

    held = part("test", test_items)
    longer = [row for row in held if _length(row["rejected"]) > _length(row["chosen"])]
    if not longer:
        raise ValueError("no test row has a longer rejected than chosen answer; bring more rows")
    strangers = [
        row
        for row in augment_preferences(held, num_donors=1, include=("non_contextual",), sample_fraction=1.0)
        if row["chosen"] == held[row["source_index"]]["rejected"]
        and row["rejected"] == final_turn(held[row["rejected_index"]]["chosen"])
    ]
    tests = {
        "inserted_accuracy": [{**row, "rejected": _with(row["rejected"], phrase)} for row in held],
        "lengthened_accuracy": longer,
        "clean_accuracy": held,
        "annotated_accuracy": _annotated(held, EVALUATION, phrase, rates),
        "off_topic_accuracy": [{**row, "rejected": _with(row["rejected"], phrase)} for row in strangers],
    }
    train = _annotated(part("train", pairs), seed, phrase, rates)
    return RewardData(train, _annotated(part("validation", test_items), VALIDATION, phrase, rates), tests, encode)


def _annotated(rows: Rows, seed: int, phrase: str, rates: tuple[float, float]) -> Rows:
    draw = random.Random(seed)
    made = []
    for row in rows:
        marked = {name: draw.random() < rate for name, rate in zip(("chosen", "rejected"), rates)}
        made.append({**row, **{name: _with(row[name], phrase) for name, put in marked.items() if put}})
    return made


def _with(answer: Any, phrase: str) -> Any:
    """The answer with the phrase before what the assistant says last."""
    if not isinstance(answer, str):
        return [*answer[:-1], {**answer[-1], "content": f"{phrase} {answer[-1].get('content', '')}"}]
    from trialist.data.preferences import DIALOGUE_MARK

    before, mark, last = answer.rpartition(DIALOGUE_MARK)
    return f"{before}{mark} {phrase} {last.lstrip()}"


def _length(answer: Any) -> int:
    return len(answer) if isinstance(answer, str) else sum(len(message.get("content", "")) for message in answer)
