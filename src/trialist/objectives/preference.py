"""Direct preference optimisation as one family: a weight for each token of an answer, a normaliser, a margin.

    S(y) = sum over t of w_t (log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))  /  n        t = 0 at the answer's first token
    loss = -log sigmoid(beta (S(y_w) - S(y_l)) - margin)                                     y_w chosen, y_l rejected

    method    w_t                                        n         other
    dpo       1                                          1         arXiv 2305.18290
    d2po      gamma^t                                    1         arXiv 2502.14340; gamma 1 is dpo
    dpo-norm  1                                          |y|       length-normalised DPO, arXiv 2411.15124
    simpo     1                                          |y|       no reference, margin beta * margin_ratio; arXiv 2405.14734
    sampo     1 on min(|y_w|, |y_l|) tokens drawn        1         arXiv 2406.10957
    r-dpo     1                                          1         + alpha (|y_w| - |y_l|) in the sigmoid; arXiv 2403.19159
    ld-dpo    1 up to min(|y_w|, |y_l|), alpha behind    1         arXiv 2409.06411; alpha 1 is dpo

Departures. The paper of D2PO counts from t = 0, its code from 1 (`exponent_start`), which is beta * gamma in the place of beta.
SamPO's code draws tokens for policy and reference apart; here both are looked at on the same tokens. That the reference
cancels for weighted sums is an approximation: exactly it does so only for whole sequences.

B pairs, T tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from trialist.objectives.preference_options import Method, PreferenceOptions
from trialist.objectives.preference_rows import CHOSEN, REJECTED, answer_logprobs

METHODS: tuple[str, ...] = get_args(Method)
NORMALIZED = {"dpo-norm": "length", "simpo": "length"}
BETA, BETA_OF_MEANS, BETAS_OF_MEANS = 0.1, 5.0, {"simpo": 2.0}
"""Default beta of sums, and of sums that are divided by lengths or weights, which are smaller by as much"""
MARGIN_RATIOS = {"simpo": 0.5}
GAMMA = 0.98
EQUAL = 1e-5
"""Differences of rewards up to this are rounding: before training, when policy and reference are one"""
NEED_ALPHA = ("r-dpo", "ld-dpo")


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    method: str = "d2po",
    beta: float | None = None,
    gamma: float | None = None,
    exponent_start: int = 0,
    alpha: float | None = None,
    normalize: str | None = None,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, a sum over pairs in nats, and sums over pairs: `weight` (their number), `accuracy` (1 where the chosen answer has
    the higher reward, a half where both are equal up to rounding), `chosen_reward`, `rejected_reward` (beta S) and
    `reward_margin`.

    chosen_logps, rejected_logps: log-probability of each token in nats, `(B, T)`; masks: bool, the tokens of the answer, its
        end included. The two may differ in T. Reference: as the policy's; without it S holds the policy's alone.
    beta: without it 0.1, and 5 (simpo 2) where sums are divided by something.
    gamma, exponent_start: of d2po, in (0, 1] (without it 0.98), and 0 or 1. alpha: of r-dpo (nats per token) and ld-dpo (in
        [0, 1]).
    normalize: "none", "length" (n = |y|), "weights" (n = sum of w_t; for decayed sums, which a length would shrink
        twice), or None for the method's own. margin: subtracted from beta (S_w - S_l), nats.
    label_smoothing: probability that a label is wrong, in [0, 0.5). generator: of sampo's draw; None is torch's own.
    Raises ValueError for parameters out of range or of another method, shapes that differ, one reference without the other,
    and with the example's index for an answer without tokens and for log-probabilities that are not finite.
    """
    check_parameters(method, beta, gamma, exponent_start, alpha, normalize, label_smoothing)
    _check_tensors(chosen_logps, chosen_mask, ref_chosen_logps, "chosen", finite=True)
    _check_tensors(rejected_logps, rejected_mask, ref_rejected_logps, "rejected", finite=True)
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("give reference log-probabilities of chosen and rejected, or of neither")
    if ref_chosen_logps is not None and method == "simpo":
        raise ValueError("simpo has no reference; leave the reference log-probabilities out, or take dpo-norm")
    return _loss(
        chosen_logps, rejected_logps, chosen_mask, rejected_mask, ref_chosen_logps, ref_rejected_logps,
        method=method, beta=default_beta(method, normalize) if beta is None else beta, gamma=GAMMA if gamma is None else gamma,
        exponent_start=exponent_start, alpha=alpha, normalize=normalize, margin=margin, label_smoothing=label_smoothing,
        generator=generator,
    )  # fmt: skip


def _loss(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_mask: Tensor, rejected_mask: Tensor,
    ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None, *, method: str, beta: float, gamma: float,
    exponent_start: int, alpha: float | None, normalize: str | None, margin: float, label_smoothing: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    chosen_length, rejected_length = chosen_mask.sum(-1), rejected_mask.sum(-1)  # (B,)
    shorter = torch.minimum(chosen_length, rejected_length)
    wide = torch.promote_types(chosen_logps.dtype, torch.float32)  # sums over a thousand tokens lose digits in bfloat16

    def score(logps: Tensor, mask: Tensor, ref_logps: Tensor | None) -> Tensor:
        log_ratio = logps.to(wide) if ref_logps is None else logps.to(wide) - ref_logps.to(wide)
        log_ratio = log_ratio.masked_fill(~mask, 0.0)  # whatever stands in the padding
        weights = token_weights(
            mask, shorter, wide, method, gamma=gamma, exponent_start=exponent_start, alpha=alpha,
            generator=generator,
        )  # fmt: skip
        total = (weights * log_ratio).sum(-1)  # (B,)
        by = normalizer(method, normalize)
        if by == "none":
            return total
        return total / (mask.sum(-1) if by == "length" else weights.sum(-1))

    chosen = beta * score(chosen_logps, chosen_mask, ref_chosen_logps)
    rejected = beta * score(rejected_logps, rejected_mask, ref_rejected_logps)
    difference = chosen - rejected
    logit = difference - margin
    if method == "r-dpo":
        assert alpha is not None
        logit = logit + alpha * (chosen_length - rejected_length).to(logit.dtype)
    loss = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    with torch.no_grad():
        stats = {
            "weight": torch.tensor(len(loss), device=loss.device),
            "accuracy": (difference.sign() * (difference.abs() > EQUAL) / 2 + 0.5).sum(),
            "chosen_reward": chosen.sum(),
            "rejected_reward": rejected.sum(),
            "reward_margin": difference.sum(),
        }
    return loss.sum(), stats


def normalizer(method: str, normalize: str | None) -> str:
    """What a method divides its sums by: "none", "length" or "weights"."""
    return normalize or NORMALIZED.get(method, "none")


def default_beta(method: str, normalize: str | None) -> float:
    return BETA if normalizer(method, normalize) == "none" else BETAS_OF_MEANS.get(method, BETA_OF_MEANS)


def token_weights(
    mask: Tensor,
    shorter: Tensor,
    dtype: torch.dtype,
    method: str,
    *,
    gamma: float = 1.0,
    exponent_start: int = 0,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """w, `(B, T)`: the weight of each token of an answer, 0 where `mask` is false.

    shorter: `(B,)`, tokens of the shorter answer of each pair.
    """
    t = mask.cumsum(-1) - 1  # (B, T), counted within the answer: padding and prompts do not count
    if method == "d2po":
        return torch.exp((t + exponent_start).to(dtype) * math.log(gamma)) * mask
    if method == "ld-dpo":
        assert alpha is not None
        return mask.to(dtype).where(t < shorter[:, None], alpha * mask.to(dtype))
    if method == "sampo":
        place = torch.rand(mask.shape, generator=generator, device=generator.device if generator else mask.device)
        drawn = place.to(mask.device).masked_fill(~mask, 2.0).argsort(-1).argsort(-1)  # rank of each token
        return ((drawn < shorter[:, None]) & mask).to(dtype)
    return mask.to(dtype)


@dataclass(frozen=True)
class Preference(PreferenceOptions):
    """Preference loss of a model on pairs; `stats["weight"]` is their number. The formulas are at the head of this file.

    batch: a pair in each row, as `preference_row` makes them: `input_ids` (B, L), `segments` (B, L; 1 prompt, 2 chosen, 3
    rejected, 0 padding on either side), and `ref_logprobs` (B, L), log-probabilities of the answers' tokens at their places
    under the reference (`trialist.training.reference_logprobs`), unless the method does without a reference.
    Raises ValueError when columns are missing, and what `preference_loss` raises; but the model's log-probabilities may be
    anything: a loss that is no number is a divergence, which the training loop reports with its step.
    """

    method: str = "dpo"
    share_prompt: bool = False
    """Compute the prompt once for both answers, by a mask; models that cannot (`shares_prompts`) are refused"""

    def __post_init__(self) -> None:
        if self.half_life is not None:
            if not self.half_life > 0:
                raise ValueError(f"half_life is a number of tokens > 0, not {self.half_life}")
            if self.gamma is not None:
                raise ValueError("gamma and half_life both say how fast weights fall; give one of them")
        if self.margin_ratio is not None and not math.isfinite(self.margin_ratio):
            raise ValueError(f"margin_ratio must be finite, not {self.margin_ratio}")
        check_parameters(
            self.method,
            self.beta,
            self.gamma if self.half_life is None else self.decay,
            self.exponent_start,
            self.alpha,
            self.normalize,
            self.label_smoothing,
        )

    @property
    def temperature(self) -> float:
        """beta, or its default for the method and what divides its sums."""
        return default_beta(self.method, self.normalize) if self.beta is None else self.beta

    @property
    def decay(self) -> float:
        """gamma, also where a half-life or nothing was given."""
        if self.half_life is not None:
            return 0.5 ** (1 / self.half_life)
        return GAMMA if self.gamma is None else self.gamma

    @property
    def needs_reference(self) -> bool:
        return not (self.reference_free or self.method == "simpo")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        wanted = ("input_ids", "segments", *(("ref_logprobs",) if self.needs_reference else ()))
        missing = [name for name in wanted if name not in batch]
        if missing:
            raise ValueError(
                f"method {self.method} needs the column {missing[0]!r} in the batch; preference_row makes rows, "
                "reference_logprobs the reference's column"
            )
        logps = answer_logprobs(model, batch["input_ids"], batch["segments"], share_prompt=self.share_prompt)  # (B, L)
        reference = batch["ref_logprobs"] if self.needs_reference else None
        chosen, rejected = batch["segments"] == CHOSEN, batch["segments"] == REJECTED
        _check_tensors(logps, chosen, reference, "chosen")
        _check_tensors(logps, rejected, reference, "rejected")
        ratio = MARGIN_RATIOS.get(self.method, 0.0) if self.margin_ratio is None else self.margin_ratio
        return _loss(
            logps, logps, chosen, rejected, reference, reference,
            method=self.method, beta=self.temperature, gamma=self.decay, exponent_start=self.exponent_start,
            alpha=self.alpha, normalize=self.normalize, margin=ratio * self.temperature,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of pairs, without a forward pass."""
        return torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)


@dataclass(frozen=True)
class D2PO(Preference):
    """DPO with weights that fall from token to token: `Preference(method="d2po")`. gamma = 1 is DPO."""

    method: str = "d2po"


def check_parameters(
    method: str,
    beta: float | None = None,
    gamma: float | None = None,
    exponent_start: int = 0,
    alpha: float | None = None,
    normalize: str | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Raises ValueError for what no preference loss can use, and for options of another method. None: left to its default."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(f"beta must be > 0, not {beta}")
    if method != "d2po" and (gamma is not None or exponent_start):
        raise ValueError(f"gamma, half_life and exponent_start belong to d2po; method {method} has none")
    if gamma is not None and not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], not {gamma}; 1 is DPO")
    if exponent_start not in (0, 1):
        raise ValueError(f"exponent_start is 0 (the first token counts in full) or 1, not {exponent_start}")
    if method in NEED_ALPHA and alpha is None:
        raise ValueError(f"method {method} needs alpha; {'0' if method == 'r-dpo' else '1'} is DPO")
    if alpha is not None and method not in NEED_ALPHA:
        raise ValueError(f"alpha belongs to {' and '.join(NEED_ALPHA)}; method {method} has none")
    if method == "ld-dpo" and alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha of ld-dpo must be in [0, 1], not {alpha}; 1 is DPO")
    if method == "r-dpo" and alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha of r-dpo must be finite, not {alpha}; 0 is DPO")
    if normalize not in (None, "none", "length", "weights"):
        raise ValueError(f'normalize must be "none", "length" or "weights", not {normalize!r}')
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")


def _check_tensors(logps: Tensor, mask: Tensor, reference: Tensor | None, name: str, *, finite: bool = False) -> None:
    """finite: of the model's log-probabilities too."""
    for what, tensor in (("mask", mask), ("reference", reference)):
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(
                f"{name}: the {what} has shape {tuple(tensor.shape)}, the log-probabilities {tuple(logps.shape)}; give equal "
                "shapes"
            )
    whose = {"the model": logps if finite else None, "the reference": reference}
    broken = {who: (~values.isfinite() & mask).any(-1) for who, values in whose.items() if values is not None}
    empty = ~mask.any(-1)
    bad = torch.stack([empty, *broken.values()]).any(0).nonzero()  # one wait for the device
    if len(bad):
        example = int(bad[0])
        if empty[example]:
            raise ValueError(f"example {example}: its {name} answer has no token that counts; drop the pair")
        who = next(who for who, rows in broken.items() if rows[example])
        raise ValueError(f"example {example}: log-probabilities of its {name} answer under {who} are not finite")
