"""Three kinds of fine-tuning on generated symbols, and the mixed text that comes before: what a small model can be taught.

`reasoning`: a chain of operations modulo the number of digits, every step written out with its result. `pattern`: a few letters,
to be continued as the text before had it, where each pair of letters has its successor. `format`: letters, to be written in
an order and a frame that two instruction tokens name. The mixed text holds single operations, letters in their usual
succession, copies in frames and copies of expressions, but no chain, no question and no instruction.
"""

# N rows, T tokens

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Kind = Literal["reasoning", "pattern", "format"]
KINDS: tuple[Kind, ...] = ("reasoning", "pattern", "format")
ORDERS = 4
"""As they are, reversed, rotated by one, halves swapped"""
FRAMES = 4
SHOWN = 6
"""Letters before the question in `pattern`"""


@dataclass(frozen=True)
class Symbols:
    """The tasks of a seed. Token ids: digits, operations (+, -, *), letters, orders, frames (opening, closing), tags, marks.

    hops: operations in a chain. letters: of the alphabet; half of all pairs of letters are asked about in tests only.
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
        return max(7 * self.hops + 5, SHOWN + 7, 2 * self.payload + 8)

    @functools.cached_property
    def successors(self) -> np.ndarray:
        """The letter that follows each pair of letters, (letters, letters)."""
        generator = np.random.default_rng([self.seed, self.letters])
        return generator.integers(self.letters, size=(self.letters, self.letters))

    @functools.cached_property
    def tested(self) -> np.ndarray:
        """Whether only tests ask what follows a pair, (letters, letters): half of them."""
        order = np.random.default_rng([self.seed, self.letters, 1]).permutation(self.letters**2)
        return (order < self.letters**2 // 2).reshape(self.letters, self.letters)

    def rows(
        self, kind: Kind, count: int, part: Literal["train", "validation", "test"], draw: int = 0
    ) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (N, T) int64; what is no answer is -100 in `labels`. The same rows at every call.

        draw: another number gives other rows of the same kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; one of {', '.join(KINDS)}")
        parts = ("train", "validation", "test")
        generator = np.random.default_rng([self.seed, KINDS.index(kind), parts.index(part), draw])
        asked, answer = getattr(self, f"_{kind}")(count, part != "train", generator)
        tags = np.tile([self.start, self.first_tag + KINDS.index(kind)], (count, 1))
        marks = np.ones((count, 1), np.int64)
        tokens = np.concatenate([tags, asked, marks * self.ask, answer, marks * self.end], axis=1)
        labels = tokens.copy()
        labels[:, : tokens.shape[1] - answer.shape[1] - 1] = IGNORED
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def _reasoning(self, count: int, held_out: bool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        operations, operands = np.empty((0, self.hops), np.int64), np.empty((0, self.hops + 1), np.int64)
        while len(operations) < count:  # half of all chains are tested only
            more = generator.integers(3, size=(count, self.hops))
            digits = generator.integers(self.digits, size=(count, self.hops + 1))
            kept = self._coin(np.concatenate([more, digits], axis=1)) == held_out
            operations, operands = np.concatenate([operations, more[kept]]), np.concatenate([operands, digits[kept]])
        operations, operands = operations[:count], operands[:count]
        asked = np.empty((count, 2 * self.hops + 1), np.int64)
        asked[:, ::2], asked[:, 1::2] = operands, self.first_operation + operations
        written = np.empty((count, self.hops, 5), np.int64)
        value = operands[:, 0]
        for hop in range(self.hops):
            right = operands[:, hop + 1]
            result = self._apply(operations[:, hop], value, right)
            written[:, hop] = self._fact(value, operations[:, hop], right, result)
            value = result
        return asked, written.reshape(count, -1)

    def _pattern(self, count: int, held_out: bool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.argwhere(self.tested == held_out)
        shown = generator.integers(self.letters, size=(count, SHOWN))
        shown[:, -2:] = pairs[generator.integers(len(pairs), size=count)]
        written = np.concatenate([shown[:, -2:], np.empty((count, 3), np.int64)], axis=1)
        for place in range(2, 5):
            written[:, place] = self.successors[written[:, place - 2], written[:, place - 1]]
        return self.first_letter + shown, self.first_letter + written[:, 2:]

    def _format(self, count: int, held_out: bool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        order, frame = generator.integers(ORDERS, size=count), generator.integers(FRAMES, size=count)
        payload = self.first_letter + generator.integers(self.letters, size=(count, self.payload))
        half = self.payload // 2
        versions = np.stack(
            [payload, payload[:, ::-1], np.roll(payload, -1, axis=1), np.roll(payload, -half, axis=1)]
        )  # (orders, N, payload)
        opening = (self.first_frame + 2 * frame)[:, None]
        asked = np.concatenate([self.first_order + order[:, None], opening, payload], axis=1)
        return asked, np.concatenate([opening, versions[order, np.arange(count)], opening + 1], axis=1)

    def _coin(self, rows: np.ndarray) -> np.ndarray:
        """A fair coin for each row of small numbers, (N, n) -> (N,) bool; the same for equal rows."""
        mixed = np.full(len(rows), 0x9E3779B97F4A7C15 ^ (self.seed & (2**64 - 1)), np.uint64)
        for column in rows.T:
            mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
        return (mixed >> np.uint64(40)) % np.uint64(2) == 1

    def _fact(self, left: np.ndarray, operation: np.ndarray, right: np.ndarray, result: np.ndarray) -> np.ndarray:
        """`left operation right ask result`, (N, 5)."""
        mark = np.full_like(left, self.ask)
        return np.stack([left, self.first_operation + operation, right, mark, result], axis=1)

    def _apply(self, operation: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.stack([left + right, left - right, left * right])[operation, np.arange(len(left))] % self.digits


@dataclass(frozen=True)
class MixedText:
    """Batches of text before fine-tuning, functions of seed and step alone; every token counts."""

    symbols: Symbols
    batch_size: int
    length: int
    usual: float = 0.9
    """Share of letters that follow by the rule"""

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, (B, length) int64: a quarter of the rows of each kind of text."""
        s, n = self.symbols, self.batch_size
        generator = np.random.default_rng([s.seed, 7, step])
        kinds = (self._operations, self._letters, self._copies, self._expressions)
        tokens = np.stack([kind(n, generator) for kind in kinds])  # (4, B, length)
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
        s = self.symbols
        frame = (s.first_frame + 2 * generator.integers(FRAMES, size=rows))[:, None]
        payload = s.first_letter + generator.integers(s.letters, size=(rows, s.payload))
        return self._again(np.concatenate([frame, payload, frame + 1], axis=1))

    def _expressions(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        s = self.symbols
        once = np.full((rows, 2 * s.hops + 2), s.ask)
        once[:, 0:-1:2] = generator.integers(s.digits, size=(rows, s.hops + 1))
        once[:, 1:-1:2] = s.first_operation + generator.integers(3, size=(rows, s.hops))
        return self._again(once)

    def _again(self, once: np.ndarray) -> np.ndarray:
        """The same tokens again and again."""
        return np.tile(once, (1, -(-self.length // once.shape[1])))[:, : self.length]


@dataclass(frozen=True)
class Epochs:
    """Batches from fixed rows, each epoch in an order of its own: a function of seed and step alone.

    Batches of any size pass the rows in the same order; a batch may reach into the next epoch.
    """

    rows: dict[str, Tensor]
    batch_size: int
    seed: int

    def __call__(self, step: int) -> dict[str, Tensor]:
        count = len(self.rows["input_ids"])
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = {place // count for place in places}
        order = {epoch: np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in epochs}
        chosen = torch.tensor([order[place // count][place % count] for place in places])
        return {name: values[chosen] for name, values in self.rows.items()}
