"""Documents packed into rows of equal length; position ids restart at each document piece, and no piece sees another.

`pack` is for running text. A document that does not fit goes on in the next row: its new piece begins with the last token
of the one before, as context that is not scored. So every token behind a BOS is scored exactly once and no row is padded
but by single slots. `pack_whole` is for examples: each stays whole in one row, and some of its tokens may not count.
"""

# N rows, T slots per row, P pieces

from __future__ import annotations

import bisect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of packed documents, stored compactly; the properties and `rows` give int64 tensors."""

    tokens: np.ndarray
    """(N, T) token ids; padding repeats the first token of the first row"""
    positions: np.ndarray
    """(N, T) position within the piece; 0 for padding"""
    pieces: np.ndarray
    """(P, 3) document index, offset in the flattened rows, length"""
    counted: np.ndarray | None = None
    """(N, T) bool: tokens whose prediction counts; None: all but the first of each piece and padding"""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> int:
        """Number of tokens whose prediction counts."""
        return int(np.count_nonzero(self.positions if self.counted is None else self.counted))

    @property
    def input_ids(self) -> Tensor:
        return torch.from_numpy(self.tokens.astype(np.int64))  # (N, T)

    @property
    def position_ids(self) -> Tensor:
        return torch.from_numpy(self.positions.astype(np.int64))  # (N, T)

    @property
    def labels(self) -> Tensor:
        """The token itself where its prediction counts, else -100: at the first token of a piece and in padding always."""
        counted = self.positions > 0 if self.counted is None else self.counted
        return torch.from_numpy(np.where(counted, self.tokens.astype(np.int64), IGNORED))  # (N, T)

    @property
    def documents(self) -> Tensor:
        """Index of the document that a slot belongs to, -1 in padding."""
        owner = np.full(self.tokens.size, -1, np.int64)
        for document, offset, size in self.pieces:
            owner[offset : offset + size] = document
        return torch.from_numpy(owner.reshape(self.tokens.shape))  # (N, T)

    def rows(self, indices: Tensor | Sequence[int] | slice) -> dict[str, Tensor]:
        """`input_ids`, `position_ids` and `labels`, each (B, T), of the rows `indices`."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices)
        counted = None if self.counted is None else self.counted[chosen]
        part = PackedRows(self.tokens[chosen], self.positions[chosen], self.pieces[:0], counted)
        return {"input_ids": part.input_ids, "position_ids": part.position_ids, "labels": part.labels}


def pack(token_lists: Sequence[Sequence[int] | np.ndarray], length: int, *, bos_id: int | None) -> PackedRows:
    """Packs documents in order into rows of `length` tokens; empty documents are left out.

    bos_id: token put before each document, so that its first token is scored too; None for tokenizers without one.
    Raises ValueError when length < 2 or nothing is left to predict.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 (a token and its prediction), not {length}")
    documents = [np.asarray(tokens) for tokens in token_lists]
    first = 0 if bos_id is None else 1
    pieces: list[tuple[int, int, int, int]] = []  # document, offset in the rows, length, start in the document
    offset = 0
    for index, tokens in enumerate(documents):
        size, start = len(tokens) + first, 0
        if len(tokens) == 0 or size < 2:
            continue
        while start < size - 1:
            room = length - offset % length
            if room == 1:  # a lone slot predicts nothing
                offset += 1
                room = length
            taken = min(room, size - start)
            pieces.append((index, offset, taken, start))
            offset += taken
            start += taken - 1
    if not pieces:
        raise ValueError("there is nothing to pack: no document has a token to predict")
    rows = -(-offset // length)
    largest = max(max(int(tokens.max()) for tokens in documents if len(tokens)), bos_id or 0)
    filler = bos_id if bos_id is not None else int(documents[pieces[0][0]][0])
    flat = np.full(rows * length, filler, np.min_scalar_type(largest))
    positions = np.zeros(rows * length, np.min_scalar_type(length))
    steps = np.arange(length, dtype=positions.dtype)
    for index, offset, taken, start in pieces:
        tokens = documents[index]
        if start == 0 and bos_id is not None:
            flat[offset] = bos_id
            flat[offset + 1 : offset + taken] = tokens[: taken - 1]
        else:
            flat[offset : offset + taken] = tokens[start - first : start - first + taken]
        positions[offset : offset + taken] = steps[:taken]
    return PackedRows(flat.reshape(rows, length), positions.reshape(rows, length), np.array(pieces, np.int64)[:, :3])


def pack_whole(
    token_lists: Sequence[Sequence[int] | np.ndarray],
    length: int,
    *,
    counted: Sequence[Sequence[bool] | np.ndarray] | None = None,
) -> PackedRows:
    """Packs examples, each whole in one row of `length` tokens: longest first, each into the fullest row that still has
    room for it (best fit decreasing), and the rows in the order of their first examples.

    counted: for each example which of its tokens count, as long as the example; None: all. The first token of an example
        never counts, as nothing predicts it. An example's piece names its place in `token_lists`.
    Raises ValueError for an empty example, for one longer than `length`, and for a mask of another length.
    """
    examples = [np.asarray(tokens) for tokens in token_lists]
    masks = None if counted is None else [np.asarray(mask, bool) for mask in counted]
    if not examples:
        raise ValueError("there is nothing to pack: no example was given")
    if masks is not None and [len(mask) for mask in masks] != [len(tokens) for tokens in examples]:
        raise ValueError("counted must hold one value for each token of each example")
    for number, tokens in enumerate(examples):
        if not 0 < len(tokens) <= length:
            raise ValueError(
                f"example {number} has {len(tokens)} tokens; a row takes 1 to {length}, cut or drop it before"
            )
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room left, row; sorted
    for index in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[index])
        place = bisect.bisect_left(open_rows, (size, 0))
        if place == len(open_rows):
            room, row = length, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(index)
        if room > size:
            bisect.insort(open_rows, (room - size, row))
    rows = sorted((sorted(row) for row in rows), key=lambda row: row[0])
    largest = max(int(tokens.max()) for tokens in examples)
    tokens_of = np.full((len(rows), length), examples[0][0], np.min_scalar_type(largest))
    positions = np.zeros((len(rows), length), np.min_scalar_type(length))
    counts = np.zeros((len(rows), length), bool)
    pieces = []
    for number, members in enumerate(rows):
        offset = 0
        for index in members:
            size = len(examples[index])
            part = slice(offset, offset + size)
            tokens_of[number, part] = examples[index]
            positions[number, part] = np.arange(size)
            counts[number, part] = True if masks is None else masks[index]
            counts[number, offset] = False
            pieces.append((index, number * length + offset, size))
            offset += size
    return PackedRows(tokens_of, positions, np.array(pieces, np.int64), counts)


def shuffle_tokens(token_lists: Sequence[Sequence[int] | np.ndarray], seed: int) -> list[np.ndarray]:
    """Each document with its own tokens in a random order: unigram statistics stay, order carries nothing.

    The order depends on the seed and the document alone, not on the documents beside it. On the tokens of
    `byte_tokenizer` these are shuffled bytes (which are seldom valid UTF-8, hence no text).
    """
    shuffled = []
    for tokens in map(np.asarray, token_lists):
        key = zlib.crc32(np.ascontiguousarray(tokens, np.int64).tobytes())
        shuffled.append(np.random.default_rng([seed, len(tokens), key]).permutation(tokens))
    return shuffled
