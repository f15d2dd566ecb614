"""From a list of rows to a batch: stacked, padded, or packed with document masks."""

# B rows, T time

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED, pack_whole

PADDING = {"labels": IGNORED}
"""What fills a column behind the end of a row; `input_ids` take the padding token, everything else 0"""


def stack_or_pad(rows: Sequence[Mapping[str, Any]], *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Rows of equal length stacked, others padded on the right to the longest, with an `attention_mask`.

    Rows with `position_ids` get no mask: with one, transformers would no longer keep packed documents apart, and padding
    at position 0 is a document of its own.
    rows: mappings of columns to numbers, sequences or tensors. Sequences of a row that are as long as its `input_ids`
        are padded with them; labels with -100, everything else with 0. Strings and other objects are left out.
    Raises ValueError when the rows have other columns than the first, or when other columns differ in length.
    """
    columns = [name for name, value in rows[0].items() if _is_numeric(value)]
    for number, row in enumerate(rows):
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            raise ValueError(f"row {number} of the batch lacks {missing[0]!r}, which row 0 has")
    table = {name: [torch.as_tensor(row[name]) for row in rows] for name in columns}
    lengths = [len(ids) for ids in table.get("input_ids", []) if ids.dim() == 1]
    ragged = len(set(lengths)) > 1
    batch: dict[str, Tensor] = {}
    for name, values in table.items():
        if ragged and all(value.dim() >= 1 and len(value) == n for value, n in zip(values, lengths, strict=True)):
            fill = pad_token_id if name == "input_ids" else PADDING.get(name, 0)
            values = [_extended(value, max(lengths), fill) for value in values]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(
                f"column {name!r}: rows of shapes {sorted(shapes)} cannot be stacked; give a data_collator"
            )
        batch[name] = torch.stack(values)
    if ragged and not {"attention_mask", "position_ids"} & set(batch):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()  # (B, T)
    return batch


def pack_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The rows whole, as many behind each other as fit into the length of the longest: `input_ids`, `position_ids` and
    `labels`, each (B, T), without `attention_mask`.

    rows: `input_ids` and `labels` of equal length. For models that keep packed documents apart
    (`trialist.models.documents.keeps_documents_apart`).
    """
    tokens = [np.asarray(row["input_ids"]) for row in rows]
    labels = [np.asarray(row["labels"]) for row in rows]
    packed = pack_whole(tokens, max(map(len, tokens)), counted=[label != IGNORED for label in labels])
    return packed.rows(slice(None))


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor | bool | int | float):
        return True
    return isinstance(value, Sequence | np.ndarray) and np.asarray(value).dtype.kind in "biuf"


def _extended(value: Tensor, length: int, fill: int) -> Tensor:
    tail = value.new_full((length - len(value), *value.shape[1:]), fill)
    return torch.cat([value, tail])
