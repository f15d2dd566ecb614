"""Fine-tuning tasks of generated symbols, and the mixed text that comes before: what a small model can be taught.

`reasoning`: a chain of operations modulo the number of digits, every step written out with its result. `pattern`: a few letters,
to be continued as the text before had it, where each pair of letters has its successor. `format`: letters, to be written in
an order and a frame that two instruction tokens name; `long-format` has twice as many letters. The mixed text holds single
operations, letters in their usual succession, letters in frames put in order again and again, and copies of expressions, but no
chain, no question and no instruction.
"""

# N rows, T tokens, Q tokens of a question, A tokens of an answer

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Kind = Literal["reasoning", "pattern", "format", "long-format"]
KINDS: tuple[Kind, ...] = ("reasoning", "pattern", "format", "long-format")
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "train", "validation", "test")
"""Half of all that can be asked is for training, a quarter each for validation and test"""
ORDERS = 4
"""As they are, reversed, rotated by one, halves swapped (`in_order`)"""
FRAMES = 4
SHOWN = 6
"""Letters before the question in `pattern`"""
CONTINUED = 3
"""Letters to be continued in `pattern`"""
ROUNDS = 64
"""Times that questions are drawn before there are held to be no more different ones"""


@dataclass(frozen=True)
class Symbols:
    """The tasks of a seed. Token ids: digits, operations (+, -, *), letters, orders, frames (opening, closing), tags, marks.

    hops: operations in a chain. letters: of the alphabet. payload: letters to be put in order. No two rows of a part ask the
    same, and no two parts do: the chain, the pair of letters to go on from, or order, frame and letters decide on the part.
    """

    seed: int
    digits: int = 10
    letters: int = 20
    hops: int = 3
    payload: int = 4

    def __post_init__(self) -> None:
        if self.digits < 2 or self.letters < 4 or self.hops < 1 or self.payload < 2:
            raise ValueError(
                "expected digits >= 2, letters >= 4, hops >= 1 and payload >= 2, not "
                f"{self.digits}, {self.letters}, {self.hops} and {self.payload}"
            )

    @property
    def first_operation(self) -> int:
        return self.digits

    @property
    def first_letter(self) -> int:
        return self.first_operation + 3

    @property
    def first_order(self) -> int:
        return self.first_letter + self.letters

    @property
    def first_frame(self) -> int:
        return self.first_order + ORDERS

    @property
    def first_tag(self) -> int:
        return self.first_frame + 2 * FRAMES

    @property
    def start(self) -> int:
        return self.first_tag + len(KINDS)

    @property
    def ask(self) -> int:
        return self.start + 1

    @property
    def end(self) -> int:
        return self.start + 2

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self.start + 3

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(7 * self.hops + 5, SHOWN + CONTINUED + 4, 4 * self.payload + 8)

    @functools.cached_property
    def successors(self) -> np.ndarray:
        """The letter that follows each pair of letters, (letters, letters)."""
        generator = np.random.default_rng([self.seed, self.letters])
        return generator.integers(self.letters, size=(self.letters, self.letters))

    @functools.cached_property
    def part_of_pair(self) -> np.ndarray:
        """Index into `PARTS` for each pair of letters, (letters, letters): from which part `pattern` goes on from it."""
        order = np.random.default_rng([self.seed, self.letters, 1]).permutation(self.letters**2)
        return (order % len(PARTS)).reshape(self.letters, self.letters)

    def rows(self, kind: Kind, count: int, part: Part) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (N, T) int64; what is no answer is -100 in `labels`. The same rows at every call.

        Raises ValueError for an unknown kind, and where there are fewer than `count` different questions.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; one of {', '.join(KINDS)}")
        asked = self._different(kind, count, part)  # (N, Q)
        answer = getattr(self, f"_answer_{kind.removeprefix('long-')}")(asked)  # (N, A)
        tags = np.tile([self.start, self.first_tag + KINDS.index(kind)], (count, 1))
        marks = np.ones((count, 1), np.int64)
        tokens = np.concatenate([tags, asked, marks * self.ask, answer, marks * self.end], axis=1)
        labels = tokens.copy()
        labels[:, : tokens.shape[1] - answer.shape[1] - 1] = IGNORED
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def _different(self, kind: Kind, count: int, part: Part) -> np.ndarray:
        """Questions of a part, no two the same, in the order in which they were drawn, (N, Q)."""
        generator = np.random.default_rng([self.seed, KINDS.index(kind), PARTS.index(part)])
        ask, parts = getattr(self, f"_ask_{kind.removeprefix('long-')}"), np.array(PARTS)
        found = ask(kind, 0, generator)
        for _ in range(ROUNDS):
            more = ask(kind, 2 * count, generator)
            coin = self._pair_parts(more) if kind == "pattern" else self._coins(more)
            found = np.concatenate([found, more[parts[coin] == part]])
            found = found[np.sort(np.unique(found, axis=0, return_index=True)[1])]
            if len(found) >= count:
                return found[:count]
        raise ValueError(
            f"there are {len(found):,} different questions of {kind} for {part}, and {count:,} are needed; take fewer rows, or "
            f"more {'digits or hops' if kind == 'reasoning' else 'letters'}"
        )

    def _ask_reasoning(self, kind: Kind, count: int, generator: np.random.Generator) -> np.ndarray:
        asked = np.empty((count, 2 * self.hops + 1), np.int64)
        asked[:, ::2] = generator.integers(self.digits, size=(count, self.hops + 1))
        asked[:, 1::2] = self.first_operation + generator.integers(3, size=(count, self.hops))
        return asked

    def _answer_reasoning(self, asked: np.ndarray) -> np.ndarray:
        written = np.empty((len(asked), self.hops, 5), np.int64)
        value = asked[:, 0]
        for hop in range(self.hops):
            operation, right = asked[:, 2 * hop + 1] - self.first_operation, asked[:, 2 * hop + 2]
            result = self._apply(operation, value, right)
            written[:, hop] = self._fact(value, operation, right, result)
            value = result
        return written.reshape(len(asked), -1)

    def _ask_pattern(self, kind: Kind, count: int, generator: np.random.Generator) -> np.ndarray:
        return self.first_letter + generator.integers(self.letters, size=(count, SHOWN))

    def _answer_pattern(self, asked: np.ndarray) -> np.ndarray:
        written = np.empty((len(asked), 2 + CONTINUED), np.int64)
        written[:, :2] = asked[:, -2:] - self.first_letter
        for place in range(2, 2 + CONTINUED):
            written[:, place] = self.successors[written[:, place - 2], written[:, place - 1]]
        return self.first_letter + written[:, 2:]

    def _ask_format(self, kind: Kind, count: int, generator: np.random.Generator) -> np.ndarray:
        order, frame = generator.integers(ORDERS, size=(count, 1)), generator.integers(FRAMES, size=(count, 1))
        payload = generator.integers(self.letters, size=(count, self.payload * (2 if kind == "long-format" else 1)))
        return np.concatenate(
            [self.first_order + order, self.first_frame + 2 * frame, self.first_letter + payload], axis=1
        )

    def _answer_format(self, asked: np.ndarray) -> np.ndarray:
        opening, payload = asked[:, 1:2], asked[:, 2:]
        return np.concatenate([opening, in_order(payload, asked[:, 0] - self.first_order), opening + 1], axis=1)

    def _pair_parts(self, asked: np.ndarray) -> np.ndarray:
        """(N, Q) -> (N,): the part of the pair of letters that each question goes on from."""
        return self.part_of_pair[asked[:, -2] - self.first_letter, asked[:, -1] - self.first_letter]

    def _coins(self, asked: np.ndarray) -> np.ndarray:
        """A fair throw of 0 to 3 for each question, (N, Q) -> (N,); the same for equal ones."""
        mixed = np.full(len(asked), 0x9E3779B97F4A7C15 ^ (self.seed & (2**64 - 1)), np.uint64)
        for column in asked.T:
            mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
        return (mixed >> np.uint64(40)) % np.uint64(len(PARTS))

    def _fact(self, left: np.ndarray, operation: np.ndarray, right: np.ndarray, result: np.ndarray) -> np.ndarray:
        """`left operation right ask result`, (N, 5)."""
        mark = np.full_like(left, self.ask)
        return np.stack([left, self.first_operation + operation, right, mark, result], axis=1)

    def _apply(self, operation: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.stack([left + right, left - right, left * right])[operation, np.arange(len(left))] % self.digits


def in_order(payload: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Letters (N, n) as they are, reversed, rotated by one, or with their halves swapped, by order (N,)."""
    half = payload.shape[1] // 2
    versions = np.stack([payload, payload[:, ::-1], np.roll(payload, -1, axis=1), np.roll(payload, -half, axis=1)])
    return versions[order, np.arange(len(payload))]


@dataclass(frozen=True)
class MixedText:
    """Batches of text before fine-tuning, functions of seed and step alone; every token counts."""

    symbols: Symbols
    batch_size: int
    length: int
    usual: float = 0.9
    """Share of letters that follow by the rule"""

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, (B, length) int64: two fifths of the rows are operations, a fifth each of the other kinds of text."""
        s, n = self.symbols, self.batch_size
        generator = np.random.default_rng([s.seed, 7, step])
        kinds = (self._operations, self._letters, self._copies, self._expressions, self._operations)
        tokens = np.stack([kind(n, generator) for kind in kinds])  # (5, B, length)
        return {"input_ids": torch.from_numpy(tokens[np.arange(n) % len(kinds), np.arange(n)])}

    def _operations(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        s = self.symbols
        count = -(-self.length // 5)
        operation, left, right = (generator.integers(high, size=rows * count) for high in (3, s.digits, s.digits))
        written = s._fact(left, operation, right, s._apply(operation, left, right)).reshape(rows, -1)
        return written[:, : self.length]

    def _letters(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        s = self.symbols
        found = generator.integers(s.letters, size=(rows, self.length))
        usual = generator.random((rows, self.length)) < self.usual
        for place in range(2, self.length):
            following = s.successors[found[:, place - 2], found[:, place - 1]]
            found[:, place] = np.where(usual[:, place], following, found[:, place])
        return s.first_letter + found

    def _copies(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        """Letters in a frame, each time in the same one of the orders of the time before."""
        s = self.symbols
        opening = (s.first_frame + 2 * generator.integers(FRAMES, size=rows))[:, None]
        payload = s.first_letter + generator.integers(s.letters, size=(rows, s.payload))
        order, found = generator.integers(ORDERS, size=rows), []
        for _ in range(-(-self.length // (s.payload + 2))):
            found += [opening, payload, opening + 1]
            payload = in_order(payload, order)
        return np.concatenate(found, axis=1)[:, : self.length]

    def _expressions(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        s = self.symbols
        once = np.full((rows, 2 * s.hops + 2), s.ask)
        once[:, 0:-1:2] = generator.integers(s.digits, size=(rows, s.hops + 1))
        once[:, 1:-1:2] = s.first_operation + generator.integers(3, size=(rows, s.hops))
        return np.tile(once, (1, -(-self.length // once.shape[1])))[:, : self.length]
