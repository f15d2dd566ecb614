"""The scan, the layer and its speed at growing lengths, forward and backward, against minGRU-pytorch and nn.GRU.

Beside time: memory that a training step keeps, a decoded token, and what the scan from sums of logarithms loses in precision.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.scan import gated_scan, linear_scan
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
        found += [*_decode(), *_memory(), *_precision()]
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
    layers = {
        "MinGRU": MinGRU(D, proj=False, bias=False),
        "minGRU-pytorch, minGRU": minGRU(D),
        "nn.GRU": nn.GRU(D, D, bias=False, batch_first=True),
        "MinLSTM": MinLSTM(D, proj=False, bias=False),
        "minGRU-pytorch, minLSTM": minLSTM(D),
    }
    functions = {name: _layer_both_ways(layer, x, grad) for name, layer in layers.items()}
    result = compare(functions, work=_work("layer", B, T, count))
    found = []
    for name, projections, peers in (
        ("MinGRU", 2, {"minGRU-pytorch, minGRU": 1 / 4, "nn.GRU": 1.0}),
        ("MinLSTM", 3, {"minGRU-pytorch, minLSTM": 1 / 4, "nn.GRU": 1.0}),
    ):
        # a product with `projections` D^2 weights, thrice; x, projections, states and their gradients move at least once each
        limit = Limit(flops=3 * 2.0 * B * T * D * projections * D, bytes=4.0 * 2 * (2 + projections + 1) * B * T * D)
        limited = dataclasses.replace(result, limit=limit)
        found += [limited.row(name, peer, at_most=at_most) for peer, at_most in peers.items()]
    return found


def _length(length: int) -> list[Row]:
    from minGRU_pytorch.minGRU import minGRU

    batch = TOKENS // length
    x, grad = _inputs(batch, length)
    layers = {
        "MinGRU": MinGRU(D, proj=False, bias=False),
        "nn.GRU": nn.GRU(D, D, bias=False, batch_first=True),
        "minGRU-pytorch": minGRU(D),
    }
    result = compare(
        {name: _layer_both_ways(layer, x, grad) for name, layer in layers.items()},
        work=_work(f"layer, {TOKENS} tokens", batch, length, 1),
    )
    return [result.row("MinGRU", "nn.GRU"), result.row("MinGRU", "minGRU-pytorch")]


def _decode() -> list[Row]:
    """One token of each of a few rows, from a carried state."""
    from minGRU_pytorch.minGRU import minGRU

    rows = 8
    x, state = torch.randn(rows, 1, D), torch.rand(rows, D)
    layer, gru, peer = MinGRU(D, proj=False, bias=False), nn.GRU(D, D, bias=False, batch_first=True), minGRU(D)
    functions = {
        "MinGRU": lambda: layer(x, state),
        "nn.GRU": lambda: gru(x, state[None]),
        "minGRU-pytorch": lambda: peer(x, state[:, None], return_next_prev_hidden=True),
    }
    with torch.no_grad():
        # the weights move once
        result = compare(
            functions, work=f"layer, decode one token, B={rows} D={D}, float32, 1 thread",
            limit=Limit(flops=2.0 * rows * D * 2 * D, bytes=4.0 * 2 * D * D),
        )  # fmt: skip
    return [result.row("MinGRU", "nn.GRU"), result.row("MinGRU", "minGRU-pytorch")]


def _memory() -> list[Row]:
    """Bytes that the forward pass of a layer keeps for its backward pass, beside input and weights."""
    from minGRU_pytorch.minGRU import minGRU

    x, _ = _inputs(B, T)
    layers = {
        "MinGRU": MinGRU(D, proj=False, bias=False),
        "nn.GRU": nn.GRU(D, D, bias=False, batch_first=True),
        "minGRU-pytorch": minGRU(D),
    }
    kept = {name: _kept_bytes(layer, x) for name, layer in layers.items()}
    return [
        Row(
            what="MinGRU",
            work=_work("layer, bytes kept for the backward pass", B, T, 1).replace(", forward + backward", ""),
            measured=f"{kept['MinGRU'] / 2**20:.1f} MB",
            against=f"{peer}: {kept[peer] / 2**20:.1f} MB",
            ratio=f"{kept['MinGRU'] / kept[peer]:.2f}",
        )
        for peer in ("nn.GRU", "minGRU-pytorch")
    ]


def _kept_bytes(layer: nn.Module, x: Tensor) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    storages: dict[int, int] = {}
    alive = []  # a storage that was freed could be counted as another one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


def _precision() -> list[Row]:
    """Relative error of the gradient of the gate in float32 against the step-by-step recurrence in float64."""
    found = []
    for length in (512, 4096):
        generator = torch.Generator().manual_seed(0)
        gate, candidate, upstream = (torch.randn(2, length, 16, generator=generator) for _ in range(3))

        def gradient(
            backend: str,
            dtype: torch.dtype,
            gate: Tensor = gate,
            candidate: Tensor = candidate,
            upstream: Tensor = upstream,
        ) -> Tensor:
            k = gate.to(dtype).requires_grad_()
            states = gated_scan(k, candidate.to(dtype), backend=backend)
            return torch.autograd.grad(states, k, upstream.to(dtype))[0].double()

        exact = gradient("torch", torch.float64)
        direct, logs = (
            float((gradient(backend, torch.float32) - exact).norm() / exact.norm()) for backend in ("auto", "log_scan")
        )
        found.append(
            Row(
                what="gated_scan",
                work=f"relative error of the gradient of the gate, T={length}, float32",
                measured=f"{direct:.1e}",
                against=f"backend log_scan: {logs:.1e}",
                ratio=f"{direct / logs:.1e}",
            )
        )
    return found


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
