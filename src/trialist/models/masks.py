"""Reading and narrowing the attention masks of transformers, bool or additive, `(B | 1, H | 1, T, S)`.

B batch, H heads, T queries, S columns
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_tokens(attention_mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    """Bool `(B, S)`: the first column that some query sees, which is the first real token of a row or of a document.

    attention_mask: bool or additive `(B | 1, H | 1, T, S)`; None is causal without padding, its first token column 0.
    """
    if attention_mask is None:
        first = torch.zeros(batch, columns, dtype=torch.bool, device=device)
        first[:, 0] = True
        return first
    seen = visible_columns(attention_mask)[:, 0]  # (B, T, S)
    sees, column = seen.max(-1)  # the first maximum: the first visible column
    marks = torch.zeros(seen.shape[0], columns, dtype=torch.int32, device=device)
    return marks.scatter_reduce_(1, column, sees.int(), "amax").bool().expand(batch, columns)


def visible_columns(attention_mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, lets a query look."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def silence_padding(attention_mask: Tensor, own: Tensor) -> Tensor:
    """The mask without the rows of padding queries, which do not see themselves; they must select nothing.

    own: columns `(T,)` of the queries.
    """
    index = own.view(1, 1, -1, 1).expand(*attention_mask.shape[:3], 1)
    if attention_mask.dtype == torch.bool:
        return attention_mask & attention_mask.gather(-1, index)
    return attention_mask.masked_fill(
        ~visible_columns(attention_mask.gather(-1, index)), torch.finfo(attention_mask.dtype).min
    )


def narrow(attention_mask: Tensor | None, seen: Tensor) -> Tensor:
    """The mask with what a query does not see taken out; seen `(B, 1 | H, T, S)`."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return seen if attention_mask is None else seen & attention_mask
    return attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
