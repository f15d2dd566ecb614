"""Preferences with artefacts for reward models: generated, or rows of the user's own with a phrase put into them."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trialist.trials._language_model import model_context

if TYPE_CHECKING:
    from trialist.data.artefact_task import ArtefactTask, Judged
    from trialist.data.preferences import PreferencePair
    from trialist.engine.context import Context
    from trialist.trials.rrm import RRMTrial

Rows = list[dict[str, Any]]
Pairs = list["PreferencePair"]
Encode = Callable[[Rows], Pairs]
VALIDATION, EVALUATION = 40_001, 40_003
"""Which rows of the user's own get the phrase where they are annotated: the same for every seed and arm"""
CANDIDATES = 16
WORSE, BETTER = (False, True), (True, False)
"""Which of the better and the worse answer carries an artefact"""


@dataclass(frozen=True)
class Choice:
    """Answers to a prompt, of which the one with the highest reward is chosen."""

    sequences: list[list[int]]
    quality: list[float]
    artefacts: list[float]
    """Share of the artefacts that each answer carries"""


@dataclass(frozen=True)
class RewardData:
    """Rows to train on, pairs as they are annotated to tune on, tests by name, and how rows become token ids.

    Tests: `clean` has no artefacts; `phrase_worse`, `phrase_better`, `long_worse` and `long_better` have one, in the answer
    that they name. In all of them the answers differ in correctness alone. `relevance_worse` and `relevance_better` are those of
    the phrase again, with answers that differ in relevance alone. `off_topic` has an answer to another prompt with both
    artefacts, and `annotated` is like the training data.
    """

    train: Rows
    validation: Pairs
    tests: dict[str, Pairs]
    encode: Encode
    inserted: tuple[str, ...]
    """Tests whose artefact was put in, by their names without the side"""
    choices: list[Choice] = field(default_factory=list)
    prompts: tuple[str, ...] = ()
    """Of rows of the user's own: the prompt of each item of `clean`, `phrase_worse` and `phrase_better`"""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know of the rows"""


def generated(task: ArtefactTask, context: Context, *, pairs: int, test_items: int, ids: Sequence[int]) -> RewardData:
    """Preferences in symbols, all drawn anew for each seed. No prompt of a part is one of the parts before it.

    ids: the model's token for each symbol.
    """
    known: set[Any] = set()
    train = _fresh(task.pairs(context.stream("pairs")), pairs, known)
    known |= {_wanted(pair.prompt) for pair in train}
    validation = _fresh(task.pairs(context.stream("validation")), test_items, known)
    known |= {_wanted(pair.prompt) for pair in validation}
    seed = context.stream("evaluation")
    contrasts = functools.partial(task.contrasts, seed, "correctness")
    relevance = functools.partial(task.contrasts, seed, "relevance")
    tests = {
        "clean": contrasts(),
        "phrase_worse": contrasts(phrase=WORSE),
        "phrase_better": contrasts(phrase=BETTER),
        "long_worse": contrasts(long=WORSE),
        "long_better": contrasts(long=BETTER),
        "relevance_worse": relevance(phrase=WORSE),
        "relevance_better": relevance(phrase=BETTER),
        "off_topic": task.off_topic(seed),
        "annotated": task.pairs(seed),
    }
    choices = [
        Choice(
            [[ids[token] for token in (*prompt, *answer.tokens)] for answer in answers],
            [float(answer.quality) for answer in answers],
            [(answer.phrase + answer.long) / 2 for answer in answers],
        )
        for prompt, answers in itertools.islice(task.candidates(seed, CANDIDATES), test_items // 4)
    ]
    encode = functools.partial(_symbols, ids=ids)
    return RewardData(
        [_as_row(pair) for pair in train],
        encode([_as_row(pair) for pair in validation]),
        {name: encode([_as_row(pair) for pair in _fresh(items, test_items, known)]) for name, items in tests.items()},
        encode,
        ("phrase", "long"),
        choices,
    )


def _fresh(items: Iterable[Judged], count: int, known: Collection[Any]) -> list[Judged]:
    return list(itertools.islice((item for item in items if _wanted(item.prompt) not in known), count))


def _wanted(prompt: Sequence[int]) -> tuple[int, int, frozenset[int]]:
    """What a prompt asks for, in whatever order it names the keywords."""
    _, side, topic, *keywords, _ = prompt
    return side, topic, frozenset(keywords)


def _as_row(pair: Judged) -> dict[str, Any]:
    """As text of numbers, which everything that takes preference rows reads."""
    named = {"prompt": pair.prompt, "chosen": pair.chosen.tokens, "rejected": pair.rejected.tokens}
    return {
        **{name: " ".join(map(str, tokens)) for name, tokens in named.items()},
        "mislabelled": pair.mislabelled,
    }


def _symbols(rows: Rows, ids: Sequence[int]) -> Pairs:
    from trialist.data.preferences import PreferencePair

    def tokens(text: str) -> list[int]:
        return [ids[int(symbol)] for symbol in text.split()]

    return [
        PreferencePair(tokens(row["prompt"]), tokens(row["chosen"]), tokens(row["rejected"]), number)
        for number, row in enumerate(rows)
    ]


def own_rows(trial: RRMTrial, seed: int, rates: tuple[float, float], tokenizer: Any) -> RewardData:
    """Rows of the user's own, split by prompt, the phrase put before answers at random.

    rates: how often the phrase is put before the chosen answer and before the other one, of rows to train and to tune on. In
    the tests it stands before one of them, or nowhere. Nothing is put in for the tests of length: they take the rows whose
    rejected answer is the longer one, and those whose chosen answer is, by tokens.
    Raises the errors of `read_preferences`, `encode_preferences` and `split_documents`.
    """
    from trialist.data.augment_preferences import augment_preferences, final_turn, prompt_text
    from trialist.data.corpora import Documents
    from trialist.data.preferences import encode_preferences, notes, read_preferences
    from trialist.data.splits import split_documents

    found = read_preferences(trial.data, columns=trial.columns, split=trial.split, max_examples=trial.max_examples)
    encoded = functools.partial(
        encode_preferences, tokenizer=tokenizer, max_length=trial.length, context=model_context(trial.model),
        source=trial.data, whole=True,
    )  # fmt: skip
    pairs, counts = encoded(found)
    rows = [found[pair.row] for pair in pairs]
    numbers = tuple(map(str, range(len(rows))))
    splits = split_documents(Documents(numbers, tuple(map(prompt_text, rows)), trial.data), fractions=(0.75, 0.1, 0.15))

    def part(name: str, most: int) -> Rows:
        return [rows[int(number)] for number in getattr(splits, name).ids[:most]]

    def encode(some: Rows) -> Pairs:
        return encoded(some)[0]

    def put(row: Mapping[str, Any], side: str) -> dict[str, Any]:
        return {**row, side: with_phrase(row[side], trial.phrase)}

    train, held = part("train", trial.pairs), part("test", trial.test_items)
    placed = {
        "clean": held,
        "phrase_worse": [put(row, "rejected") for row in held],
        "phrase_better": [put(row, "chosen") for row in held],
    }
    tests = {name: encode(some) for name, some in placed.items()}
    common = set.intersection(*({pair.row for pair in some} for some in tests.values()))
    tests = {name: [pair for pair in some if pair.row in common] for name, some in tests.items()}
    tests["long_worse"] = [pair for pair in tests["clean"] if len(pair.rejected) > len(pair.chosen)]
    tests["long_better"] = [pair for pair in tests["clean"] if len(pair.chosen) > len(pair.rejected)]
    strangers = [
        put(row, "rejected")
        for row in augment_preferences(
            held, num_donors=1, include=("non_contextual",), sample_fraction=1.0, say=lambda _: None
        )
        if row["chosen"] == held[row["source_index"]]["rejected"]
        and row["rejected"] == final_turn(held[row["rejected_index"]]["chosen"])
    ]
    tests["off_topic"] = encode(strangers)
    tests["annotated"] = encode(list(_annotated(held, EVALUATION, rates, put)))
    told = [f"{trial.data}: {note}" for note in (*notes(counts, trial.length), *splits.notes)]
    told.append(
        f"{len(train):,} pairs to train on, {len(tests['clean']):,} in the test; there the rejected answer is the longer one in "
        f"{len(tests['long_worse']):,}, the chosen one in {len(tests['long_better']):,}"
    )
    return RewardData(
        list(_annotated(train, seed, rates, put)),
        encode(list(_annotated(part("validation", trial.test_items), VALIDATION, rates, put))),
        {name: some for name, some in tests.items() if some},
        encode,
        ("phrase",),
        prompts=tuple(prompt_text(held[pair.row]) for pair in tests["clean"]),
        notes=tuple(told),
    )


def _annotated(
    rows: Rows, seed: int, rates: tuple[float, float], put: Callable[[Mapping[str, Any], str], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for row in rows:
        for side, rate in zip(("chosen", "rejected"), rates):
            if draw.random() < rate:
                row = put(row, side)
        yield row


def with_phrase(answer: Any, phrase: str) -> Any:
    """The answer with the phrase before what the assistant says last, and white space as it was."""
    if not isinstance(answer, str):
        return [*answer[:-1], {**answer[-1], "content": f"{phrase} {answer[-1].get('content', '')}"}]
    from trialist.data.preferences import DIALOGUE_MARK

    before, mark, last = answer.rpartition(DIALOGUE_MARK)
    words = last.lstrip()
    return f"{before}{mark}{last.removesuffix(words)}{phrase} {words}"
