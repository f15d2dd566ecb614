"""The scan, the layer and its speed at growing lengths, forward and backward, against minGRU-pytorch and nn.GRU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.scan import linear_scan
from trialist.kernels.scan_cpu import available
from trialist.models import MinGRU, MinLSTM

B, T, D = 16, 512, 256
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = 8192  # of every batch of the table over lengths


def rows() -> list[Row]:
    found = []
    for count in sorted({1, min(2, os.cpu_count() or 1)}):
        with threads(count):
            found += [*_scan(count), *_layer(count)]
    with threads(1):
        for length in LENGTHS:
            found += _length(length)
    return found


def _scan(count: int) -> list[Row]:
    from minGRU_pytorch.minGRU import heinsen_associative_scan_log

    generator = torch.Generator().manual_seed(0)
    gate, value, grad = (torch.randn(B, T, D, generator=generator) for _ in range(3))
    a, b = gate.sigmoid().requires_grad_(), value.exp().requires_grad_()
    log_a, log_b = a.detach().log().requires_grad_(), b.detach().log().requires_grad_()
    direct = {"linear_scan, C": "c"} if available() else {}
    direct |= {"linear_scan, PyTorch": "torch"}

    functions = {
        "minGRU-pytorch, log-space scan": _both_ways(
            lambda: heinsen_associative_scan_log(log_a, log_b), (log_a, log_b), grad
        )
    }
    for name, backend in direct.items():
        functions[name] = _both_ways(lambda backend=backend: linear_scan(a, b, backend=backend), (a, b), grad)  # type: ignore[misc]
    # 3 numbers moved forward, 5 backward, for each of B T D
    result = compare(
        functions, work=_work("scan", B, T, count), limit=Limit(flops=5.0 * B * T * D, bytes=4.0 * 8 * B * T * D)
    )
    return [result.row(name, "minGRU-pytorch, log-space scan", at_most=1 / 8) for name in direct]


def _layer(count: int) -> list[Row]:
    from minGRU_pytorch.minGRU import minGRU
    from minGRU_pytorch.minLSTM import minLSTM

    x, grad = _inputs(B, T)
    ours = {"MinGRU": MinGRU(D, proj=False, bias=False), "MinLSTM": MinLSTM(D, proj=False, bias=False)}
    peers = {
        "minGRU-pytorch, minGRU": minGRU(D),
        "minGRU-pytorch, minLSTM": minLSTM(D),
        "nn.GRU": nn.GRU(D, D, batch_first=True),
    }
    functions = {name: _layer_both_ways(layer, x, grad) for name, layer in {**ours, **peers}.items()}
    # a product with 2 D^2 weights, thrice; x, projections, states and their gradients move at least once each
    limit = Limit(flops=3 * 2.0 * B * T * D * 2 * D, bytes=4.0 * 10 * B * T * D)
    result = compare(functions, work=_work("layer", B, T, count), limit=limit)
    return [
        result.row("MinGRU", "minGRU-pytorch, minGRU", at_most=1 / 4),
        result.row("MinGRU", "nn.GRU", at_most=1.0),
        result.row("MinLSTM", "minGRU-pytorch, minLSTM", at_most=1 / 4),
    ]


def _length(length: int) -> list[Row]:
    from minGRU_pytorch.minGRU import minGRU

    batch = TOKENS // length
    x, grad = _inputs(batch, length)
    layers = {
        "MinGRU": MinGRU(D, proj=False, bias=False),
        "nn.GRU": nn.GRU(D, D, batch_first=True),
        "minGRU-pytorch": minGRU(D),
    }
    result = compare(
        {name: _layer_both_ways(layer, x, grad) for name, layer in layers.items()},
        work=_work(f"layer, {TOKENS} tokens", batch, length, 1),
    )
    return [result.row("MinGRU", "nn.GRU"), result.row("MinGRU", "minGRU-pytorch")]


def _inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, D, generator=generator).requires_grad_()
    return x, torch.randn(batch, length, D, generator=generator)


def _layer_both_ways(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    def forward() -> Tensor:
        output = layer(x)
        return output[0] if isinstance(output, tuple) else output

    return _both_ways(forward, (x, *layer.parameters()), grad)


def _both_ways(forward: Callable[[], Tensor], inputs: Iterable[Tensor], grad: Tensor) -> Callable[[], object]:
    inputs = tuple(inputs)
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def _work(what: str, batch: int, length: int, count: int) -> str:
    return f"{what}, forward + backward, B={batch} T={length} D={D}, float32, {count} thread{'s' * (count > 1)}"
