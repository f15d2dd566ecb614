"""Generated recall tasks: variable assignment with overwrites, and its negative controls, plain copying and chance answers.

Variable assignment is a motivating task of selective attention (arXiv:2410.02703): only the last value of a variable
counts, so a model that can ignore overwritten pairs generalises to longer sequences. In copying nothing is overwritten; where
answers are drawn by chance, nothing that was assigned helps.
"""

# B rows, n pairs, T tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Task = Literal["assignment", "copying", "chance"]


@dataclass(frozen=True)
class RecallVocabulary:
    """Token ids: variables first, then values, then `bos` and the `separator` that starts the copy."""

    variables: int = 4
    values: int = 10

    def __post_init__(self) -> None:
        if self.variables < 1 or self.values < 2:
            raise ValueError(f"at least 1 variable and 2 values are needed, not {self.variables} and {self.values}")

    @property
    def bos(self) -> int:
        return self.variables + self.values

    @property
    def separator(self) -> int:
        return self.bos + 1

    @property
    def size(self) -> int:
        return self.separator + 1


VOCABULARY = RecallVocabulary()


def variable_assignment(
    rows: int, pairs: int, *, generator: np.random.Generator, vocabulary: RecallVocabulary = VOCABULARY
) -> dict[str, Tensor]:
    """BOS, n pairs (variable, value), a variable that occurred, its last value: `input_ids` (B, 2n + 3).

    `labels` is -100 but at the last token, the answer.
    """
    _check(rows, pairs)
    names = generator.integers(vocabulary.variables, size=(rows, pairs))
    contents = generator.integers(vocabulary.values, size=(rows, pairs))
    occurs = (names[:, :, None] == np.arange(vocabulary.variables)).any(axis=1)  # (B, variables)
    asked = np.where(occurs, generator.random(occurs.shape), -1.0).argmax(axis=1)  # uniform among those that occur
    last = pairs - 1 - (names == asked[:, None])[:, ::-1].argmax(axis=1)
    tokens = np.empty((rows, 2 * pairs + 3), np.int64)
    tokens[:, 0] = vocabulary.bos
    tokens[:, 1:-2:2] = names
    tokens[:, 2:-2:2] = vocabulary.variables + contents
    tokens[:, -2] = asked
    tokens[:, -1] = vocabulary.variables + contents[np.arange(rows), last]
    return _batch(tokens, first_answer=2 * pairs + 2)


def copying(
    rows: int, pairs: int, *, generator: np.random.Generator, vocabulary: RecallVocabulary = VOCABULARY
) -> dict[str, Tensor]:
    """BOS, n values, separator, the same n values: `input_ids` (B, 2n + 2), as long as n pairs of assignments but one.

    `labels` is -100 but on the copy.
    """
    _check(rows, pairs)
    contents = vocabulary.variables + generator.integers(vocabulary.values, size=(rows, pairs))
    marks = np.ones((rows, 1), np.int64)
    tokens = np.concatenate([marks * vocabulary.bos, contents, marks * vocabulary.separator, contents], axis=1)
    return _batch(tokens, first_answer=pairs + 2)


def chance_answers(
    rows: int, pairs: int, *, generator: np.random.Generator, vocabulary: RecallVocabulary = VOCABULARY
) -> dict[str, Tensor]:
    """Variable assignment whose answer is any value, whatever was assigned: `input_ids` and `labels` (B, 2n + 3)."""
    tokens = variable_assignment(rows, pairs, generator=generator, vocabulary=vocabulary)["input_ids"].numpy()
    tokens[:, -1] = vocabulary.variables + generator.integers(vocabulary.values, size=rows)
    return _batch(tokens, first_answer=2 * pairs + 2)


@dataclass(frozen=True)
class RecallBatches:
    """The batch at a step, a function of seed and step alone; the number of pairs is drawn anew each step.

    A fixed length (`fewest == most`) with another `seed` gives an evaluation set: its batches 0, 1, ...
    """

    task: Task
    batch_size: int
    seed: int
    fewest: int = 4
    most: int = 24
    vocabulary: RecallVocabulary = VOCABULARY

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is unknown; one of {', '.join(TASKS)}")
        if not 1 <= self.fewest <= self.most:
            raise ValueError(f"expected 1 <= fewest <= most, not {self.fewest} and {self.most}")

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, T) int64."""
        generator = np.random.default_rng([self.seed, step])
        pairs = int(generator.integers(self.fewest, self.most + 1))
        return TASKS[self.task](self.batch_size, pairs, generator=generator, vocabulary=self.vocabulary)


TASKS = {"assignment": variable_assignment, "copying": copying, "chance": chance_answers}


def _batch(tokens: np.ndarray, first_answer: int) -> dict[str, Tensor]:
    labels = tokens.copy()
    labels[:, :first_answer] = IGNORED
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def _check(rows: int, pairs: int) -> None:
    if rows < 1 or pairs < 1:
        raise ValueError(f"rows and pairs must be at least 1, not {rows} and {pairs}")
