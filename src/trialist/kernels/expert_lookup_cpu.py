"""The C kernels of the expert lookup, on tensors; `expert_lookup.py` and `product_keys.py` pick the backend.

Work: a gathered row is read once per product, 4 d bytes (2 d in bfloat16) for 2 d operations, so the bound is the
latency and bandwidth of the memory that holds the tables; nothing of shape (N, J, d) is written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from trialist.kernels.compile import load_library

SOURCE = "expert_lookup.c"
DTYPES = (torch.float32, torch.bfloat16)
"""Of the tables; products are in float32"""

NO_MEMORY, NOT_A_NUMBER = 1, 3  # as in the source


class _Lookup(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tables", "starts", "ids", "x", "weights", "out")),
        *((name, ctypes.c_long) for name in ("N", "J", "d")),
        *((name, ctypes.c_int) for name in ("generations", "half", "threads")),
    ]


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels could be compiled here; the first call compiles them."""
    return load_library(SOURCE) is not None


def not_a_number() -> ValueError:
    return ValueError("the scores that choose the experts hold NaN: look for it in the layer's input, queries and keys")


def _error(code: int, total: int) -> Exception:
    if code == NO_MEMORY:
        return MemoryError("no memory for the scratch buffers of the expert lookup")
    return not_a_number() if code == NOT_A_NUMBER else IndexError(f"an expert id lies outside 0 to {total - 1}")


def _lookup(
    function: str, tables: Sequence[Tensor], ids: Tensor, x: Tensor | None, weights: Tensor | None, out: Tensor
) -> Tensor:
    tables, ids = [table.contiguous() for table in tables], ids.contiguous()
    starts = [0, *accumulate(table.shape[0] for table in tables)]
    addresses = (ctypes.c_void_p * len(tables))(*(table.data_ptr() for table in tables))
    firsts = (ctypes.c_int64 * len(starts))(*starts)
    problem = _Lookup(ctypes.addressof(addresses), ctypes.addressof(firsts), ids.data_ptr())
    problem.x, problem.weights = x.data_ptr() if x is not None else 0, weights.data_ptr() if weights is not None else 0
    problem.out, (problem.N, problem.J), problem.d = out.data_ptr(), ids.shape, tables[0].shape[1]
    problem.generations, problem.half = len(tables), tables[0].dtype == torch.bfloat16
    problem.threads = torch.get_num_threads()
    code = getattr(load_library(SOURCE), function)(ctypes.byref(problem))
    if code:
        raise _error(code, starts[-1])
    return out


def gather_dot(x: Tensor, tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    """`(N, J)` in float32."""
    return _lookup("gather_dot", tables, ids, x.float().contiguous(), None, x.new_empty(ids.shape, dtype=torch.float32))


def gather_sum(weights: Tensor, tables: Sequence[Tensor], ids: Tensor) -> Tensor:
    """`(N, d)` in float32."""
    out = weights.new_empty(ids.shape[0], tables[0].shape[1], dtype=torch.float32)
    return _lookup("gather_sum", tables, ids, None, weights.float().contiguous(), out)


def group_by_id(ids: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries sorted by id `(M,)`, the ids that occur, then `total` `(M,)`, and where the entries of each begin, then M
    `(M + 1,)`."""
    flat = ids.reshape(-1).contiguous()
    entries = flat.numel()
    order, rows, offsets = (
        torch.empty_like(flat),
        flat.new_full((entries,), total),
        flat.new_full((entries + 1,), entries),
    )
    group = load_library(SOURCE).group_by_id  # type: ignore[union-attr]
    group.restype = ctypes.c_long
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (order, rows, offsets))
    found = group(ctypes.c_void_p(flat.data_ptr()), ctypes.c_long(entries), ctypes.c_long(total), *pointers)
    if found < 0:
        raise _error(-found, total)
    return order, rows, offsets


def scatter_sum(
    weights: Tensor, x: Tensor, order: Tensor, offsets: Tensor, places: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """A float32 matrix whose row `places[g]` is the sum of weights[e] x[e / J] over the entries e of group g, else zero."""
    # from numpy, whose zeros are pages not touched yet: most of the time would else go to writing them twice
    out = torch.from_numpy(np.zeros(shape, np.float32))
    weights, x, offsets = weights.float().contiguous(), x.float().contiguous(), offsets.contiguous()
    pointers = [tensor.data_ptr() if tensor is not None else None for tensor in (weights, x, order, offsets, places)]
    sizes = (offsets.numel() - 1, weights.shape[1], x.shape[1])
    load_library(SOURCE).scatter_sum(  # type: ignore[union-attr]
        *map(ctypes.c_void_p, pointers), *map(ctypes.c_long, sizes), ctypes.c_void_p(out.data_ptr()),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def product_top_k(first: Tensor, second: Tensor, k: int) -> Tensor:
    """`(R, k, 2)` of scores `(R, n)`; ValueError where they hold NaN."""
    first, second = first.contiguous(), second.contiguous()
    pairs = torch.empty(*first.shape[:1], k, 2, dtype=torch.int64)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (first, second))
    sizes = (ctypes.c_long(size) for size in (*first.shape, k))
    code = load_library(SOURCE).product_top_k(  # type: ignore[union-attr]
        *pointers, *sizes, ctypes.c_void_p(pairs.data_ptr()), torch.get_num_threads()
    )
    if code:
        raise _error(code, 0)
    return pairs
