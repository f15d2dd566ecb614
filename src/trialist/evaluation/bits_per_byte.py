"""Bits per byte of text under a causal language model: comparable over tokenizers, exact over every byte."""

# B rows, T time

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trialist.data.corpora import Documents
from trialist.data.packing import PackedRows, pack
from trialist.data.tokenizers import document_start, encode_documents
from trialist.evaluation.results import Progress, context_length, silent
from trialist.models.documents import keeps_documents_apart
from trialist.models.scoring import selected_logprobs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BitsPerByte:
    value: float
    """Total bits over total bytes"""
    per_document: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Document id -> (bits, UTF-8 bytes)"""
    tokens: int = 0
    """Tokens scored"""


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    *,
    length: int,
    batch_size: int = 16,
    max_bytes: int | None = None,
    progress: Progress = silent,
) -> BitsPerByte:
    """-log2 p of every token of every document, over the UTF-8 bytes of the text.

    A document begins behind the tokenizer's BOS (else EOS) and is read in windows of `length` tokens that do not overlap but
    for the one token of context at their start; each token is scored exactly once. Windows are packed into rows where the
    model keeps packed documents apart, which is tried out on a few tokens first; otherwise each has a row of its own.

    max_bytes: take documents in order until they hold so many bytes; the last one is cut.
    The model is evaluated in eval mode without gradients and left in the mode it was in.
    Raises ValueError when `length` exceeds the model's context, when the tokenizer has no token to start a document with,
    or when the model's vocabulary is smaller than a token id.
    """
    documents = documents if max_bytes is None else _first_bytes(documents, max_bytes)
    if len(documents) == 0:
        raise ValueError("bits per byte of no documents is undefined; pass at least one")
    if len(set(documents.ids)) != len(documents):
        raise ValueError(f"{documents.source}: document ids must be unique")
    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(
            f"length {length} is longer than the model's context of {context} tokens; pass at most {context}"
        )
    bos_id = document_start(tokenizer)
    if bos_id is None:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS, so a document's first token cannot be predicted; set one"
        )
    rows = pack(encode_documents(tokenizer, documents.texts), length, bos_id=bos_id)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(rows.tokens.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {int(rows.tokens.max())}, beyond the model's vocabulary of {vocabulary}; "
            "they do not belong together"
        )
    bits = bits_of_pieces(model, rows, batch_size=batch_size, progress=progress)
    owners = rows.pieces[:, 0]
    per_document = np.bincount(owners, weights=bits, minlength=len(documents))
    sizes = [len(text.encode()) for text in documents.texts]
    return BitsPerByte(
        float(per_document.sum()) / sum(sizes),
        {name: (float(b), size) for name, b, size in zip(documents.ids, per_document, sizes)},
        rows.scored,
    )


def bits_of_pieces(
    model: nn.Module, rows: PackedRows, *, batch_size: int = 16, progress: Progress = silent
) -> np.ndarray:
    """(P,) float64: -log2 p summed over the scored tokens of each piece of `rows`, in the order of `rows.pieces`.

    The model is evaluated in eval mode without gradients and left in the mode it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if keeps_documents_apart(model, int(rows.tokens[0, 0]), device):
                return _bits_of_rows(model, rows, batch_size, device, progress)
            logger.warning(
                "%s ignores restarting position ids; each window is scored in a row of its own", type(model).__name__
            )
            return _bits_of_windows(model, rows, batch_size, device, progress)
    finally:
        model.train(was_training)


def _bits_of_rows(
    model: nn.Module, rows: PackedRows, batch_size: int, device: torch.device, progress: Progress
) -> np.ndarray:
    """(P,) bits of each piece, from packed rows."""
    bits = np.zeros(rows.tokens.shape)  # (N, T) float64, the bits of the token in the slot
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor.to(device) for name, tensor in rows.rows(slice(start, start + batch_size)).items()}
        bits[start : start + batch_size, 1:] = _bits(selected_logprobs(model, **batch))
        progress(min(start + batch_size, len(rows)), len(rows))
    return np.add.reduceat(bits.reshape(-1), rows.pieces[:, 1])  # padding between pieces has 0 bits


def _bits_of_windows(
    model: nn.Module, rows: PackedRows, batch_size: int, device: torch.device, progress: Progress
) -> np.ndarray:
    """(P,) bits of each piece, from rows that hold one piece each, longest first so that little is padded."""
    flat = rows.tokens.reshape(-1)
    bits = np.zeros(len(rows.pieces))
    order = np.argsort(-rows.pieces[:, 2], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = int(rows.pieces[chosen[0], 2])
        tokens = np.full((len(chosen), width), flat[0], np.int64)
        labels = np.full((len(chosen), width), -100, np.int64)
        for row, (_, offset, size) in enumerate(rows.pieces[chosen]):
            tokens[row, :size] = flat[offset : offset + size]
            labels[row, 1:size] = tokens[row, 1:size]
        # padding stands on the right, where a causal model cannot see it, so no mask is needed
        scores = selected_logprobs(
            model, torch.from_numpy(tokens).to(device), labels=torch.from_numpy(labels).to(device)
        )
        bits[chosen] = _bits(scores).sum(axis=1)
        progress(start + len(chosen), len(order))
    return bits


def _bits(log_probs: Tensor) -> np.ndarray:
    return -log_probs.double().cpu().numpy() / math.log(2)  # nats to bits


def _first_bytes(documents: Documents, max_bytes: int) -> Documents:
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
    kept: list[tuple[str, str]] = []
    left = max_bytes
    for name, text in zip(documents.ids, documents.texts):
        content = text.encode()
        kept.append((name, content[:left].decode("utf-8", errors="ignore")))  # without a character cut in half
        left -= len(content)
        if left <= 0:
            break
    kept = [(name, text) for name, text in kept if text]
    return Documents(tuple(name for name, _ in kept), tuple(text for _, text in kept), documents.source)
