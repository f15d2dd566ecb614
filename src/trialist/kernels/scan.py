"""Linear recurrences over time, each with its own backward pass; the gated one is that of minGRU and minLSTM
(arXiv 2410.01201).

    linear_scan    h[t] = a[t] h[t-1] + b[t]
                   d_b[t] = d_h[t] + a[t+1] d_b[t+1],  d_a[t] = d_b[t] h[t-1],  d_h0 = a[1] d_b[1]
    gated_scan     h[t] = (1 - z[t]) h[t-1] + z[t] g(c[t]),  z = sigmoid(k)  or  sigmoid(k) / (sigmoid(f) + sigmoid(k))

The recurrence is computed as it stands. The paper computes it from sums of logarithms, which grow with t and are subtracted
again, so that the gradient of a loses its digits with the length (`benchmarks/min_rnn.py` measures both). With 0 <= a <= 1 the
recurrence itself forgets its rounding errors. The paper's way is here as backend "log_scan".

Letters: B batch, T time, D channels.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trialist.kernels import scan_cpu
from trialist.kernels.scan_torch import linear_scan_torch

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

    Computed and returned in float32 (float64 where an input is), whatever the precision of the inputs. Differentiable in
    a, b and h0: with "c" once, with the others as often as wanted. Raises ValueError for shapes that do not fit, T = 0, numbers
    that are not real floating point, and values that the logarithm of "log_scan" cannot take.
    """
    check_backend(backend)
    wide = _check({"a": a, "b": b}, h0)
    with torch.autocast(a.device.type, enabled=False):
        a, b, h0 = a.to(wide), b.to(wide), None if h0 is None else h0.to(wide)
        backend = _choose(backend, a)
        if backend == "c":
            return scan_cpu.linear_scan_cpu(a, b, h0, reverse)
        if backend == "torch":
            return linear_scan_torch(a, b, h0, reverse)
        if reverse:
            a, b = a.flip(1), b.flip(1)
        if backend == "log_scan":
            _check_logarithm(a=a, b=b)
            h = _log_scan(a.log(), _log(b), h0)
        else:
            h = _reference(a, b, h0)
        return h.flip(1) if reverse else h


def gated_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    forget: Tensor | None = None,
    activation: str = "g",
    padding_mask: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """All states h `(B, T, D)` of h[t] = (1 - z) h[t-1] + z activation(candidate[t]) with z = sigmoid(gate[t]).

    gate, candidate: `(B, T, D)`. h0: `(B, D)`, the state before the first step, taken as it is; None is zero.
    forget: `(B, T, D)`, a second gate: z = sigmoid(gate) / (sigmoid(forget) + sigmoid(gate)).
    activation: "g" (x + 1/2 where x >= 0, sigmoid(x) below: positive states), "identity" or "tanh".
    padding_mask: bool `(B, T)`, False where a step leaves the state as it is. reset: bool `(B, T)`, True where a step
        starts from state zero. A step that is both is padding.

    Gates and states are float32 (float64 where an input is). Backends, derivatives and errors as for `linear_scan`;
    "log_scan" computes the logarithms from the gates, as the paper does, so that no gate is too far open or shut for it. It
    takes activation "g" only, and no reset, whose logarithm does not exist.
    """
    check_activation(activation, backend)
    if backend == "log_scan" and reset is not None:
        raise ValueError("backend 'log_scan' cannot start a row anew, log 0 does not exist; pass backend='auto'")
    tensors = {"gate": gate, "candidate": candidate, **({} if forget is None else {"forget": forget})}
    wide = _check(tensors, h0)
    check_masks((gate.shape[0], gate.shape[1]), padding_mask, reset)
    with torch.autocast(gate.device.type, enabled=False):
        gate, candidate, h0 = gate.to(wide), candidate.to(wide), None if h0 is None else h0.to(wide)
        forget = None if forget is None else forget.to(wide)
        if activation == "tanh":
            candidate = candidate.tanh()
        backend = _choose(backend, gate)
        if backend == "c":
            marks = _marks(padding_mask, reset)
            return scan_cpu.gated_scan_cpu(gate, candidate, forget, h0, marks, activation == "g")
        odds = gate if forget is None else logsigmoid(gate) - logsigmoid(forget)  # log of z / (1 - z)
        if backend == "log_scan":
            log_a, log_b = logsigmoid(-odds), logsigmoid(odds) + _log_positive(candidate)
            if padding_mask is not None:
                padding = ~padding_mask[..., None]
                log_a, log_b = (
                    log_a.masked_fill(padding, 0.0),
                    log_b.masked_fill(padding, math.log(torch.finfo(wide).tiny)),
                )
            return _log_scan(log_a, log_b, h0)
        a, b = (-odds).sigmoid(), odds.sigmoid() * (positive(candidate) if activation == "g" else candidate)
        if reset is not None:
            a = a.masked_fill(reset[..., None], 0.0)
        if padding_mask is not None:
            padding = ~padding_mask[..., None]
            a, b = a.masked_fill(padding, 1.0), b.masked_fill(padding, 0.0)
        return linear_scan(a, b, h0, backend=backend)


def positive(x: Tensor) -> Tensor:
    """g of the paper: x + 1/2 where x >= 0, sigmoid(x) below, so that every state has a logarithm."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def _log_positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, (x.relu() + 0.5).log(), logsigmoid(x))


def check_backend(backend: str) -> None:
    """Raises ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def check_activation(activation: str, backend: str) -> None:
    """Raises ValueError for an activation or a backend of `gated_scan` that does not exist, or that the other excludes."""
    check_backend(backend)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    if backend == "log_scan" and activation != "g":
        raise ValueError(f"backend 'log_scan' needs positive states, so activation 'g' and not {activation!r}")


def check_masks(shape: tuple[int, int], padding_mask: Tensor | None, reset: Tensor | None) -> None:
    """Raises ValueError for masks that are not bool of shape (B, T)."""
    for name, mask in (("padding_mask", padding_mask), ("reset", reset)):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, wanted bool (B, T) = {shape}")


def _check(tensors: Mapping[str, Tensor], h0: Tensor | None) -> torch.dtype:
    """The precision to compute in. Raises ValueError where the tensors do not fit one another."""
    (name, first), *others = tensors.items()
    for other, tensor in others:
        if first.dim() != 3 or first.shape != tensor.shape:
            raise ValueError(
                f"{name} {tuple(first.shape)} and {other} {tuple(tensor.shape)} must have the same shape (B, T, D)"
            )
    if first.shape[1] == 0:
        raise ValueError(f"{name} has no time step: shape {tuple(first.shape)}; give at least one")
    if h0 is not None and h0.shape != (first.shape[0], first.shape[2]):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}, wanted (B, D) = {(first.shape[0], first.shape[2])}")
    given = {**tensors, **({} if h0 is None else {"h0": h0})}
    for other, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{other} is {tensor.dtype}; give real floating point numbers, as {other}.float()")
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in given.values()) else torch.float32


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


def _reference(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """The algorithm in the open: autograd differentiates it."""
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, 1)


def _log_scan(log_a: Tensor, log_b: Tensor, h0: Tensor | None) -> Tensor:
    """log h[t] = A[t] + logcumsumexp(log b - A)[t] with A[t] the sum of log a up to t, and log h0 as an element before."""
    sums, values = log_a.cumsum(1), log_b
    if h0 is not None:
        _check_logarithm(h0=h0)
        sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)
        values = torch.cat([_log(h0)[:, None], values], 1)
    return (sums + (values - sums).logcumsumexp(1)).exp()[:, -log_a.shape[1] :]


def _log(x: Tensor) -> Tensor:
    """log x; the least number stands for 0, whose logarithm has no gradient."""
    return torch.where(x == 0, torch.finfo(x.dtype).tiny, x).log()


def _check_logarithm(**values: Tensor) -> None:
    """Raises ValueError for numbers without a logarithm; in compiled code, which cannot look at numbers, they become NaN."""
    if torch.compiler.is_compiling():
        return
    for name, x in values.items():
        wrong, wanted = (x <= 0, "above 0") if name == "a" else (x < 0, "at least 0")
        if wrong.any():
            raise ValueError(
                f"backend 'log_scan' takes logarithms: {name} must be {wanted} and is {x[wrong].min():.3g} somewhere; "
                "pass backend='auto'"
            )
