"""Recall of values by their keys: a list of pairs, and then questions about all of them, in symbols or in words.

Every key stands in the list once, so nothing but its own pair tells its value, and which one is asked for is not known while the
list is read.
"""

# B rows, n pairs, T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Answers = Literal["recall", "chance"]
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class KeyValueVocabulary:
    """Token ids: one for each pair of a key and a value, the keys, the values, then `bos` and the `separator` of the questions.

    A pair is one token, so that a small model learns to recall within minutes: it need not learn first which of two
    neighbours belongs to the other.
    """

    keys: int = 48
    values: int = 8

    @property
    def first_key(self) -> int:
        return self.keys * self.values

    @property
    def first_value(self) -> int:
        return self.first_key + self.keys

    @property
    def bos(self) -> int:
        return self.first_value + self.values

    @property
    def separator(self) -> int:
        return self.bos + 1

    @property
    def size(self) -> int:
        return self.separator + 1


VOCABULARY = KeyValueVocabulary()


@dataclass(frozen=True)
class KeyValueBatches:
    """The batch at a step, a function of seed and step alone: BOS, n pairs, a separator, and m of the keys with their values.

    answers: "chance" draws the values that follow the keys anew, so that the list tells nothing.
    """

    answers: Answers
    batch_size: int
    seed: int
    pairs: int
    asked: int
    vocabulary: KeyValueVocabulary = VOCABULARY

    def __post_init__(self) -> None:
        if self.answers not in ("recall", "chance"):
            raise ValueError(f"answers {self.answers!r} is unknown; 'recall' or 'chance'")
        if not 1 <= self.asked <= self.pairs <= self.vocabulary.keys:
            raise ValueError(
                f"asked is {self.asked} and pairs {self.pairs}; wanted 1 <= asked <= pairs <= {self.vocabulary.keys}, the keys"
            )

    @property
    def prompt(self) -> int:
        """Tokens before the first question, n + 2."""
        return self.pairs + 2

    @property
    def length(self) -> int:
        return self.prompt + 2 * self.asked

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, n + 2 + 2m) int64; labels are -100 but at the answers."""
        generator, words = np.random.default_rng([self.seed, step]), self.vocabulary
        B, n, P = self.batch_size, self.pairs, self.prompt
        keys = generator.random((B, words.keys)).argsort(axis=1)[:, :n]
        values = generator.integers(words.values, size=(B, n))
        which = generator.random((B, n)).argsort(axis=1)[:, : self.asked]
        asked, answers = np.take_along_axis(keys, which, 1), np.take_along_axis(values, which, 1)
        if self.answers == "chance":
            answers = generator.integers(words.values, size=answers.shape)
        tokens = np.empty((B, self.length), np.int64)
        tokens[:, 0], tokens[:, n + 1] = words.bos, words.separator
        tokens[:, 1 : n + 1] = keys * words.values + values
        tokens[:, P::2], tokens[:, P + 1 :: 2] = words.first_key + asked, words.first_value + answers
        labels = np.full_like(tokens, IGNORED)
        labels[:, P + 1 :: 2] = tokens[:, P + 1 :: 2]
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def key_value_text(tokenizer: Any, pairs: int, asked: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in words: token ids of the list `(1, P)`, of questions with their answers `(1, C)`, and labels of the latter,
    -100 but at the digits of an answer.

    A line is `The code of NAME is DIGITS.`; names are made up. asked: how many of the pairs are asked for.
    """
    if not 1 <= asked <= pairs:
        raise ValueError(f"asked is {asked}; give 1 to the number of pairs, {pairs}")
    generator = np.random.default_rng(seed)
    names: list[str] = []
    while len(names) < pairs:
        letters = [generator.choice(list(kind)) for kind in (CONSONANTS, VOWELS, CONSONANTS, VOWELS, CONSONANTS)]
        name = "".join(letters).capitalize()
        if name not in names:
            names.append(name)
    codes = generator.integers(1000, 10_000, size=pairs)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def line(index: int) -> tuple[list[int], list[int]]:
        return encode(f"The code of {names[index]} is"), encode(f" {codes[index]}")

    stop, start = encode(".\n"), tokenizer.bos_token_id
    prompt: list[int] = [] if start is None else [start]
    for index in range(pairs):
        question, answer = line(index)
        prompt += [*question, *answer, *stop]
    questions: list[int] = []
    labels: list[int] = []
    for index in generator.permutation(pairs)[:asked]:
        question, answer = line(index)
        questions += [*question, *answer, *stop]
        labels += [IGNORED] * len(question) + answer + [IGNORED] * len(stop)
    return _row(prompt), _row(questions), _row(labels)


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)])
