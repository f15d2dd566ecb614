"""Eviction of tokens under a budget, step by step: what every query still sees, and what is alive in the end.

Query t stands in column `first` + t. It sees the columns that are alive and visible to it, and its own. Then

    score[j] += increments[t, j]                                 and the highest score goes, or
    score[j] += sum over heads of softmax(logits[t])[j]          over what it sees, and the lowest goes

as long as it sees more than `budget` columns. Protected columns and the `recent` newest that it sees stay; among equal
scores the oldest goes. What is evicted never returns. A query that does not see itself is padding: it sees nothing, adds
nothing and evicts nothing.

Letters: N rows that evict independently, H heads of a row, T queries, S columns.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

BACKENDS = ("auto", "reference", "c")


class _Problem(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("increments", "logits", "scores", "alive", "visible", "protect", "seen")
        ),
        *((name, ctypes.c_long) for name in ("visible_n", "visible_t")),
        *((name, ctypes.c_int) for name in ("N", "H", "T", "S", "first", "budget", "recent", "threads")),
    ]


def available() -> bool:
    """Whether the C kernel could be compiled here; the first call compiles it."""
    return load_library("eviction.c") is not None


def evict(
    scores: Tensor,
    alive: Tensor,
    *,
    queries: int,
    first: int,
    budget: int,
    increments: Tensor | None = None,
    logits: Tensor | None = None,
    visible: Tensor | None = None,
    protect: Tensor | None = None,
    recent: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What each query sees `(N, T, S)` bool, and scores and living columns `(N, S)` after the last of `queries` = T.

    scores, alive: `(N, S)`, float and bool, before the first query; columns from `first` on count as not there yet.
    increments: `(N, T, S)`, what each query adds; None without logits adds nothing, so the oldest goes.
    logits: `(N, H, T, S)`, attention logits with additive masks, instead of increments.
    visible: bool, broadcastable to `(N, T, S)`; None is causal. protect: bool, broadcastable to `(N, S)`.
    recent: newest columns that stay, at least 1, the query's own.

    Scores of columns that are no longer alive mean nothing. No gradient. Raises ValueError for a budget below `recent`,
    increments together with logits, and shapes that do not fit.
    """
    (N, S), T = scores.shape, queries
    if budget < recent or recent < 1:
        raise ValueError(f"budget is {budget} and recent {recent}; wanted 1 <= recent <= budget")
    if increments is not None and logits is not None:
        raise ValueError("increments and logits are two ways to score; give one of them")
    if not 0 <= first <= S - T or alive.shape != scores.shape:
        raise ValueError(
            f"{T} queries from column {first} on do not fit scores {tuple(scores.shape)} and alive {tuple(alive.shape)}"
        )
    for name, tensor, wanted in (("increments", increments, (N, T, S)), ("logits", logits, (N, None, T, S))):
        if tensor is not None and (
            tensor.dim() != len(wanted) or any(w not in (None, n) for n, w in zip(tensor.shape, wanted))
        ):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {wanted}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if visible is not None:
        visible = visible.expand(N, T, S)
    protect = scores.new_zeros(1, 1, dtype=torch.bool) if protect is None else protect
    given = (scores.detach(), alive, increments, logits, visible, protect.expand(N, S))
    return _evict(*(None if x is None else x.detach() for x in given), T, first, budget, recent, backend)


@torch.library.custom_op("trialist::evict", mutates_args=())
def _evict(
    scores: Tensor, alive: Tensor, increments: Tensor | None, logits: Tensor | None, visible: Tensor | None,
    protect: Tensor, queries: int, first: int, budget: int, recent: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    fits = scores.device.type == "cpu" and scores.dtype == torch.float32
    if backend == "c" and not (fits and available()):
        raise ValueError("backend 'c' needs a compiler, and float32 scores on the CPU; pass backend='auto'")
    run = _in_c if backend != "reference" and fits and available() else _reference
    return run(scores, alive, increments, logits, visible, protect, queries, first, budget, recent)


@_evict.register_fake
def _(scores, alive, increments, logits, visible, protect, queries, first, budget, recent, backend):  # type: ignore[no-untyped-def]
    N, S = scores.shape
    return alive.new_empty(N, queries, S), torch.empty_like(scores), torch.empty_like(alive)


def _reference(
    scores: Tensor, alive: Tensor, increments: Tensor | None, logits: Tensor | None, visible: Tensor | None,
    protect: Tensor, queries: int, first: int, budget: int, recent: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (N, S), device = scores.shape, scores.device
    scores = scores.clone()
    alive = alive & (torch.arange(S, device=device) < first)
    rows = torch.empty(N, queries, S, dtype=torch.bool, device=device)
    worst = -torch.inf if logits is None else torch.inf
    for t in range(queries):
        alive[:, first + t] = True if visible is None else visible[:, t, first + t]
        seen = (
            alive & alive[:, first + t, None] if visible is None else alive & visible[:, t] & alive[:, first + t, None]
        )
        rows[:, t] = seen
        if increments is not None:
            scores += increments[:, t].masked_fill(~seen, 0.0)
        elif logits is not None:
            weights = logits[:, :, t].to(scores.dtype).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            scores += weights.nan_to_num(0.0).sum(1)  # NaN: a query that sees nothing
        while True:
            over = seen.sum(-1, keepdim=True) > budget  # (N, 1)
            newest = seen.flip(-1).cumsum(-1).flip(-1) <= recent
            may_go = seen & ~newest & ~protect & over
            if not may_go.any():
                break
            ranked = scores.masked_fill(~may_go, worst)
            gone = (ranked.argmax(-1) if logits is None else ranked.argmin(-1))[:, None]  # the first of equals
            stays = torch.ones_like(seen).scatter_(1, gone, ~may_go.any(-1, keepdim=True))
            alive &= stays
            seen = seen & stays
    return rows, scores, alive


def _in_c(
    scores: Tensor, alive: Tensor, increments: Tensor | None, logits: Tensor | None, visible: Tensor | None,
    protect: Tensor, queries: int, first: int, budget: int, recent: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, S = scores.shape
    scores = scores.clone(memory_format=torch.contiguous_format)
    alive = alive.clone(memory_format=torch.contiguous_format)
    seen = torch.zeros(N, queries, S, dtype=torch.bool)
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    tensors = {
        "increments": None if increments is None else increments.float().contiguous(),
        "logits": None if logits is None else logits.float().contiguous(),
        "scores": scores, "alive": alive, "visible": visible, "protect": protect.contiguous(), "seen": seen,
    }  # fmt: skip
    problem = _Problem(**{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None})
    problem.N, problem.T, problem.S, problem.H = N, queries, S, 1 if logits is None else logits.shape[1]
    problem.first, problem.budget, problem.recent = first, budget, recent
    problem.threads = torch.get_num_threads()
    if visible is not None:
        problem.visible_n, problem.visible_t = visible.stride(0), visible.stride(1)
    library = load_library("eviction.c")
    assert library is not None
    if library.evict(ctypes.byref(problem)):
        raise MemoryError("no memory for the scratch buffers of eviction")
    return seen, scores, alive


def keep_index(priority: Tensor, keep: int) -> Tensor:
    """Ascending indices `(..., keep)` of what stays when the columns of the highest priority `(..., S)` go, among equals
    the oldest first."""
    gone = priority.shape[-1] - keep
    if gone == 1:
        index = torch.arange(keep, device=priority.device)
        return index + (index >= priority.argmax(-1, keepdim=True))
    return priority.sort(dim=-1, descending=True, stable=True).indices[..., gone:].sort(-1).values
