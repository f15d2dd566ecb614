"""A generated task of preferences with a known reason: which tokens decide, and how long answers are, is set.

A prompt is eight keys. A right answer begins with six tokens of content, each a fixed function of one key, goes on with filler of
random length, may end with a checksum, also a function of a key, and stops. Preferred is the answer with the right
content (setting `first`) or with the right checksum, whose content says nothing (setting `last`).
"""

# N answers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trialist.data.preferences import PreferencePair

VOCABULARY = 64
KEYS, CONTENT, FILLER, END = 0, 16, 32, 62
"""Where the token ids of keys, content and filler begin; the end of an answer"""
PROMPT, SIGNAL, SYMBOLS = 8, 6, 16
"""Keys in a prompt, tokens of content in an answer, different keys and contents"""
SHORTEST, LONGEST, MEAN = 4, 60, 19
"""Tokens of filler: least, most, about as many on average"""
LONGEST_ANSWER = SIGNAL + LONGEST + 2
SETTINGS = ("first", "last")


@dataclass(frozen=True)
class PreferenceTask:
    """Answers, right ones and others, to prompts of keys.

    setting: `first` or `last` tokens decide. seed: of the functions. right: share of answers that imitation learns from whose
    content (and checksum, each apart) is right.
    """

    setting: str
    seed: int
    right: float = 0.75

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, not {self.setting!r}")
        if not 0 < self.right < 1:
            raise ValueError(f"right is a share between 0 and 1, not {self.right}")

    @cached_property
    def functions(self) -> np.ndarray:
        """(6 + 1, 16): from a key to a token of content, and to the checksum."""
        generator = np.random.default_rng([self.seed, 0])
        return CONTENT + np.stack([generator.permutation(SYMBOLS) for _ in range(SIGNAL + 1)])

    def prompts(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """(N, 8) token ids."""
        return KEYS + generator.integers(SYMBOLS, size=(count, PROMPT))

    def content(self, prompts: np.ndarray) -> np.ndarray:
        """The right content, (N, 6)."""
        return np.stack([self.functions[place][prompts[:, place] - KEYS] for place in range(SIGNAL)], axis=1)

    def checksum(self, prompts: np.ndarray) -> np.ndarray:
        """The right checksum, (N,)."""
        return self.functions[SIGNAL][prompts[:, SIGNAL] - KEYS]

    def answers(
        self, prompts: np.ndarray, right: np.ndarray, lengths: np.ndarray, generator: np.random.Generator
    ) -> list[list[int]]:
        """An answer to each prompt, with its end. right: (N, 2) bool, content and checksum. lengths: (N,), of the filler."""
        content = self.content(prompts)
        checksum = self.checksum(prompts)
        found = []
        for row in range(len(prompts)):
            tokens = content[row].copy()
            if not right[row, 0]:
                wrong = generator.permutation(SIGNAL)[: generator.integers(1, 4)]  # one to three of them
                tokens[wrong] = (
                    CONTENT + (tokens[wrong] - CONTENT + generator.integers(1, SYMBOLS, len(wrong))) % SYMBOLS
                )
            filler = generator.integers(FILLER, END, lengths[row])
            end = [END]
            if self.setting == "last":
                shift = 0 if right[row, 1] else int(generator.integers(1, SYMBOLS))
                end = [int(CONTENT + (checksum[row] - CONTENT + shift) % SYMBOLS), END]
            found.append([*tokens.tolist(), *filler.tolist(), *end])
        return found

    def lengths(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Tokens of filler, (N,): at each token from the fourth on the answer may stop, so it needs no counting."""
        return np.minimum(SHORTEST - 1 + generator.geometric(1 / (MEAN - SHORTEST + 1), count), LONGEST)

    def examples(self, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
        """Prompts with answers to imitate: right by chance, content and checksum apart."""
        generator = np.random.default_rng([self.seed, seed, 1])
        prompts = self.prompts(count, generator)
        right = generator.random((count, 2)) < self.right
        answers = self.answers(prompts, right, self.lengths(count, generator), generator)
        return list(zip(prompts.tolist(), answers, strict=True))

    def pairs(self, count: int, seed: int, *, longer: float) -> list[PreferencePair]:
        """Pairs of answers. longer: share of pairs whose chosen answer is the longer one."""
        generator = np.random.default_rng([self.seed, seed, 2])
        prompts = self.prompts(count, generator)
        lengths = np.sort(np.stack([self.lengths(count, generator) for _ in range(2)]), axis=0)  # shorter, longer
        same = lengths[0] == lengths[1]
        lengths[1] += same & (lengths[1] < LONGEST)
        lengths[0] -= same & (lengths[0] == LONGEST)
        chosen_longer = generator.random(count) < longer
        sides = []
        for better in (True, False):
            right = generator.random((count, 2)) < self.right
            right[:, SETTINGS.index(self.setting)] = better  # content decides, or the checksum
            own = np.where(chosen_longer == better, lengths[1], lengths[0])
            sides.append(self.answers(prompts, right, own, generator))
        return [
            PreferencePair(list(p), c, r, row)
            for row, (p, c, r) in enumerate(zip(prompts.tolist(), *sides, strict=True))
        ]

    def right_answers(self, prompts: np.ndarray, answers: Sequence[Sequence[int]]) -> np.ndarray:
        """(N,) bool: whether what decides is right in each finished answer (tokens up to the end, without it)."""
        content, checksum = self.content(prompts), self.checksum(prompts)
        if self.setting == "first":
            return np.array([list(answer[:SIGNAL]) == content[row].tolist() for row, answer in enumerate(answers)])
        return np.array([len(answer) > 0 and answer[-1] == checksum[row] for row, answer in enumerate(answers)])
