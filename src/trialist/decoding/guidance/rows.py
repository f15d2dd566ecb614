"""Prompts of different lengths as rows of one batch, with the tokens that are generated behind them.

B rows of the surrounding loop, n branches, R = n B rows, branch after branch, L longest prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rows:
    """n branches of B prompts, padded on the left; every branch goes on with the same tokens."""

    def __init__(self, branches: Sequence[Sequence[Sequence[int]]], device: torch.device) -> None:
        prompts = [prompt for branch in branches for prompt in branch]
        longest = max(map(len, prompts))
        self.branches = len(branches)
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)  # (R, L)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            self.mask[row, longest - len(prompt) :] = 1
        self.padded = not bool(self.mask.all())

    def inputs(self, generated: Tensor, count: int, *, cached: bool) -> dict[str, Tensor | None]:
        """`input_ids`, `attention_mask` and `position_ids` of the forward pass.

        generated: `(B, count)`, or with a cache that holds what was before, the `(B, t)` newest. count: tokens generated so far.
        """
        ids = generated.to(self.ids.device).repeat(self.branches, 1)
        if not cached:
            ids = torch.cat([self.ids, ids], -1)
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), count)], -1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return {"input_ids": ids, "attention_mask": mask if self.padded else None, "position_ids": positions}

    def stacked(self, indices: Tensor) -> Tensor:
        """Where the rows `indices` of the loop stand, in every branch."""
        start = torch.arange(self.branches, device=indices.device)[:, None] * (len(self.ids) // self.branches)
        return (start + indices).flatten()

    def select(self, indices: Tensor) -> None:
        """Go on with these rows of the loop, which may repeat."""
        index = self.stacked(indices.to(self.ids.device))
        self.ids, self.mask = self.ids[index], self.mask[index]


def prompt_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row that are no padding."""
    if attention_mask is None:
        return input_ids.tolist()
    return [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]


def token_rows(context: Sequence[Any], where: str, vocabulary: int, tokenizer: Any) -> list[list[int]]:
    """The rows of a context as token ids. where: how errors call it.

    Raises ValueError for a text without a tokenizer, for what is neither text nor token ids, and for ids out of the vocabulary.
    """
    rows = []
    for number, given in enumerate(context, start=1):
        if isinstance(given, str):
            if tokenizer is None:
                raise ValueError(f"{where}, row {number} is a text: pass tokenizer= to generate, or give token ids")
            given = tokenizer(given)["input_ids"]
        try:
            row = [int(token) for token in given]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where}, row {number} must be a text or a list of token ids, not {str(given)[:40]!r}"
            ) from error
        if row and not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(
                f"{where}, row {number} has token {min(row) if min(row) < 0 else max(row)}, and the model's vocabulary has "
                f"{vocabulary}: were its ids made by another tokenizer?"
            )
        rows.append(row)
    return rows


def begun(rows: Sequence[Sequence[int]], model: Any, where: str) -> list[list[int]]:
    """The rows, where an empty one has the token that begins a text. Raises ValueError where the model has none."""
    start = model.config.get_text_config(decoder=True).bos_token_id
    start = start[0] if isinstance(start, list) else start
    for number, row in enumerate(rows, start=1):
        if not len(row) and start is None:
            raise ValueError(
                f"{where}, row {number} is empty, and {type(model).__name__} has no token that begins a text "
                "(bos_token_id); give it at least one token"
            )
    return [list(row) or [start] for row in rows]


def refuse_overflow(rows: Sequence[Sequence[int]], new_tokens: int, model: Any, where: str) -> None:
    """Raises ValueError where a prompt and the tokens that are to be generated are longer than the model takes."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(most, int):
        return
    for number, row in enumerate(rows, start=1):
        if len(row) + new_tokens > most:
            raise ValueError(
                f"{where}, row {number} has {len(row)} tokens, which with {new_tokens} new ones is more than the {most} that "
                f"{type(model).__name__} takes; shorten it, or lower max_new_tokens"
            )
