"""Next-token cross-entropy, summed in nats over the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trialist.models.scoring import selected_logprobs

# B batch, T time

IGNORED = -100


@dataclass(frozen=True)
class CrossEntropy:
    """Sum of -log p(token t+1 | tokens up to t) in nats; `stats["weight"]` is the number of tokens scored.

    batch: `input_ids` (B, T) and optionally `attention_mask` (B, T), `position_ids` (B, T), `labels` (B, T).
    Labels stand at the place of their token, as in transformers, and -100 marks what does not count. Without labels
    every token counts that has a real token of the same document before it: no padding, and no token at position 0.
    The loss divided by the weight equals the loss that transformers models return for the same labels.
    Raises ValueError when labels and input_ids differ in shape.
    """

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        input_ids = batch["input_ids"]
        attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
        labels = labels_of(batch)
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; give one label per "
                f"token, {IGNORED} where it does not count"
            )
        log_probs = selected_logprobs(
            model, input_ids, attention_mask, position_ids=position_ids, labels=labels
        )  # (B, T) -> (B, T-1)
        return -log_probs.sum(), {"weight": (labels[:, 1:] != IGNORED).sum()}

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of tokens that `batch` scores, without a forward pass."""
        return (labels_of(batch)[:, 1:] != IGNORED).sum()


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels (B, T) of a batch, or those of plain language modelling."""
    labels = batch.get("labels")
    if labels is not None:
        return labels
    return next_token_labels(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Labels (B, T) of plain language modelling: the token itself, -100 at padding and where a sequence begins."""
    labels = input_ids.clone()
    if attention_mask is not None:
        real = attention_mask.bool()
        labels[~real] = IGNORED
        labels[:, 1:][~real[:, :-1]] = IGNORED  # after padding on the left nothing predicts the first token
    if position_ids is not None:
        labels = torch.where(position_ids == 0, IGNORED, labels)  # starts of packed documents
    return labels
