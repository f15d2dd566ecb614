"""Bits per byte of any text, document by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trialist.evaluation.results import (
    Evaluated,
    Evaluation,
    Metric,
    Progress,
    context_length,
    item_id,
    silent,
    too_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 1024


@dataclass(frozen=True)
class Text(Evaluation):
    """Bits of surprise per UTF-8 byte: comparable over tokenizers. Every byte counts, every token is scored once."""

    about: ClassVar[str] = "bits per byte of any text"

    data: str
    """Local text, JSONL or Parquet file or folder, Hub id, or python-stdlib, enwik8"""
    split: str | None = None
    """Split of the data to read"""
    columns: str | None = None
    """Column that holds the text, text=NAME"""
    limit: int | None = None
    """Most documents, the first ones of the data"""
    length: int | None = None
    """Tokens in a window; without it the model's context, at most 1024"""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("bits_per_byte", "lower", "bits per byte"),
            Metric("bits", "lower", "bits"),
            Metric("bytes", "lower", "bytes"),
        )

    def check(self) -> None:
        for name, value, least in (("limit", self.limit, 1), ("length", self.length, 2)):
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}")
        self._documents()

    def digest(self) -> str:
        from trialist.data.corpora import data_digest

        return data_digest(self.data)

    def check_fit(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        if context is not None and self.length is not None and self.length > context:
            raise too_long(f"a window (--length {self.length})", self.length, context)

    def _documents(self):  # type: ignore[no-untyped-def]
        from trialist.data.corpora import load_documents, parse_columns

        columns: Mapping[str, str] | None = parse_columns(self.columns) if self.columns else None
        return load_documents(self.data, split=self.split, columns=columns, max_examples=self.limit)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16, seed: int = 0,
        progress: Progress = silent,
    ) -> Evaluated:  # fmt: skip
        from trialist.evaluation.bits_per_byte import bits_per_byte

        documents = self._documents()
        context = context_length(model)
        self.check_fit(tokenizer, context)
        length = self.length or min(context or WINDOW, WINDOW)
        result = bits_per_byte(model, tokenizer, documents, length=length, batch_size=batch, progress=progress)
        ids = tuple(item_id(name, text) for name, text in zip(documents.ids, documents.texts))
        bits = tuple(result.per_document[name][0] for name in documents.ids)
        sizes = tuple(float(result.per_document[name][1]) for name in documents.ids)
        # divided by the mean size, so that the mean over documents is all bits over all bytes
        mean = sum(sizes) / len(sizes)
        return Evaluated(
            ids,
            {"bits_per_byte": tuple(b / mean for b in bits), "bits": bits, "bytes": sizes},
            {"bits_per_byte": result.value, "bits": sum(bits), "bytes": sum(sizes)},
            tokens=result.tokens,
            notes=(
                f"windows of {length} tokens without overlap, each document behind one start token",
                "an item's bits_per_byte is its bits over the mean bytes of a document, so that the mean of the items "
                "is all bits over all bytes",
            ),
        )
