"""Whether a recurrent depth is alive: two numbers that tell the failed runs of arXiv 2502.05171 (section 4.3) from good ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trialist.models.recurrent_depth.settings import settings_of, whole
from trialist.models.recurrent_depth.steps import depth_of
from trialist.models.scoring import selected_logprobs

# B batch, T time, d hidden size


def token_correlation(states: Tensor, attention_mask: Tensor | None = None) -> float:
    """Mean correlation over channels between the states `(B, T, d)` of two different tokens of a row.

    Near 1, all tokens have the same state: the first of the paper's failed runs. attention_mask: `(B, T)`, padding is left out.
    Raises ValueError when no row has two real tokens.
    """
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if attention_mask is not None:
        real = attention_mask.bool()
    centred = states.double() - states.double().mean(-1, keepdim=True)
    unit = torch.nn.functional.normalize(centred, dim=-1) * real[..., None]  # (B, T, d)
    pairs = real.sum(1) * (real.sum(1) - 1)
    if int(pairs.sum()) == 0:
        raise ValueError("token_correlation compares tokens of a row, and no row has two real tokens")
    together = unit.sum(1).pow(2).sum(-1) - unit.pow(2).sum(
        (1, 2)
    )  # (B,), the sum over ordered pairs of different tokens
    return float(together.sum() / pairs.sum())


@torch.no_grad()
def recurrence_gain(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    num_steps: int | None = None,
) -> float:
    """Loss at one step minus loss at `num_steps` (None: those of evaluation), in nats per scored token.

    input_ids, attention_mask, labels: `(B, T)`; without labels every real token that has one before it is scored.
    Near 0, the model ignores its state: the second of the paper's failed runs. Modes of the model's modules are left as they
    were. Raises ValueError for a number of steps below 1.
    """
    depth = depth_of(model)
    steps = settings_of(depth.config).steps if num_steps is None else whole("num_steps", num_steps)
    if labels is None:
        labels = next_token_labels(input_ids, attention_mask)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        scored = (
            selected_logprobs(model, input_ids, attention_mask, labels=labels, arguments={"num_steps": taken})
            for taken in (1, steps)
        )
        once, often = (-float(values.sum() / (labels[:, 1:] != -100).sum()) for values in scored)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return once - often


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The tokens themselves, -100 at padding and after it."""
    labels = input_ids.clone()
    if attention_mask is not None:
        real = attention_mask.bool()
        labels[~real] = -100
        labels[:, 1:][~real[:, :-1]] = -100
    return labels
