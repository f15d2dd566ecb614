"""A preference pair in one row, and the log-probabilities of its two answers, from two sequences or from one.

    row             prompt | chosen | rejected | padding
    two sequences   prompt | chosen   and   prompt | rejected
    one sequence    prompt without its last token | last, chosen | last, rejected

In the one sequence the branches do not see each other, and the positions of the second go on from the prompt as those of the
first do. The prompt's last token stands at the head of both, as it is what predicts their first tokens.

B pairs, L tokens of a row
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trialist.data.preferences import PreferencePair
from trialist.models.scoring import selected_logprobs

PROMPT, CHOSEN, REJECTED = 1, 2, 3
"""Values of `segments`; 0 is padding"""

Row = dict[str, np.ndarray]


def preference_row(pair: PreferencePair) -> Row:
    """`input_ids` and `segments`, int64 of equal length: prompt, chosen, rejected."""
    parts = (pair.prompt, pair.chosen, pair.rejected)
    return {
        "input_ids": np.concatenate([np.asarray(part, np.int64) for part in parts]),
        "segments": np.repeat((PROMPT, CHOSEN, REJECTED), [len(part) for part in parts]),
    }


def answer_logprobs(model: nn.Module, input_ids: Tensor, segments: Tensor, *, share_prompt: bool = False) -> Tensor:
    """log p of every answer token given its prompt and the answer before it, in nats, at the token's place in `(B, L)`;
    0 elsewhere.

    input_ids, segments: `(B, L)`, in each row prompt, chosen, rejected, padding on either side.
    share_prompt: from one sequence for each pair; the model must be one that `shares_prompts` finds able to.
    Raises ValueError that names the row where a prompt has no token.
    """
    if segments.shape != input_ids.shape:
        raise ValueError(
            f"segments have shape {tuple(segments.shape)}, input_ids {tuple(input_ids.shape)}; give equal shapes"
        )
    without = (segments != PROMPT).all(-1).nonzero()
    if len(without):
        raise ValueError(f"row {int(without[0])}: its prompt has no token, so nothing predicts the first of an answer")
    return (_from_one if share_prompt else _from_two)(model, input_ids, segments)


def _from_two(model: nn.Module, input_ids: Tensor, segments: Tensor) -> Tensor:
    keeps = [(segments == PROMPT) | (segments == answer) for answer in (CHOSEN, REJECTED)]
    longest = int(torch.stack(keeps).sum(-1).max())
    orders = [
        (~keep).long().argsort(dim=-1, stable=True)[:, :longest] for keep in keeps
    ]  # (B, T): what is kept comes first
    order, keep = torch.cat(orders), torch.cat(keeps)  # (2B, T), (2B, L)

    def taken(column: Tensor) -> Tensor:
        return column.repeat(len(order) // len(column), 1).gather(1, order)

    scored = taken(segments) > PROMPT
    scored &= (real := keep.gather(1, order))
    logps = selected_logprobs(model, taken(input_ids), real.long(), scored)  # (2B, T - 1)
    return _put_back(pad(logps, (1, 0)), order, segments.shape[1]).unflatten(0, (2, -1)).sum(0)


def _from_one(model: nn.Module, input_ids: Tensor, segments: Tensor) -> Tensor:
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    last = place.masked_fill(segments != PROMPT, -1).amax(-1, keepdim=True)  # (B, 1): the prompt's last token
    begin = place.masked_fill(segments != REJECTED, segments.shape[1]).amin(-1, keepdim=True)
    order = torch.cat([2 * place, 2 * begin - 1], 1).argsort(-1)  # (B, L + 1): its copy goes before the rejected answer
    branch = segments.scatter(1, last, CHOSEN)
    branch = torch.cat([branch, torch.full_like(last, REJECTED)], 1).gather(1, order)
    scored = pad(segments > PROMPT, (0, 1)).gather(1, order)
    ids = torch.cat([input_ids, input_ids.gather(1, last)], 1).gather(1, order)

    real = branch > 0
    position = real.cumsum(-1) - 1
    position = position - (branch == REJECTED) * (branch == CHOSEN).sum(-1, keepdim=True)
    mask = branch_mask(branch, _dtype_of_mask(model))
    logps = selected_logprobs(model, ids, mask, scored, position_ids=position.clamp(min=0))  # (B, L)
    return _put_back(pad(logps, (1, 0)), order, segments.shape[1] + 1)[:, :-1]


def branch_mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, `(B, 1, T, T)`: what came before, of the prompt and of the own branch. Padding sees itself alone.

    dtype: bool, or that of a mask to be added.
    """
    T = branch.shape[1]
    query, key = branch[:, :, None], branch[:, None, :]
    before = torch.ones(T, T, dtype=torch.bool, device=branch.device).tril()
    sees = before & (key > 0) & (query > 0) & ((key == PROMPT) | (key == query))
    sees |= torch.eye(T, dtype=torch.bool, device=branch.device)
    if dtype == torch.bool:
        return sees[:, None]
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def shares_prompts(model: nn.Module, token: int, device: torch.device) -> bool:
    """Whether the model scores pairs from one sequence as it does from two: tried out on two short pairs.

    Not so: recurrent layers, attention windows shorter than the prompts, kernels that take no mask of their own. Call it in
    eval mode without gradients. token: a token id, for a model whose configuration does not tell its vocabulary.
    """
    if _windowed(model):
        return False
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or token + 1
    ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    segments = torch.tensor([[1] * 5 + [2] * 4 + [3] * 3, [1] * 2 + [2] * 3 + [3] * 6 + [0]], device=device)
    two = answer_logprobs(model, ids, segments)
    try:
        one = answer_logprobs(model, ids, segments, share_prompt=True)
    except (TypeError, RuntimeError, ValueError):  # a model that takes no positions, or no such mask
        return False
    joined = selected_logprobs(model, ids, (segments > 0).long(), segments > PROMPT)
    leak = float((pad(joined, (1, 0)) - two).abs().max())
    return float((one - two).abs().max()) <= max(0.05 * leak, 1e-6)


def _windowed(model: nn.Module) -> bool:
    """Whether some layer sees a window only: a whole mask takes its place, and short probes cannot tell."""
    config: Any = getattr(model, "config", None)
    kinds: Iterable[str] = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(window) if not kinds else any("sliding" in kind or "chunked" in kind for kind in kinds)


def _dtype_of_mask(model: nn.Module) -> torch.dtype:
    """Kernels of torch choose by a bool mask; eager attention adds the mask up."""
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    return next(model.parameters()).dtype if eager else torch.bool


def _put_back(values: Tensor, order: Tensor, length: int) -> Tensor:
    return values.new_zeros(len(values), length).scatter(1, order, values)
