"""The weights of D2PO inside `trl.DPOTrainer`, for whoever wants to keep that trainer.

TRL sums log-probabilities over an answer before anything else happens to them, so weighting them as they leave the model is
enough. It does so for everything that reads them: the logged log-probabilities, rewards and margins are weighted too.

B rows, T tokens
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from trialist.objectives.preference import GAMMA, check_parameters, token_weights

TRL = "1.16"
"""The release whose private parts are known here"""
SPOILT = {"sft": "its cross-entropy would be weighted too", "sigmoid_norm": "it would divide weighted sums by whole lengths",
          "ipo": "it would divide weighted sums by whole lengths"}  # fmt: skip
"""Loss types of TRL that weighted log-probabilities do not suit"""
_ADAPTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def adapt_dpo_trainer(trainer: Any, *, gamma: float = GAMMA, exponent_start: int = 0) -> Callable[[], None]:
    """Makes a `trl.DPOTrainer` (1.16) train by D2PO; returns what undoes that. gamma 1 leaves its losses as they are.

    gamma: weight of a token of an answer over that of the token before, in (0, 1]. exponent_start: exponent of the first,
        0 as in the paper or 1 as in its code.
    Raises ValueError for another release of TRL, whose log-probabilities may be elsewhere; for a trainer that is adapted
    already or precomputes the reference's log-probabilities (as sums, so they cannot be weighted, and TRL's cache would hand
    them on to other gammas); for loss types, divergences, `ld_alpha` and `use_weighting`, whose own use of log-probabilities it
    would spoil; and for prompt-learning adapters, which shift tokens.
    """
    check_parameters("d2po", gamma=gamma, exponent_start=exponent_start)
    if not (found := version("trl")).startswith(f"{TRL}."):
        raise ValueError(f"TRL {found} is installed, and {TRL} is what can be adapted: `pip install trialist[trl]`")
    if getattr(trainer, "precompute_ref_logps", False):
        raise ValueError(
            "precompute_ref_log_probs keeps sums over whole answers, which cannot be weighted afterwards; set it to False"
        )
    for loss_type in getattr(trainer, "loss_types", ()):
        if loss_type in SPOILT:
            raise ValueError(f"loss_type {loss_type!r} does not go with D2PO here: {SPOILT[loss_type]}")
    if (divergence := getattr(trainer, "f_divergence_type", "reverse_kl")) != "reverse_kl":
        raise ValueError(
            f"f_divergence_type {divergence!r} does not go with D2PO here: a function of a weighted ratio is not that of the "
            "ratio; take reverse_kl"
        )
    for name, why in (("use_weighting", "WPO's weights"), ("ld_alpha", "LD-DPO's weights")):
        if getattr(trainer, name, None):
            raise ValueError(f"{name} does not go with D2PO here: {why} would be taken of weighted log-probabilities")
    adapters = getattr(trainer.model, "peft_config", None) or {}
    if any(config.is_prompt_learning for config in adapters.values()):
        raise ValueError("prompt-learning adapters put tokens in front; take LoRA")
    models = {id(model): model for model in (trainer.model, trainer.ref_model) if model is not None}.values()
    if any(model in _ADAPTED for model in models):
        raise ValueError("a model of this trainer is adapted already, and would be weighted twice; undo that first")

    def weigh(module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> Any:
        if not named.get("fused_lm_head"):  # a call for something else, such as generation
            return output
        mask = output.label_mask  # (B, T - 1)
        weights = token_weights(mask, mask.sum(-1), torch.float32, "d2po", gamma=gamma, exponent_start=exponent_start)
        output.log_probs = output.log_probs * weights.to(output.log_probs.dtype)
        return output

    handles = [model.register_forward_hook(weigh, with_kwargs=True) for model in models]
    _ADAPTED.update(models)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        _ADAPTED.difference_update(models)

    return undo
