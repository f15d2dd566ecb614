"""A sample of a text as packed rows, for what is fitted to a text or measured on it where all of it would take too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from trialist.data.corpora import Documents
from trialist.data.packing import PackedRows, pack
from trialist.data.splits import hold_out
from trialist.data.tokenizers import document_start, encode_documents

CHARACTERS_PER_TOKEN = 8
"""More than tokenizers reach on text: bounds how much text is tokenised and compared"""
ORDER = 20_001
"""Seed of the order in which documents are taken"""


@dataclass(frozen=True, eq=False)
class TextSample:
    rows: PackedRows
    bytes: int
    """UTF-8 bytes that the scored tokens stand for"""


def sample_text(documents: Documents, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int) -> TextSample:
    """About `tokens` tokens in rows of `length`: documents in a fixed random order, the last one cut; fewer where the text ends.

    Raises ValueError for a tokenizer that has no token to start a document with, and for text that gives no token.
    """
    first = document_start(tokenizer)
    if first is None:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS, so a document's first token cannot be predicted; set one"
        )
    chosen: list[np.ndarray] = []
    left, size = tokens, 0
    for text in _in_order(documents).texts:
        text = text[: left * CHARACTERS_PER_TOKEN]
        (encoded,) = encode_documents(tokenizer, [text])
        if len(encoded) > left:
            text = text[: max(1, len(text) * left // len(encoded))]
            (encoded,) = encode_documents(tokenizer, [text])
        chosen.append(encoded)
        size += len(text.encode())
        left -= len(encoded)
        if left <= 0:
            break
    return TextSample(pack(chosen, length, bos_id=first), size)


def sample_halves(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int
) -> tuple[TextSample, TextSample]:
    """Two samples of about `tokens` tokens each; no document is in both, nor a near-duplicate.

    Raises the errors of `sample_text`, and ValueError for text of fewer than two different documents.
    """
    ordered, size, count = _in_order(documents), 0, 0
    while count < len(ordered) and (size < 2 * CHARACTERS_PER_TOKEN * tokens or count < 2):
        size += len(ordered.texts[count])
        count += 1
    taken = ordered.select(range(count))
    first, second = (
        sample_text(taken.select(part), tokenizer, tokens=tokens, length=length) for part in hold_out(taken, 0.5)
    )
    return first, second


def _in_order(documents: Documents) -> Documents:
    return documents.select(np.random.default_rng(ORDER).permutation(len(documents)).tolist())
