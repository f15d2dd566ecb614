"""Product-key retrieval (arXiv 1907.05242, 2407.04153): the k best of n x n keys from two lists of n half keys.

    score(a, b) = first[a] . q1 + second[b] . q2

R queries, n half keys, D width of a half key.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from trialist.kernels import expert_lookup_cpu as cpu
from trialist.kernels.expert_lookup import choose_backend

TILE = 2**20
"""Scores of one half held at once: they are made, searched and dropped, never kept for the backward pass"""


def product_top_k(queries: Tensor, keys: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """Half-key indices int64 `(R, k, 2)` of the k best keys of each query, best first. No gradient flows.

    queries: `(R, 2, D)`; keys: `(2, n, D)`, of the same floating dtype. Exact: every one of the n x n keys competes,
    although only sums of ranks i and j with (i + 1)(j + 1) <= k are formed. Where scores are equal, the choice is free.
    Raises ValueError for k outside 1 to n x n, and on the CPU for scores that are NaN.
    """
    n = keys.shape[1]
    if not 1 <= k <= n * n:
        raise ValueError(f"k is {k}; {n} x {n} product keys allow 1 to {n * n}")
    backend = choose_backend(backend, queries, [keys])
    with torch.no_grad():
        return _search(queries.detach(), keys.detach(), k, "c" if backend == "c" else "torch")


@torch.library.custom_op("trialist::product_top_k", mutates_args=())
def _search(queries: Tensor, keys: Tensor, k: int, backend: str) -> Tensor:
    rows, n = queries.shape[0], keys.shape[1]
    found = []
    for tile in queries.split(max(1, TILE // n)):
        halves = [tile[:, half] @ keys[half].T for half in (0, 1)]  # (rows of the tile, n)
        if backend == "c":
            found.append(cpu.product_top_k(halves[0].float(), halves[1].float(), k))
        else:
            found.append(_torch_top_k(halves[0], halves[1], k))
    return torch.cat(found) if found else queries.new_empty(rows, k, 2, dtype=torch.int64)


@_search.register_fake
def _(queries, keys, k, backend):  # type: ignore[no-untyped-def]
    return queries.new_empty(queries.shape[0], k, 2, dtype=torch.int64)


def _torch_top_k(first: Tensor, second: Tensor, k: int) -> Tensor:
    half = min(k, first.shape[1])
    best, at = zip(*(scores.topk(half) for scores in (first, second)))  # (R, half) each, sorted
    if first.device.type == "cpu" and bool(torch.isnan(best[0]).any() | torch.isnan(best[1]).any()):
        raise cpu.not_a_number()
    i, j = _ranks(half, k, first.device)
    chosen = (best[0][:, i] + best[1][:, j]).topk(k).indices  # (R, k)
    return torch.stack([at[0].gather(1, i[chosen]), at[1].gather(1, j[chosen])], -1)


@functools.lru_cache(maxsize=32)
def _ranks(half: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of ranks that can be among the k best: (i + 1)(j + 1) - 1 sums are at least as large as that of ranks i, j."""
    rank = torch.arange(1, half + 1, device=device)
    return torch.nonzero(rank[:, None] * rank <= k, as_tuple=True)
