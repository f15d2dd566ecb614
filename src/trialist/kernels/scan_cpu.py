"""The C kernels of the linear recurrences as PyTorch operators; `scan.py` holds the algorithms and picks the backend.

Work: a few operations for each number that is read or written, so the bound is memory. The scan moves 3 B T D numbers
forward and 5 backward; so does the gated recurrence, which saves besides its inputs only h. A second gate adds one number
forward and two backward.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

_SERIES = ("a", "b", "f", "h", "grad", "d_a", "d_b", "d_f")


class _Series(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("row", ctypes.c_long), ("step", ctypes.c_long)]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, _Series) for name in _SERIES),
        *((name, ctypes.c_void_p) for name in ("h0", "d_h0", "marks")),
        *((name, ctypes.c_int) for name in ("B", "T", "D", "positive", "threads")),
    ]


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels could be compiled here; the first call compiles them."""
    return load_library("scan.c") is not None


def _call(function: str, series: dict[str, Tensor], reverse: bool = False, positive: bool = False,
          **contiguous: Tensor | None) -> None:  # fmt: skip
    """series: tensors (B, T, D) whose channels are adjacent."""
    problem = _Problem()
    problem.B, problem.T, problem.D = next(iter(series.values())).shape
    problem.positive, problem.threads = positive, torch.get_num_threads()
    for name, tensor in series.items():
        row, step, _ = tensor.stride()
        start = tensor.data_ptr() + (problem.T - 1) * step * tensor.element_size() if reverse else tensor.data_ptr()
        setattr(problem, name, _Series(start, row, -step if reverse else step))
    for name, tensor in contiguous.items():
        if tensor is not None:
            setattr(problem, name, tensor.data_ptr())
    getattr(load_library("scan.c"), function)(ctypes.byref(problem))


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("trialist::linear_scan", mutates_args=(), device_types="cpu")
def linear_scan_cpu(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """As `linear_scan`, for float32 tensors on the CPU."""
    h = a.new_empty(a.shape)
    _call("scan_forward", {"a": _adjacent(a), "b": _adjacent(b), "h": h}, reverse, h0=_whole(h0))
    return h


@torch.library.custom_op("trialist::linear_scan_backward", mutates_args=(), device_types="cpu")
def _linear_scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_a, d_b, d_h0 = _empty_gradients(grad, a, h, h0, reverse)
    series = {"a": _adjacent(a), "h": h, "grad": _adjacent(grad), "d_a": d_a, "d_b": d_b}
    _call("scan_backward", series, reverse, h0=_whole(h0), d_h0=d_h0)
    return d_a, d_b, d_h0


@torch.library.custom_op("trialist::gated_scan", mutates_args=(), device_types="cpu")
def gated_scan_cpu(
    gate: Tensor, candidate: Tensor, forget: Tensor | None, h0: Tensor | None, marks: Tensor | None, positive: bool
) -> Tensor:
    """As `gated_scan`, for float32 tensors on the CPU. marks: uint8 `(B, T)`, 1 at padding, 2 at a restart."""
    h = gate.new_empty(gate.shape)
    series = _gated_series(gate, candidate, forget) | {"h": h}
    _call("gated_forward", series, positive=positive, h0=_whole(h0), marks=_whole(marks))
    return h


@torch.library.custom_op("trialist::gated_scan_backward", mutates_args=(), device_types="cpu")
def _gated_scan_backward(
    grad: Tensor, gate: Tensor, candidate: Tensor, forget: Tensor | None, h: Tensor, h0: Tensor | None,
    marks: Tensor | None, positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of gate, candidate, forget (nothing where there is none) and h0."""
    d_gate, d_candidate, d_forget, d_h0 = _empty_gated_gradients(grad, gate, candidate, forget)
    series = _gated_series(gate, candidate, forget) | {"h": h, "grad": _adjacent(grad)}
    series |= {"d_a": d_gate, "d_b": d_candidate, **({} if forget is None else {"d_f": d_forget})}
    _call("gated_backward", series, positive=positive, h0=_whole(h0), marks=_whole(marks), d_h0=d_h0)
    return d_gate, d_candidate, d_forget, d_h0


def _gated_series(gate: Tensor, candidate: Tensor, forget: Tensor | None) -> dict[str, Tensor]:
    series = {"a": _adjacent(gate), "b": _adjacent(candidate)}
    return series if forget is None else series | {"f": _adjacent(forget)}


def _empty_gated_gradients(
    grad: Tensor, gate: Tensor, candidate: Tensor, forget: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate, d_candidate, d_h0 = _empty_gradients(grad, gate)
    return d_gate, d_candidate, gate.new_empty((0,) if forget is None else gate.shape), d_h0


def _empty_gradients(grad: Tensor, a: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    B, _T, D = a.shape
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(B, D)


def _empty(a: Tensor, *_: object) -> Tensor:
    return a.new_empty(a.shape)


def _save_scan(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _differentiate_scan(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    a, h, h0 = ctx.saved_tensors
    d_a, d_b, d_h0 = _linear_scan_backward(grad, a, h, h0, ctx.reverse)
    return d_a, d_b, None if h0 is None else d_h0, None


def _save_gated(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    gate, candidate, forget, h0, marks, ctx.positive = inputs
    ctx.save_for_backward(gate, candidate, forget, output, h0, marks)


def _differentiate_gated(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    gate, candidate, forget, h, h0, marks = ctx.saved_tensors
    d_gate, d_candidate, d_forget, d_h0 = _gated_scan_backward(
        grad, gate, candidate, forget, h, h0, marks, ctx.positive
    )
    return d_gate, d_candidate, None if forget is None else d_forget, None if h0 is None else d_h0, None, None


def _refuse(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("backend 'c' is differentiable once; for second derivatives pass backend='torch'")


for _operator, _save, _differentiate in (
    (linear_scan_cpu, _save_scan, _differentiate_scan),
    (gated_scan_cpu, _save_gated, _differentiate_gated),
):
    _operator.register_fake(_empty)
    _operator.register_autograd(_differentiate, setup_context=_save)
for _operator, _empty_outputs in (
    (_linear_scan_backward, _empty_gradients),
    (_gated_scan_backward, _empty_gated_gradients),
):
    _operator.register_fake(_empty_outputs)
    _operator.register_autograd(_refuse)
