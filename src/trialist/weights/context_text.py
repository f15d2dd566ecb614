"""A model and a text on which its context is pruned or measured: the options, the rows, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trialist.data.corpora import Documents
    from trialist.data.samples import TextSample

DEFAULT_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class ModelAndText:
    """What the entries share that read a text with a model."""

    model: str
    """Hub id, local folder or asset of a causal language model"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""
    columns: str = ""
    """Column that holds the text, text=NAME"""
    max_examples: int | None = None
    """Most documents to read"""
    tokens: int = 16_384
    """Tokens of text that are read"""
    length: int | None = None
    """Tokens in a row, the longest context that is seen; without it 1024, or the model's context if shorter"""
    batch: int = 8
    """Rows in a forward pass"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("length", 2), ("batch", 1), ("max_examples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")

    def loaded(self) -> tuple[PreTrainedModel, Any]:
        """The model in the numbers that it was saved in, on the device, and its tokenizer."""
        import torch

        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import load_model

        tokenizer = load_tokenizer(self.model)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if self.device == "cpu" or accelerator is None else str(accelerator)
        return load_model(self.model, dtype="auto", device=device), tokenizer

    def row_length(self) -> int:
        """Tokens in a row. Raises ValueError for a length beyond the model's context."""
        from trialist.models.loading import model_context

        context = model_context(self.model)
        if self.length is not None and context is not None and self.length > context:
            raise ValueError(f"--length {self.length} is longer than {self.model} takes, {context} tokens")
        return self.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)

    def documents(self, data: str) -> Documents:
        from trialist.data.corpora import load_documents, parse_columns

        columns = parse_columns(self.columns) if self.columns else None
        return load_documents(data, split=self.split, columns=columns, max_examples=self.max_examples)


def rows_for(model: PreTrainedModel, sample: TextSample) -> dict[str, Tensor]:
    """The rows of a sample on the model's device: packed where the model keeps packed documents apart, else `padded_rows`."""
    import torch

    from trialist.models.documents import keeps_documents_apart

    packed = sample.rows
    if int(packed.tokens.max()) >= (vocabulary := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(
            f"the tokenizer gives token {int(packed.tokens.max())}, beyond the model's vocabulary of {vocabulary}; they do not "
            "belong together"
        )
    with torch.no_grad():
        if not keeps_documents_apart(model, int(packed.tokens[0, 0]), model.device):
            return padded_rows(model, sample)
    return {name: tensor.to(model.device) for name, tensor in packed.rows(slice(None)).items()}


def padded_rows(model: PreTrainedModel, sample: TextSample) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (P, longest) on the model's device: a row a piece, padding on the right."""
    import torch

    flat, pieces = sample.rows.input_ids.flatten(), sample.rows.pieces
    shape = len(pieces), int(pieces[:, 2].max())
    ids, mask = torch.full(shape, int(flat[0])), torch.zeros(shape, dtype=torch.long)
    for row, (_, offset, size) in enumerate(pieces):
        ids[row, :size], mask[row, :size] = flat[offset : offset + size], 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in rows.items()}


def bits_per_byte(model: PreTrainedModel, rows: Mapping[str, Tensor], size: int, *, batch: int) -> float:
    """Bits of surprise over all scored tokens of the rows, per byte of the `size` bytes that they stand for."""
    import torch

    from trialist.models.scoring import selected_logprobs

    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(rows["input_ids"]), batch):
            part = {name: tensor[start : start + batch] for name, tensor in rows.items()}
            nats -= float(selected_logprobs(model, **part).double().sum())
    return nats / math.log(2) / size


def nats_per_token(bits: float, rows: Mapping[str, Tensor], size: int) -> float:
    """The mean loss of a scored token that goes with `bits` per byte."""
    return bits * math.log(2) * size / int((rows["labels"][:, 1:] >= 0).sum())
