"""How models that walk through a graph are read: accuracy, steps and FLOPs, in one pass or decoded token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.contract import Cost

if TYPE_CHECKING:
    from torch import Tensor

# B rows, T tokens of a row; rows of a walk have an answer after every hop

LEARNT = 0.95
"""Share of right answers after one hop from which on a model has learnt the graph: below it nothing is said of depth"""


def right(model: Any, items: Mapping[str, Tensor], symbols: Tensor, *, batch: int = 256, **options: Any) -> Tensor:
    """Whether each answer of each row is the most probable token, bool (B, answers), in one pass over whole rows."""
    return predictions(model, items, symbols, batch=batch, **options)[0] == items["labels"][:, answered(items) + 1]


def predictions(
    model: Any, items: Mapping[str, Tensor], symbols: Tensor, *, batch: int = 256, **options: Any
) -> tuple[Tensor, Tensor]:
    """The most probable token of the task after each place that asks for one, (B, answers), and the steps run there.

    options: of recurrent depth, such as `num_steps`.
    """
    import torch

    places = answered(items)
    named = symbols[items["input_ids"]]
    device = next(model.parameters()).device
    found, taken = [], []
    with torch.no_grad():
        for part in named.to(device).split(batch):
            output = model(input_ids=part, use_cache=False, **options)
            best = output.logits[:, places].argmax(-1).cpu()  # (b, answers), the model's token ids
            same = best[..., None] == symbols
            found.append(same.int().argmax(-1).where(same.any(-1), -1))
            steps = getattr(output, "num_steps", None)
            taken.append(torch.ones_like(best) if steps is None else steps[:, places].cpu())
    return torch.cat(found), torch.cat(taken)


@dataclass(frozen=True)
class Decoding:
    """What decoding whole rows token by token gave."""

    found: Tensor
    """The most probable token of the task after each place that asks for one, (B, answers)"""
    taken: Tensor
    """Steps run there, (B, answers)"""
    cost: Cost
    """Tokens, and the seconds and FLOPs that they took"""


def decoded(model: Any, items: Mapping[str, Tensor], symbols: Tensor, **options: Any) -> Decoding:
    """As `predictions`, token by token with a cache, as a text is generated."""
    import torch
    from transformers import DynamicCache

    cache, found, places = DynamicCache(), [], answered(items)
    tokens = symbols[items["input_ids"]].to(next(model.parameters()).device)
    start = time.perf_counter()
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            best = model(input_ids=token, past_key_values=cache, **options).logits[:, -1].argmax(-1).cpu()  # (B,)
            same = best[:, None] == symbols
            found.append(same.int().argmax(-1).where(same.any(-1), -1))
    seconds = time.perf_counter() - start
    steps = cache.num_steps.cpu()  # type: ignore[attr-defined]  # (B, T)
    flops = decoding_flops(model, steps, options.get("exit_criterion"))
    cost = Cost(tokens=tokens.numel(), seconds=seconds, flops=flops)
    return Decoding(torch.stack(found, 1)[:, places], steps[:, places], cost)


def decoding_flops(model: Any, steps: Tensor, criterion: str | None) -> float:
    """FLOPs of decoding tokens that ran so many steps, (B, T), at the mean number of tokens before them.

    criterion: that of an exit; one that reads distributions passes the coda and the head after every step.
    """
    from torch import nn

    from trialist.models.flops import flops_per_token
    from trialist.models.recurrent_depth.settings import LATENT
    from trialist.models.recurrent_depth.steps import depth_of

    depth, length = depth_of(model), math.ceil(steps.shape[1] / 2)
    core = flops_per_token(depth.core, length)
    step = core / depth.core.runs_per_pass
    look = flops_per_token(nn.ModuleList([*depth.coda, model.get_output_embeddings()]), length)
    looks = criterion not in (None, *LATENT)
    outside = flops_per_token(model, length) - core
    return steps.numel() * outside + float(steps.sum()) * (step + look if looks else step)


def flops_per_answer(model: Any, items: Mapping[str, Tensor]) -> float:
    """FLOPs of one pass over whole rows, per answer, at the number of steps that the model is set to."""
    from trialist.models.flops import flops_per_token

    length = items["input_ids"].shape[1]
    return flops_per_token(model, length) * length / len(answered(items))


def answered(items: Mapping[str, Tensor]) -> Tensor:
    """Places whose next label is an answer; the same in every row."""
    return (items["labels"][0, 1:] >= 0).nonzero()[:, 0]


def share_right(correct: Tensor) -> float:
    """Accuracy, from whether each answer is right."""
    return float(correct.double().mean())  # float32 would put 19 of 20 below 0.95


def curve_by_hops(values: Tensor) -> tuple[tuple[float, float], ...]:
    """Mean over rows at each number of hops. values: (B, hops)."""
    means = values.float().mean(0).tolist()
    return tuple((float(hop), mean) for hop, mean in enumerate(means, start=1))


def unlearnt(correct: Tensor) -> str | None:
    """Why a model that has not learnt single hops says nothing of depth; None where it has. correct: (B, hops)."""
    one_hop = share_right(correct[:, 0])
    if one_hop >= LEARNT:
        return None
    return f"the model has not learnt the graph: {one_hop:.3f} of single hops are right, {LEARNT:g} are needed; train longer"


def by_hops(correct: Tensor, bands: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Accuracy over bands of hops, both ends included. correct: (B, hops)."""
    return {f"hops_{low}_{high}": share_right(correct[:, low - 1 : high]) for low, high in bands}
