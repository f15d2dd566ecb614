"""Linear layers whose weights are nested codes: the b-bit code of a weight is the first b bits of its longest one.

    W[r, k] = table[r, code(r, k)]        y = x W^T + bias

Codes lie in bit-planes, plane 0 holding the highest bit, so that b bits a weight read b planes and nothing more. A table of
2^b values a row belongs to each b.

Work: the planes of b bits are N K b / 8 bytes and the table N 2^b numbers. The C kernel looks weights up in registers, at about
7 vector instructions for 32 of them, and is bound by these, not by memory. Without the kernel, and on other devices, the weights
are looked up into a matrix first.

Letters: N outputs, K inputs, P planes, W words of 64 bits in a row, M rows of x.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from trialist.kernels import nested_cpu
from trialist.kernels.nested_cpu import available, instructions

__all__ = ["BACKENDS", "available", "dequantize", "instructions", "nested_linear", "pack_planes", "unpack_codes"]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "c")
WORD = 64
MOST_BITS = 8
TABLES = (torch.float16, torch.bfloat16)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Bit-planes `(bits, N, W)` int64 of codes `(N, K)`: bit k % 64 of word k // 64 belongs to weight k; W = ceil(K / 64).

    Raises ValueError for codes that do not fit into `bits` bits, 1 to 8.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits is {bits}; wanted 1 to {MOST_BITS}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise ValueError(
            f"codes of {bits} bits lie in [0, {(1 << bits) - 1}]; given are {codes.min()} to {codes.max()}"
        )
    N, K = codes.shape
    words = nn.functional.pad(codes, (0, -K % WORD)).view(N, -1, WORD)
    places = torch.arange(WORD, device=codes.device)
    planes = [((words >> (bits - 1 - p)) & 1).long().bitwise_left_shift(places).sum(-1) for p in range(bits)]
    return torch.stack(planes)


def unpack_codes(planes: Tensor, K: int, bits: int | None = None) -> Tensor:
    """Codes `(N, K)` uint8 of the first `bits` planes of `(P, N, W)`; None takes all."""
    places = torch.arange(WORD, device=planes.device)
    codes = torch.zeros(planes.shape[1], K, dtype=torch.uint8, device=planes.device)
    for plane in planes[: len(planes) if bits is None else bits]:
        bit = ((plane[..., None] >> places) & 1).to(torch.uint8).flatten(1)[:, :K]  # (N, W, 64) -> (N, K)
        codes = codes << 1 | bit
    return codes


def dequantize(
    planes: Tensor, table: Tensor, K: int, dtype: torch.dtype = torch.float32, *, backend: str = "auto"
) -> Tensor:
    """The matrix `(N, K)` in `dtype`.

    planes: `(P, N, W)` int64. table: `(N, 2^b)` float16 or bfloat16; its width says how many planes are read.
    backend: "c" (CPU, to float32 or bfloat16), "reference", or "auto", which takes "c" where it can.
    """
    bits = bits_of(planes, table, K)
    fits = planes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if _chosen(backend, fits, "the CPU, to float32 or bfloat16") == "c":
        return nested_cpu.dequantize(planes, table, K, bits, dtype)
    return _look_up(planes, table, K, bits).to(dtype)


def nested_linear(
    x: Tensor,
    planes: Tensor,
    table: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    isa: str | None = None,
) -> Tensor:
    """`(..., N)` in the dtype of x. Differentiable in x and bias; the weights are fixed.

    x: `(..., K)`. planes, table: as for `dequantize`. bias: `(N,)`.
    backend: "c" (CPU; float32, bfloat16 or float16), "reference", or "auto", which takes "c" where it can and says so once. Up
    to 8 rows of x are multiplied with weights that are only ever in registers; of more, tiles of the matrix are looked up for
    dense products, in bfloat16 for bfloat16 and in float32 otherwise. bfloat16 is multiplied as such where the processor can.
    isa: the instructions of "c", one of `trialist.kernels.nested_cpu.ISAS`; None is the best that the processor has.
    Raises ValueError for shapes that do not fit.
    """
    bits_of(planes, table, x.shape[-1])
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if _chosen(backend, fits, "float32, bfloat16 and float16 on the CPU") == "reference":
        W = _look_up(planes, table, x.shape[-1], bits_of(planes, table, x.shape[-1]))
        return nn.functional.linear(x, W.to(x.dtype), bias)
    plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if plain and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        # as the operator would, without the 20 microseconds that its call takes
        return nested_cpu.run(x.detach(), planes, table, bias, isa)
    y = nested_cpu.nested_product(x.flatten(0, -2) if x.dim() != 2 else x, planes, table, isa or "")
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def bits_of(planes: Tensor, table: Tensor, K: int) -> int:
    """How many bits of the codes a table reads. Raises ValueError where planes, table and inputs do not belong together."""
    bits = table.shape[-1].bit_length() - 1
    fits = planes.dim() == 3 and table.shape == (planes.shape[1], 1 << bits) and 1 <= bits <= len(planes)
    if not fits or planes.shape[2] != -(-K // WORD) or planes.dtype != torch.int64 or table.dtype not in TABLES:
        raise ValueError(
            f"planes {planes.dtype} {tuple(planes.shape)} and a table {table.dtype} {tuple(table.shape)} do not fit {K} inputs: "
            f"wanted int64 (P, N, {-(-K // WORD)}) and float16 or bfloat16 (N, 2^b) with b of the P planes"
        )
    return bits


def _look_up(planes: Tensor, table: Tensor, K: int, bits: int) -> Tensor:
    return table.gather(1, unpack_codes(planes, K, bits).long())


def _chosen(backend: str, fits: bool, takes: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    able = fits and backend != "reference" and available()
    if backend == "c" and not able:
        raise ValueError(f"backend 'c' takes {takes}, and a C compiler; pass backend='auto'")
    if backend == "auto" and not torch.compiler.is_compiling():
        _say(able, fits)
    return "c" if able else "reference"


@functools.cache
def _say(able: bool, fits: bool) -> None:
    """Says once which backend was chosen for each kind of input."""
    if able:
        log.info("nested weights run through backend 'c' with %s", instructions())
    else:
        reason = "there is no C compiler" if fits else "the C kernel is for float32, bfloat16 and float16 on the CPU"
        log.info("nested weights run through backend 'reference', which builds the matrix at every call: %s", reason)
