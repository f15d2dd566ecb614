"""Linear recurrences over time, each with its own backward pass; the gated one is that of minGRU (arXiv 2410.01201).

    linear_scan    h[t] = a[t] h[t-1] + b[t]
                   d_b[t] = d_h[t] + a[t+1] d_b[t+1],  d_a[t] = d_b[t] h[t-1],  d_h0 = a[1] d_b[1]
    gated_scan     h[t] = (1 - z[t]) h[t-1] + z[t] g(c[t]),  z = sigmoid(k)

The recurrence is computed as it stands. The paper computes it from sums of logarithms, which grow with t and are subtracted
again: in float32 the gradient of a is wrong by 5e-4 at T = 512 and by 1e-2 at T = 4096. With 0 <= a <= 1 the recurrence itself
forgets its rounding errors. The paper's way is here as backend "log_scan".

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trialist.kernels import scan_cpu

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "c", "log_scan")
ACTIVATIONS = ("g", "identity", "tanh")


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """All states h `(B, T, D)` of h[t] = a[t] h[t-1] + b[t]; `h[:, -1]` is the h0 with which a longer sequence goes on.

    a, b: `(B, T, D)`. h0: `(B, D)`, the state before the first step; None is zero.
    reverse: time runs backwards, h[t] = a[t] h[t+1] + b[t], and h0 is the state behind the last step.
    backend: "c" (CPU), "torch", "reference" (plain autograd), "log_scan" (the paper's, for a > 0, b >= 0 and h0 >= 0), or
        "auto", which takes "c" where it can and else "torch".

    Computed and returned in float32 (float64 for float64 inputs), whatever the precision of the inputs. Differentiable in
    a, b and h0, once; with "reference" and "log_scan" also twice. Raises ValueError for shapes that do not fit, T = 0, and
    values that the logarithm of "log_scan" cannot take.
    """
    _check(a, b, h0, backend)
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    with torch.autocast(a.device.type, enabled=False):
        a, b, h0 = a.to(wide), b.to(wide), None if h0 is None else h0.to(wide)
        backend = _choose(backend, a)
        if backend == "c":
            return scan_cpu.linear_scan_cpu(a, b, h0, reverse)
        if backend == "torch":
            return _LinearScan.apply(a, b, h0, reverse)
        one_way = _reference if backend == "reference" else _log_scan
        return one_way(a.flip(1), b.flip(1), h0).flip(1) if reverse else one_way(a, b, h0)


def gated_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    padding_mask: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """All states h `(B, T, D)` of h[t] = (1 - z) h[t-1] + z activation(candidate[t]) with z = sigmoid(gate[t]).

    gate, candidate: `(B, T, D)`. h0: `(B, D)`, the state before the first step, taken as it is; None is zero.
    activation: "g" (x + 1/2 where x >= 0, sigmoid(x) below: positive states), "identity" or "tanh".
    padding_mask: bool `(B, T)`, False where a step leaves the state as it is. reset: bool `(B, T)`, True where a step
        starts from state zero. A step that is both is padding.

    Gates and states are float32 (float64 for float64 inputs). Backends, derivatives and errors as for `linear_scan`;
    "log_scan" takes activation "g" only, and no reset, whose logarithm does not exist.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if backend == "log_scan" and activation != "g":
        raise ValueError(f"backend 'log_scan' needs positive states, so activation 'g' and not {activation!r}")
    if backend == "log_scan" and reset is not None:
        raise ValueError("backend 'log_scan' cannot start a row anew, log 0 does not exist; pass backend='auto'")
    _check(gate, candidate, h0, backend, names=("gate", "candidate"))
    for name, mask in (("padding_mask", padding_mask), ("reset", reset)):
        if mask is not None and (mask.shape != gate.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, wanted bool (B, T) = {tuple(gate.shape[:2])}"
            )
    wide = torch.float64 if torch.float64 in (gate.dtype, candidate.dtype) else torch.float32
    with torch.autocast(gate.device.type, enabled=False):
        gate, candidate, h0 = gate.to(wide), candidate.to(wide), None if h0 is None else h0.to(wide)
        if activation == "tanh":
            candidate = candidate.tanh()
        if _choose(backend, gate) == "c":
            return scan_cpu.gated_scan_cpu(gate, candidate, h0, _marks(padding_mask, reset), activation == "g")
        z = gate.sigmoid()
        a, b = (-gate).sigmoid(), z * (positive(candidate) if activation == "g" else candidate)
        if reset is not None:
            a = a.masked_fill(reset[..., None], 0.0)
        if padding_mask is not None:
            padding = ~padding_mask[..., None]
            a, b = a.masked_fill(padding, 1.0), b.masked_fill(padding, 0.0)
        return linear_scan(a, b, h0, backend=backend)


def positive(x: Tensor) -> Tensor:
    """g of the paper: x + 1/2 where x >= 0, sigmoid(x) below, so that every state has a logarithm."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def _marks(padding_mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """uint8 `(B, T)`: 0 a token, 1 padding, 2 a restart."""
    if padding_mask is None:
        return None if reset is None else reset.to(torch.uint8) * 2
    padding = ~padding_mask
    return padding.to(torch.uint8) if reset is None else torch.where(padding, 1, reset.to(torch.uint8) * 2)


def _choose(backend: str, a: Tensor) -> str:
    """The backend that runs; ValueError where the one asked for cannot."""
    obstacle = (
        f"runs on the CPU, not on {a.device}" if a.device.type != "cpu"
        else "computes in float32, not float64" if a.dtype == torch.float64
        else "could not be compiled here" if not scan_cpu.available()
        else None
    )  # fmt: skip
    if backend == "c" and obstacle:
        raise ValueError(f"backend 'c' {obstacle}; pass backend='auto'")
    if backend != "auto":
        return backend
    chosen = "torch" if obstacle else "c"
    if not torch.compiler.is_compiling():
        _say(chosen, a.device.type)
    return chosen


@functools.cache
def _say(backend: str, device: str) -> None:
    log.info("linear recurrences on %s run through backend %r", device, backend)


def _check(a: Tensor, b: Tensor, h0: Tensor | None, backend: str, names: tuple[str, str] = ("a", "b")) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if a.dim() != 3 or a.shape != b.shape:
        raise ValueError(
            f"{names[0]} {tuple(a.shape)} and {names[1]} {tuple(b.shape)} must have the same shape (B, T, D)"
        )
    if a.shape[1] == 0:
        raise ValueError(f"{names[0]} has no time step: shape {tuple(a.shape)}; give at least one")
    if h0 is not None and h0.shape != (a.shape[0], a.shape[2]):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}, wanted (B, D) = {(a.shape[0], a.shape[2])}")


def _reference(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """The algorithm in the open: autograd differentiates it."""
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def _log_scan(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """log h[t] = A[t] + logcumsumexp(log b - A)[t] with A[t] the sum of log a up to t, and log h0 as an element before."""
    for name, x, wrong, wanted in (("a", a, a <= 0, "above 0"), ("b", b, b < 0, "at least 0")):
        if wrong.any():
            raise ValueError(
                f"backend 'log_scan' takes logarithms: {name} must be {wanted} and is {x[wrong].min():.3g} somewhere; "
                "pass backend='auto'"
            )
    if h0 is not None and (h0 < 0).any():
        raise ValueError(f"backend 'log_scan' takes logarithms: h0 must be at least 0 and is {h0.min():.3g} somewhere")
    tiny = torch.finfo(b.dtype).tiny  # in the place of 0, whose logarithm has no gradient
    sums, values = a.log().cumsum(1), b.clamp(min=tiny).log()
    if h0 is not None:
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)
        values = torch.cat([h0.clamp(min=tiny).log()[:, None], values], 1)
    return (sums + (values - sums).logcumsumexp(1)).exp()[:, -a.shape[1] :]


class _LinearScan(torch.autograd.Function):
    """The recurrence forward, and the same recurrence run backwards for the gradient."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:  # type: ignore[override, no-untyped-def]
        h = _scan(a, b, h0, reverse)
        ctx.save_for_backward(a, h, h0)
        ctx.reverse = reverse
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        a, h, h0 = ctx.saved_tensors
        start = torch.zeros_like(h[:, :1]) if h0 is None else h0[:, None]
        one = torch.ones_like(a[:, :1])
        if ctx.reverse:
            d_b = _scan(torch.cat([one, a[:, :-1]], 1), grad, None, reverse=False)
            d_a, d_h0 = d_b * torch.cat([h[:, 1:], start], 1), a[:, -1] * d_b[:, -1]
        else:
            d_b = _scan(torch.cat([a[:, 1:], one], 1), grad, None, reverse=True)
            d_a, d_h0 = d_b * torch.cat([start, h[:, :-1]], 1), a[:, 0] * d_b[:, 0]
        return d_a, d_b, None if h0 is None else d_h0, None


def _scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """Step by step on the CPU; elsewhere, where a step costs its launch, about 3 sqrt(T) steps on blocks of sqrt(T)."""
    if a.device.type != "cpu":
        if reverse:
            return _scan_blocks(a.flip(1), b.flip(1), h0).flip(1)
        return _scan_blocks(a, b, h0)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    last = torch.zeros_like(b[:, 0]) if h0 is None else h0
    steps = zip(a.unbind(1), b.unbind(1), h.unbind(1), strict=True)
    for decay, new, out in reversed(list(steps)) if reverse else steps:
        last = torch.addcmul(new, decay, last, out=out)
    return h


def _scan_blocks(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """Within all blocks at once, from state zero; then from block to block; then what entered each block, decayed."""
    B, T, D = a.shape
    n = math.isqrt(T - 1) + 1
    blocks = -(-T // n)
    fill = (0, 0, 0, blocks * n - T)
    a = torch.nn.functional.pad(a, fill).view(B, blocks, n, D)
    h = torch.nn.functional.pad(b, fill).view(B, blocks, n, D).clone()
    decay = a.clone()  # product of a since the start of the block
    for i in range(1, n):
        h[:, :, i].addcmul_(a[:, :, i], h[:, :, i - 1])
        decay[:, :, i].mul_(decay[:, :, i - 1])
    entering = torch.zeros_like(h[:, :, 0])  # (B, blocks, D)
    if h0 is not None:
        entering[:, 0] = h0
    for j in range(1, blocks):
        torch.addcmul(h[:, j - 1, -1], decay[:, j - 1, -1], entering[:, j - 1], out=entering[:, j])
    return h.addcmul_(decay, entering[:, :, None]).view(B, blocks * n, D)[:, :T]
