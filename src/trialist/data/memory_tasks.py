"""Generated tasks that ask what a recurrent state can hold: selective copying, and parity.

Selective copying (arXiv 2410.01201, after Mamba): a few values stand among blanks at places that change from row to row, and
must be named in their order afterwards, at markers that all look alike. A gate that sees only its own input cannot tell the
third marker from the second. Parity: whether the ones so far are odd, at every bit; the state must be changed by what it is.

An answer is asked for by the token before its label, as language models predict: `labels[:, i + 1]` is the answer at token i.
"""

# B rows, n values, T tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

MemoryTask = Literal["selective-copying", "parity"]
SYMBOLS = 8


def vocabulary_size(symbols: int) -> int:
    """The symbols, a blank (id `symbols`) and a marker (the next)."""
    return symbols + 2


def selective_copying(
    rows: int, length: int, values: int, symbols: int = SYMBOLS, *, generator: np.random.Generator
) -> dict[str, Tensor]:
    """`length` tokens of which `values` are not blank, a marker for each of them, one marker more: `input_ids` (B, T).

    T = length + values + 1. `labels` is -100 but behind each marker, where it is the value of that rank.
    symbols: of how many a value is one, 0 to `symbols` - 1; the blank is `symbols`, the marker `symbols` + 1.
    """
    if rows < 1 or symbols < 2 or not 1 <= values <= length:
        raise ValueError(
            f"expected rows >= 1, symbols >= 2 and 1 <= values <= length, not {rows}, {symbols}, {values} and {length}"
        )
    places = np.sort(generator.random((rows, length)).argsort(axis=1)[:, :values], axis=1)  # (B, n)
    content = generator.integers(symbols, size=(rows, values))
    tokens = np.full((rows, length + values + 1), symbols + 1, np.int64)
    tokens[:, :length] = symbols
    np.put_along_axis(tokens, places, content, axis=1)
    labels = np.full_like(tokens, IGNORED)
    labels[:, length + 1 :] = content
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def parity(
    rows: int, length: int, first: int = 1, symbols: int = SYMBOLS, *, generator: np.random.Generator
) -> dict[str, Tensor]:
    """`length` random bits and a blank: `input_ids` (B, length + 1). `labels` is 1 where the bits so far hold an odd number
    of ones.

    first: the bit from which on answers are asked for, counted from 1; before it `labels` is -100. symbols: as in
        `selective_copying`, of which the bits are the first two.
    """
    if rows < 1 or not 1 <= first <= length:
        raise ValueError(f"expected rows >= 1 and 1 <= first <= length, not {rows}, {first} and {length}")
    bits = generator.integers(2, size=(rows, length))
    tokens = np.full((rows, length + 1), symbols, np.int64)
    tokens[:, :length] = bits
    labels = np.full_like(tokens, IGNORED)
    labels[:, first:] = (bits.cumsum(axis=1) % 2)[:, first - 1 :]
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


@dataclass(frozen=True)
class MemoryBatches:
    """The batch at a step, a function of seed and step alone."""

    task: MemoryTask
    batch_size: int
    seed: int
    length: int
    """Tokens before the first marker, or bits"""
    values: int = 8
    """Values among the blanks, in selective copying"""
    first: int = 1
    """In parity, the bit from which on answers are asked for"""
    symbols: int = SYMBOLS
    """Of how many a value is one"""

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, T) int64."""
        generator = np.random.default_rng([self.seed, step])
        if self.task == "parity":
            return parity(self.batch_size, self.length, self.first, self.symbols, generator=generator)
        if self.task == "selective-copying":
            return selective_copying(self.batch_size, self.length, self.values, self.symbols, generator=generator)
        raise ValueError(f"task {self.task!r} is unknown; one of selective-copying, parity")
