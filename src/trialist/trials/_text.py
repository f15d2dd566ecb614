"""Text for trials that train on it: split, tokenised and packed once per content, shared by all arms and seeds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context

if TYPE_CHECKING:
    from torch import nn

    from trialist.data.corpora import Documents
    from trialist.data.packing import PackedRows
    from trialist.data.splits import Splits

BUILT_IN_DATA = ("python-stdlib", "enwik8")
PIECES = 16
"""The test text comes from at least so many documents, where there are as many"""
BYTES_PER_TOKEN = 6
"""More than tokenizers other than bytes reach on text: bounds how much text is tokenised"""
ORDER = 20_001
"""Seed of the order in which documents are taken; the same for every seed of the trial, as the test text must be"""


@dataclass(frozen=True)
class Text:
    """Where text comes from and how much of it is needed."""

    data: str
    tokenizer: str
    """`bytes`, `bpe-N`, or the model whose tokenizer it is"""
    split: str | None
    columns: str
    max_examples: int | None
    length: int
    """Tokens in a row"""
    train_tokens: int
    test_bytes: int

    def splits(self) -> Splits:
        return _splits(self.data, self.split, self.columns, self.max_examples)

    def check(self) -> None:
        """Raises ValueError or FileNotFoundError for data and tokenizers that cannot serve; reads the user's own data."""
        if self.data not in BUILT_IN_DATA:
            self.splits()
        self.check_tokenizer()

    def check_tokenizer(self) -> None:
        """Raises ValueError or FileNotFoundError for a tokenizer that cannot serve."""
        if self.tokenizer.startswith("bpe-"):
            if not self.tokenizer[4:].isdigit():
                raise ValueError(
                    f"--tokenizer {self.tokenizer!r}: `bytes`, or `bpe-` and a number of tokens such as bpe-4096"
                )
        elif self.tokenizer != "bytes":
            from trialist.data.tokenizers import load_tokenizer

            load_tokenizer(self.tokenizer)

    def digest(self) -> str:
        from trialist.data.corpora import data_digest

        return data_digest(self.data)

    def remarks(self) -> tuple[str, ...]:
        """Sizes of the splits, and what a reader of results should know about them."""
        splits = self.splits()
        return (f"data {self.data}: {splits}", *splits.notes)

    def stage(self, context: Context, shuffled: bool) -> Path:
        """The folder with packed rows of train, validation and test; `shuffled` puts each document's tokens in random order."""
        inputs = (
            self.digest(),
            *(getattr(self, name) for name in self.__dataclass_fields__ if name != "data"),
            shuffled,
        )
        return context.stage("text", inputs, functools.partial(build, self, shuffled))


@functools.lru_cache(maxsize=4)
def _splits(data: str, split: str | None, columns: str, max_examples: int | None) -> Splits:
    from trialist.data.corpora import parse_columns
    from trialist.data.splits import load_splits

    return load_splits(
        data, split=split, columns=parse_columns(columns) if columns else None, max_examples=max_examples
    )


def build(text: Text, shuffled: bool, folder: Path) -> None:
    """Fills a stage: `train.npz`, `validation.npz`, `test.npz` with packed rows and the bytes they stand for, tokenizer files."""
    import numpy as np

    from trialist.data.packing import pack, shuffle_tokens
    from trialist.data.tokenizers import bpe_tokenizer, document_start, encode_documents, load_tokenizer

    splits = text.splits()
    train_bytes = text.train_tokens * (1 if text.tokenizer == "bytes" else BYTES_PER_TOKEN)
    texts = {
        "train": take(splits.train, train_bytes, longest=None),
        "validation": take(splits.validation, text.test_bytes, longest=text.test_bytes // PIECES),
        "test": take(splits.test, text.test_bytes, longest=text.test_bytes // PIECES),
    }
    if text.tokenizer.startswith("bpe-"):
        tokenizer: Any = bpe_tokenizer(splits.train.texts, int(text.tokenizer[4:]))
    else:
        tokenizer = load_tokenizer(text.tokenizer)
    for part, chosen in texts.items():
        tokens = encode_documents(tokenizer, chosen)
        if shuffled:
            tokens = shuffle_tokens(tokens, ORDER)
        rows = pack(tokens, text.length, bos_id=document_start(tokenizer))
        np.savez(
            folder / f"{part}.npz",
            tokens=rows.tokens,
            positions=rows.positions,
            pieces=rows.pieces,
            bytes=sum(len(entry.encode()) for entry in chosen),
        )
    tokenizer.save_pretrained(folder)


def take(documents: Documents, size: int, longest: int | None) -> list[str]:
    """Documents in a fixed random order, each cut to `longest` characters, until they hold `size` bytes."""
    import numpy as np

    chosen: list[str] = []
    total = 0
    for index in np.random.default_rng(ORDER).permutation(len(documents)):
        entry = documents.texts[index][:longest]
        chosen.append(entry)
        total += len(entry.encode())
        if total >= size:
            break
    return chosen


def load_rows(folder: Path, part: str) -> tuple[PackedRows, int]:
    """Packed rows of a part, and the bytes of its text."""
    import numpy as np

    from trialist.data.packing import PackedRows

    with np.load(folder / f"{part}.npz") as stored:
        return PackedRows(stored["tokens"], stored["positions"], stored["pieces"]), int(stored["bytes"])


def bits_per_byte(model: nn.Module, rows: PackedRows, size: int, *, batch: int) -> float:
    """Bits of surprise over all scored tokens, per byte of the text that they stand for."""
    from trialist.evaluation.bits_per_byte import bits_of_pieces

    return float(bits_of_pieces(model, rows, batch_size=batch).sum()) / size
