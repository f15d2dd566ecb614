"""The C kernel of selective attention as PyTorch operators; `selective.py` holds the algorithm and picks the backend.

Work: causal attention needs 2 products of T S D / 2 multiply-adds per head forward and 5 backward, and so does this
kernel; beside them it repeats q[sel] k^T of the selector head once forward. Memory: inputs, output, `lse` (B, H, T), and F
once per block of queries, (B, T / 64 + 1, S), where eager attention keeps (B, H, T, S). The bound is arithmetic, not
bandwidth: a tile of 64 x 64 logits is used for 64 D multiply-adds per 4 (64 + D) bytes that it needs from memory.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

BLOCK = 64  # queries and columns of one tile, as in selective.c
PARTS = 8  # tasks that share the gradient of the queries when the batch is small; fixed, so that results never vary

_POINTERS_1 = (
    "q", "k", "v", "mask", "protect", "penalty", "offsets", "memory", "d_memory", "kt", "vt", "out", "lse", "d_out", "delta",
)  # fmt: skip
_POINTERS_2 = ("d_q_parts", "d_q", "d_k", "d_v")
_INTEGERS = ("mask_kind", "B", "H", "G", "T", "S", "D", "selector", "parts", "threads")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS_1 + _POINTERS_2),
        ("mask_b", ctypes.c_long),
        ("mask_t", ctypes.c_long),
        *((name, ctypes.c_int) for name in _INTEGERS),
        ("scaling", ctypes.c_float),
        ("tau", ctypes.c_float),
    ]


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel could be compiled here; the first call compiles it."""
    return load_library("selective.c") is not None


def selective_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, protect: Tensor, penalty: Tensor,
    scaling: float, selector_head: int, tau: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, F and memory of `selective_attention`, for CPU tensors, with a mask that is the same for all heads,
    (B | 1, 1, T, S). tau 0 computes no memory."""
    D = query.shape[-1]
    q, k, v = (torch.nn.functional.pad(x.float(), (0, -D % 16)) for x in (query, key, value))
    if mask is not None:
        mask = mask[:, 0]
        if mask.dtype != torch.bool:
            mask = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    out, offsets, _, memory = _forward(q, k, v, mask, protect, penalty, scaling, selector_head, tau)
    return out[..., :D].to(query.dtype), offsets[:, -1].detach().clone(), memory


def _call(
    function: str, tensors: dict[str, Tensor | None], shape: tuple[int, ...], scaling: float, selector: int, tau: float
) -> None:
    mask = tensors.pop("mask")
    problem = _Problem(**{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None})
    problem.B, problem.H, problem.G, problem.T, problem.S, problem.D = shape
    problem.scaling, problem.selector, problem.threads = scaling, selector, torch.get_num_threads()
    problem.tau = tau or 1.0
    problem.parts = _parts(shape[0], shape[4])
    if mask is not None:
        problem.mask = mask.data_ptr()
        problem.mask_b = mask.stride(0) if mask.shape[0] > 1 else 0
        problem.mask_t = mask.stride(1) if mask.shape[1] > 1 else 0
        problem.mask_kind = 1 if mask.dtype == torch.bool else 2
    if getattr(load_library("selective.c"), function)(ctypes.byref(problem)):
        raise MemoryError("no memory for the scratch buffers of selective attention")


def _parts(B: int, S: int) -> int:
    return max(1, min(PARTS // B, -(-S // BLOCK)))


@torch.library.custom_op("trialist::selective_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, protect: Tensor, penalty: Tensor,
    scaling: float, selector_head: int, tau: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    out, offsets, lse, memory = _empty_outputs(query, key, value, mask, protect, penalty, scaling, selector_head, tau)
    tensors = {
        "q": query.contiguous(), "k": key.contiguous(), "v": value.contiguous(), "mask": _rows(mask),
        "protect": protect.contiguous(), "penalty": penalty.contiguous(), "offsets": offsets, "out": out, "lse": lse,
        "memory": memory if tau > 0 else None,
        "kt": query.new_empty(B, G, -(-S // BLOCK), D, BLOCK),
    }  # fmt: skip
    _call("selective_forward", tensors, (B, H, G, T, S, D), scaling, selector_head, tau)
    return out, offsets, lse, memory


def _rows(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()


@_forward.register_fake
def _empty_outputs(query, key, value, mask, protect, penalty, scaling, selector_head, tau=0.0):  # type: ignore[no-untyped-def]
    (B, H, T, D), S = query.shape, key.shape[2]
    blocks = -(-T // BLOCK)
    shapes = (B, T, H, D), (B, blocks + 1, S), (B, H, T), (B, T if tau > 0 else 0)
    return tuple(query.new_empty(shape) for shape in shapes)


@torch.library.custom_op("trialist::selective_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, d_memory: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, protect: Tensor,
    out: Tensor, offsets: Tensor, lse: Tensor, scaling: float, selector_head: int, tau: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    packed = query.new_empty(2, B, G, -(-S // BLOCK), D, BLOCK)
    tensors = {
        "q": query, "k": key, "v": value, "mask": _rows(mask), "protect": protect.contiguous(), "offsets": offsets,
        "kt": packed[0], "vt": packed[1], "out": out, "lse": lse, "d_out": grad.transpose(1, 2).contiguous(),
        "delta": torch.empty_like(lse), "d_q_parts": query.new_empty(_parts(B, S), B, H, T, D),
        "d_q": gradients[0], "d_k": gradients[1], "d_v": gradients[2],
        "d_memory": d_memory.contiguous() if tau > 0 else None,
    }  # fmt: skip
    _call("selective_backward", tensors, (B, H, G, T, S, D), scaling, selector_head, tau)
    return gradients


@_backward.register_fake
def _empty_gradients(grad, d_memory, query, key, value, *_):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, mask, protect, _, ctx.scaling, ctx.selector_head, ctx.tau = inputs
    ctx.save_for_backward(query, key, value, mask, protect, *output[:3])


def _differentiate(ctx, grad: Tensor, _offsets, _lse, d_memory: Tensor):  # type: ignore[no-untyped-def]
    gradients = _backward(grad, d_memory, *ctx.saved_tensors, ctx.scaling, ctx.selector_head, ctx.tau)
    return (*gradients, None, None, None, None, None, None)


def _refuse(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError("selective attention is differentiable once; for second derivatives pass backend='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
