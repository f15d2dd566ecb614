"""Short causal convolution of each channel by itself: y[t] = sum over n < K of w[n] x[t-n].

Work: 2 K operations a number forward and 4 K backward, on rows that lie in the cache; the bound is memory, as for the scan.
B batch, T time, D channels, K taps
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

BACKENDS = ("auto", "torch", "c")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "grad", "y", "d_x", "d_w", "reach")),
        *((name, ctypes.c_int) for name in ("B", "T", "D", "K", "threads")),
    ]


def causal_conv(
    x: Tensor, weight: Tensor, before: Tensor | None = None, age: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """`(B, T, D)` in the dtype of x. Differentiable in x and weight, once with backend "c".

    x: `(B, T, D)`. weight: `(K, D)`, w[0] for the step itself. before: `(B, K - 1, D)`, the steps before x; None is zeros.
    age: `(B, T)` integers; a step looks back so many steps at most. None is no limit.
    backend: "c" (CPU, float32, nothing before), "torch", or "auto", which takes "c" where it can. Raises ValueError for
    shapes that do not fit.
    """
    K, D = weight.shape
    B, T, _ = x.shape
    if (
        x.shape[2] != D
        or (before is not None and before.shape != (B, K - 1, D))
        or (age is not None and age.shape != (B, T))
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, before {None if before is None else tuple(before.shape)} and age "
            f"{None if age is None else tuple(age.shape)} do not fit weight {tuple(weight.shape)}: wanted (B, T, D), "
            "(B, K - 1, D) and (B, T) for (K, D)"
        )
    weight = weight.to(x.dtype)
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and before is None and available()
    if backend == "c" and not fits:
        raise ValueError(
            "backend 'c' takes float32 on the CPU with nothing before, and a C compiler; pass backend='auto'"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "c" or (backend == "auto" and fits):
        return _convolve(x, weight, None if age is None else age.clamp(max=min(K - 1, 255)).to(torch.uint8))
    if before is None:
        before = x.new_zeros(B, K - 1, D)
    padded = torch.cat([before.to(x.dtype), x], 1)  # (B, K - 1 + T, D)
    y = x * weight[0]
    for n in range(1, K):
        earlier = padded[:, K - 1 - n : K - 1 - n + T]
        if age is not None:
            earlier = earlier * (age >= n)[..., None]
        y = torch.addcmul(y, earlier, weight[n])
    return y


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel could be compiled here; the first call compiles it."""
    return load_library("causal_conv.c") is not None


def _call(function: str, shape: torch.Size, taps: int, **tensors: Tensor | None) -> None:
    problem = _Problem(**{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None})
    problem.B, problem.T, problem.D = shape
    problem.K, problem.threads = taps, torch.get_num_threads()
    getattr(load_library("causal_conv.c"), function)(ctypes.byref(problem))


@torch.library.custom_op("trialist::causal_conv", mutates_args=(), device_types="cpu")
def _convolve(x: Tensor, weight: Tensor, reach: Tensor | None) -> Tensor:
    x, weight, reach = x.contiguous(), weight.contiguous(), None if reach is None else reach.contiguous()
    y = x.new_empty(x.shape)
    _call("convolution_forward", x.shape, len(weight), x=x, w=weight, reach=reach, y=y)
    return y


@_convolve.register_fake
def _empty(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("trialist::causal_conv_backward", mutates_args=(), device_types="cpu")
def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, reach: Tensor | None) -> tuple[Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    reach = None if reach is None else reach.contiguous()
    d_x, d_w = x.new_empty(x.shape), x.new_empty(len(x), *weight.shape)
    _call("convolution_backward", x.shape, len(weight), x=x, w=weight, grad=grad, reach=reach, d_x=d_x, d_w=d_w)
    return d_x, d_w.sum(0)


@_convolve_backward.register_fake
def _empty_gradients(grad: Tensor, x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return (*_convolve_backward(grad, *ctx.saved_tensors), None)


def _refuse(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("backend 'c' is differentiable once; for second derivatives pass backend='torch'")


_convolve.register_autograd(_differentiate, setup_context=_save)
_convolve_backward.register_autograd(_refuse)
