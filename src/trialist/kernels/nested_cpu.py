"""The C kernel of nested weights as a PyTorch operator; `nested.py` holds the layout, the reference and the choice."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

ISAS = ("scalar", "avx2", "avx512", "avx512-bf16", "avx512-bf16-emulated")
"""Instructions, as nested.c numbers them. The last one runs the order of the fourth without its instruction, for tests"""
MOST = 8
"""Rows of x that are multiplied with weights in registers"""
TILE = 1 << 20
"""Weights that are looked up at once for more rows: they stay in the second-level cache"""


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("planes", "table", "x", "bias", "y")),
        *((name, ctypes.c_long) for name in ("P", "N", "K", "W")),
        *((name, ctypes.c_int) for name in ("M", "bits", "brain", "isa", "threads")),
    ]


class _Dequantization(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("planes", "table", "out")),
        *((name, ctypes.c_long) for name in ("P", "N", "K", "W", "first", "last")),
        *((name, ctypes.c_int) for name in ("bits", "brain", "isa", "threads", "brain_out")),
    ]


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel could be compiled here; the first call compiles it."""
    return load_library("nested.c") is not None


@functools.cache
def best() -> int:
    """Number of the best instructions of this processor."""
    library = load_library("nested.c")
    return 0 if library is None else int(library.best_isa())


def instructions() -> str:
    """Name of the best instructions of this processor."""
    return ISAS[best()]


def run(x: Tensor, planes: Tensor, table: Tensor, bias: Tensor | None, isa: str | None) -> Tensor:
    """`(..., N)`: x `(..., K)` times the weights, on the CPU. Nothing is checked, nothing has a gradient."""
    K, (P, N, W), width = x.shape[-1], planes.shape, table.shape[1]
    M = x.numel() // K
    chosen = _number(isa, x.dtype)
    most = MOST // 2 if ISAS[chosen].endswith("emulated") else MOST
    if most < M:
        y = _dense(x.reshape(M, K), planes, table, chosen)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], N)
    wide = x.float().contiguous()
    offset = None if bias is None else bias.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], N), dtype=torch.float32)
    if M:
        problem = _Product(
            planes.data_ptr(), table.data_ptr(), wide.data_ptr(), None if offset is None else offset.data_ptr(), y.data_ptr(),
            P, N, K, W, M, width.bit_length() - 1, table.dtype == torch.bfloat16, chosen, torch.get_num_threads(),
        )  # fmt: skip
        if load_library("nested.c").multiply(ctypes.byref(problem)):  # type: ignore[union-attr]
            raise MemoryError("no memory for the reordered activations of a nested product")
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def dequantize(
    planes: Tensor,
    table: Tensor,
    K: int,
    bits: int,
    dtype: torch.dtype,
    rows: slice | None = None,
    isa: int | None = None,
) -> Tensor:
    """Rows of the matrix `(N, K)` in float32 or bfloat16."""
    P, N, W = planes.shape
    first, last, _ = (rows or slice(None)).indices(N)
    out = torch.empty(last - first, K, dtype=dtype)
    problem = _Dequantization(
        planes.data_ptr(), table.data_ptr(), out.data_ptr(), P, N, K, W, first, last, bits, table.dtype == torch.bfloat16,
        best() if isa is None else isa, torch.get_num_threads(), dtype == torch.bfloat16,
    )  # fmt: skip
    load_library("nested.c").dequantize(ctypes.byref(problem))  # type: ignore[union-attr]
    return out


def _number(isa: str | None, dtype: torch.dtype) -> int:
    """Products of bfloat16 are for activations that are bfloat16 anyway: others would lose digits."""
    if isa:
        number = ISAS.index(isa)
        if min(number, 2 if isa.endswith("emulated") else 3) > best():
            raise ValueError(f"this processor has no {isa}; its best is {instructions()}")
        return number
    return best() if dtype == torch.bfloat16 else min(best(), ISAS.index("avx512"))


def _dense(x: Tensor, planes: Tensor, table: Tensor, isa: int) -> Tensor:
    """x `(M, K)` times tiles of the matrix. Products of float16 are far slower on CPUs than those of float32."""
    K, N = x.shape[1], planes.shape[1]
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    wide, bits = x.to(dtype), table.shape[1].bit_length() - 1
    y = torch.empty(len(x), N, dtype=dtype)
    step = max(64, TILE // K)
    for start in range(0, N, step):
        part = slice(start, start + step)
        y[:, part] = wide @ dequantize(planes, table, K, bits, dtype, part, isa).T
    return y.to(x.dtype)


@torch.library.custom_op("trialist::nested_linear", mutates_args=(), device_types="cpu")
def nested_product(x: Tensor, planes: Tensor, table: Tensor, isa: str) -> Tensor:
    """`(M, N)` in the dtype of x `(M, K)`."""
    return run(x, planes, table, None, isa or None)


@nested_product.register_fake
def _empty(x: Tensor, planes: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], planes.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, planes, table, _ = inputs
    ctx.save_for_backward(planes, table)
    ctx.K = inputs[0].shape[1]


def _differentiate(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return _gradient(grad, *ctx.saved_tensors, ctx.K), None, None, None


@torch.library.custom_op("trialist::nested_linear_backward", mutates_args=(), device_types="cpu")
def _gradient(grad: Tensor, planes: Tensor, table: Tensor, K: int) -> Tensor:
    """dL/dx = dL/dy W, a tile of W at a time."""
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    wide, bits = grad.to(dtype), table.shape[1].bit_length() - 1
    d_x = torch.zeros(len(grad), K, dtype=torch.float32)
    step = max(64, TILE // K)
    for start in range(0, planes.shape[1], step):
        part = slice(start, start + step)
        d_x += wide[:, part] @ dequantize(planes, table, K, bits, dtype, part)
    return d_x.to(grad.dtype)


@_gradient.register_fake
def _empty_gradient(grad: Tensor, planes: Tensor, table: Tensor, K: int) -> Tensor:
    return grad.new_empty(grad.shape[0], K)


def _refuse(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("backend 'c' is differentiable once; for second derivatives pass backend='reference'")


nested_product.register_autograd(_differentiate, setup_context=_save)
_gradient.register_autograd(_refuse)
