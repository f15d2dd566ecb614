"""Selective attention, forward and backward, against plain eager attention, causal SDPA and x-transformers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.selective import selective_attention
from trialist.kernels.selective_cpu import available

SHAPES = ((4, 4, 512, 32), (16, 4, 256, 32), (2, 9, 1024, 64))  # B, H, T, D


def rows() -> list[Row]:
    found = []
    for shape in SHAPES:
        for count in sorted({1, min(2, os.cpu_count() or 1)}):
            with threads(count):
                found += _rows(shape, count)
    return found


def _rows(shape: tuple[int, int, int, int], count: int) -> list[Row]:
    from x_transformers.attend import Attend

    B, H, T, D = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(B, T, H, D, generator=generator)
    mask = torch.full((1, 1, T, T), torch.finfo(torch.float32).min).triu(1)
    # a tenth of the usual scale keeps F below 87: peers would otherwise be slowed by denormal weights
    scaling = 0.1 * D**-0.5
    peer = Attend(causal=True, selective=True, heads=H, scale=scaling)

    def eager() -> Tensor:
        weights = (q @ k.transpose(2, 3) * scaling + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
        return (torch.dropout(weights, 0.0, True) @ v).transpose(1, 2).contiguous()

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)

    def x_transformers() -> Tensor:
        return peer(q, k, v)[0].transpose(1, 2)

    def ours(backend: str) -> Tensor:
        return selective_attention(q, k, v, scaling=scaling, backend=backend)[0]

    def both_ways(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (q, k, v), grad)

    forwards = {"eager attention": eager, "SDPA, causal": sdpa, "x-transformers, attn_selective": x_transformers}
    names = {"selective attention, C": "c"} if available() else {}
    names |= {"selective attention, PyTorch": "torch"}
    forwards |= {name: functools.partial(ours, backend) for name, backend in names.items()}

    numbers = B * H * T * D
    # 2 products forward and 5 backward over half of T x T; q, k, v, output and their gradients, read or written
    limit = Limit(flops=7 * numbers * T, bytes=4 * 12 * numbers)
    work = f"forward + backward, B={B} H={H} T={T} D={D}, float32, {count} thread{'s' * (count > 1)}"
    result = compare({name: both_ways(forward) for name, forward in forwards.items()}, work=work, limit=limit)
    found = []
    for name in names:
        found.append(result.row(name, "eager attention", at_most=1.25))
        found.append(result.row(name, "x-transformers, attn_selective", at_most=1.0))
    return [*found, result.row(next(iter(names)), "SDPA, causal")]
