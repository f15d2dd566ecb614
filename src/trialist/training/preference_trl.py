"""The weights of D2PO inside `trl.DPOTrainer`, for whoever wants to keep that trainer.

TRL sums log-probabilities over an answer before anything else happens to them, so weighting them as they leave the model is
enough. It does so for everything that reads them: the logged log-probabilities, rewards and margins are weighted too.

B rows, T tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SPOILT = {"sft": "its cross-entropy would be weighted too", "sigmoid_norm": "it would divide weighted sums by whole lengths",
          "ipo": "it would divide weighted sums by whole lengths"}  # fmt: skip
"""Loss types of TRL that weighted log-probabilities do not suit"""


def adapt_dpo_trainer(trainer: Any, *, gamma: float = 0.98, exponent_start: int = 0) -> Callable[[], None]:
    """Makes a `trl.DPOTrainer` (1.16) train by D2PO; returns what undoes that. gamma 1 leaves its losses as they are.

    gamma: weight of a token of an answer over that of the token before, in (0, 1]. exponent_start: exponent of the first,
        0 as in the paper or 1 as in its code.
    Raises ValueError for a trainer that precomputes the reference's log-probabilities (as sums, so they cannot be
    weighted, and TRL's cache would hand them on to other gammas), for loss types, `ld_alpha` and `use_weighting`, whose
    own use of log-probabilities it would spoil, for prompt-learning adapters, which shift tokens, and for padding-free
    batches.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], not {gamma}; 1 is DPO")
    if exponent_start not in (0, 1):
        raise ValueError(f"exponent_start is 0 (the first token counts in full) or 1, not {exponent_start}")
    if getattr(trainer, "precompute_ref_logps", False):
        raise ValueError(
            "precompute_ref_log_probs keeps sums over whole answers, which cannot be weighted afterwards; set it to False"
        )
    for loss_type in getattr(trainer, "loss_types", ()):
        if loss_type in SPOILT:
            raise ValueError(f"loss_type {loss_type!r} does not go with D2PO here: {SPOILT[loss_type]}")
    for name, why in (("use_weighting", "WPO's weights"), ("ld_alpha", "LD-DPO's weights")):
        if getattr(trainer, name, None):
            raise ValueError(f"{name} does not go with D2PO here: {why} would be taken of weighted log-probabilities")
    adapters = getattr(trainer.model, "peft_config", None) or {}
    if any(config.is_prompt_learning for config in adapters.values()):
        raise ValueError("prompt-learning adapters put tokens in front; take LoRA")

    def weigh(module: nn.Module, inputs: Any, output: Any) -> Any:
        mask = getattr(output, "label_mask", None)
        if mask is None:  # a call for something else, such as generation
            return output
        output.log_probs = output.log_probs * decay(mask, gamma, exponent_start).to(output.log_probs.dtype)
        return output

    models = {id(model): model for model in (trainer.model, trainer.ref_model) if model is not None}
    handles = [model.register_forward_hook(weigh) for model in models.values()]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def decay(mask: Tensor, gamma: float, exponent_start: int) -> Tensor:
    """gamma^t for the t-th token that `mask` `(B, T)` marks, counted from `exponent_start`."""
    return torch.exp((mask.long().cumsum(-1) - 1 + exponent_start).double() * math.log(gamma))
