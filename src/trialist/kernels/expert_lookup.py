"""The expert lookup of PEER (arXiv 2407.04153): a small MLP of rows that each token gathers from large tables.

    y[n] = sum over j of weights[n, j] act(down[id] . x[n]) (gate[id] . x[n]) up[id],   id = ids[n, j]

It is composed of two products that are each other's derivative, so that nothing of shape (N, J, d) is ever built:

    gather_dot(x, table, ids)[n, j]   = table[ids[n, j]] . x[n]
    gather_sum(w, table, ids)[n]      = sum over j of w[n, j] table[ids[n, j]]

and the gradient of the table, in both, is the sum over the entries of a row: `scatter`. It needs the entries sorted by
id, which is done once a lookup, for all its tables.

Letters: N tokens, J experts a token, d width, E experts. A table may be given in parts ("generations") whose rows
are numbered through; the lookup spans them without joining them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from trialist.kernels import expert_lookup_cpu as cpu
from trialist.kernels.expert_lookup_products import dense_dot, dense_sum, groups_of, sparse_dot, sparse_sum

log = logging.getLogger(__name__)

BACKENDS = ("auto", "einsum", "embedding_bag", "c")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": relu, "silu": silu}


def expert_lookup(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    gate: Sequence[Tensor] = (),
    *,
    activation: str = "gelu",
    sparse_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`(N, d)`, in the dtype of `x`: the weighted sum of the experts `ids` of each token.

    x: `(N, d)`; ids: int64 `(N, J)`, repeats allowed; weights: `(N, J)`.
    down, up, gate: tables `(E_g, d)`, one a generation, all of one dtype (float32, bfloat16 or float64) and on the device of
        `x`; without `gate` its factor is 1.
    sparse_grad: gradients of the tables are sparse COO tensors of the rows that were used, not dense `(E_g, d)`.
    backend: "einsum" gathers `(N, J, d)` and is the reference; "embedding_bag" and "c" do not; "auto" is "c" where it can.

    Sums are in float32 (float64 where an input is); "embedding_bag" rounds its operands to the dtype of the tables.
    Differentiable in x, weights and tables, any number of times (once with sparse gradients). Raises ValueError for shapes,
    dtypes and devices that do not fit and for a backend that cannot run, IndexError for ids outside the tables.
    """
    _check(x, ids, weights, down, up, gate, activation)
    backend = choose_backend(backend, x, down)
    if backend == "einsum" and sparse_grad:
        raise ValueError("backend 'einsum' makes dense gradients; pass backend='auto', or sparse_grad=False")
    act = ACTIVATIONS[activation]
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if backend == "einsum":
            return _reference(x, ids, weights, down, up, gate, act).to(dtype)
        wide = torch.float64 if torch.float64 in (dtype, down[0].dtype) else torch.float32
        x, weights = x.to(wide), weights.to(wide)
        dot, total = (sparse_dot, sparse_sum) if sparse_grad else (dense_dot, dense_sum)
        groups = groups_of(ids, down, backend, trained=[*down, *up, *gate])
        hidden = act(dot(x, list(down), ids, groups, backend))  # (N, J)
        if gate:
            hidden = hidden * dot(x, list(gate), ids, groups, backend)
        return total(weights * hidden, list(up), ids, groups, backend).to(dtype)


def gather_dot(
    x: Tensor, tables: Sequence[Tensor], ids: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """`(N, J)`: the product of x[n] `(N, d)` with each of the rows ids[n] `(N, J)`, in the dtype of `x`, at least float32.

    Tables, gradients and errors as in `expert_lookup`.
    """
    if x.dim() != 2 or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and ids {tuple(ids.shape)} do not fit: wanted (N, d) and (N, J)")
    _check_tables({"tables": tables}, ids, x, x.shape[1])
    return _run(sparse_dot if sparse_grad else dense_dot, x, tables, ids, backend)


def gather_sum(
    weights: Tensor, tables: Sequence[Tensor], ids: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """`(N, d)`: the sum of the rows ids[n] `(N, J)` by weights[n] `(N, J)`, in the dtype of `weights`, at least float32.

    Tables, gradients and errors as in `expert_lookup`.
    """
    if ids.dim() != 2 or weights.shape != ids.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} and ids {tuple(ids.shape)} do not fit: wanted (N, J) for both"
        )
    _check_tables({"tables": tables}, ids, weights, tables[0].shape[-1] if tables else 0)
    return _run(sparse_sum if sparse_grad else dense_sum, weights, tables, ids, backend)


def _run(product: Any, operand: Tensor, tables: Sequence[Tensor], ids: Tensor, backend: str) -> Tensor:
    backend = choose_backend(backend, operand, tables)
    if backend == "einsum":
        raise ValueError("backend 'einsum' gathers for the whole lookup at once; call expert_lookup with it")
    return product(operand, list(tables), ids, groups_of(ids, tables, backend, trained=tables), backend)


def choose_backend(backend: str, x: Tensor, tables: Sequence[Tensor]) -> str:
    """The backend that runs; ValueError where the one asked for is unknown or cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    obstacle = (
        f"runs on the CPU, not on {x.device}" if x.device.type != "cpu"
        else f"computes in float32, not {x.dtype}" if x.dtype == torch.float64
        else f"reads tables of float32 or bfloat16, not {tables[0].dtype}" if tables[0].dtype not in cpu.DTYPES
        else "could not be compiled here" if not cpu.available()
        else None
    )  # fmt: skip
    if backend == "c" and obstacle:
        raise ValueError(f"backend 'c' {obstacle}; pass backend='auto'")
    if backend != "auto":
        return backend
    chosen = "embedding_bag" if obstacle else "c"
    if not torch.compiler.is_compiling():
        _say(chosen, str(x.device.type))
    return chosen


@functools.cache
def _say(backend: str, device: str) -> None:
    log.info("expert lookup on %s runs through backend %r", device, backend)


def _check(x, ids, weights, down, up, gate, activation) -> None:  # type: ignore[no-untyped-def]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or ids.dim() != 2 or ids.shape[0] != x.shape[0] or weights.shape != ids.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, ids {tuple(ids.shape)} and weights {tuple(weights.shape)} do not fit: wanted (N, d), "
            "(N, J) and (N, J)"
        )
    if weights.device != x.device:
        raise ValueError(f"weights are on {weights.device}, x on {x.device}; move them to one device")
    _check_tables({"down": down, "up": up, **({"gate": gate} if gate else {})}, ids, x, x.shape[1])


def _check_tables(lists: Mapping[str, Sequence[Tensor]], ids: Tensor, operand: Tensor, width: int) -> None:
    """The kernels take addresses: what they read must be what they are told, here or nowhere."""
    if ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype}, wanted torch.int64")
    if ids.device != operand.device:
        raise ValueError(f"ids are on {ids.device}, the operand on {operand.device}; move them to one device")
    shapes = [[tuple(table.shape) for table in tables] for tables in lists.values()]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes) or any(s[1:] != (width,) for s in shapes[0]):
        raise ValueError(
            f"tables of shapes {shapes} do not fit: wanted equal lists of (experts, {width}) in {', '.join(lists)}"
        )
    kind = next(iter(lists.values()))[0].dtype
    for name, tables in lists.items():
        for generation, table in enumerate(tables):
            if table.dtype != kind or table.device != operand.device:
                raise ValueError(
                    f"generation {generation} of {name} is {table.dtype} on {table.device}, wanted {kind} as the first table "
                    f"and {operand.device} as the operand; give all tables one dtype and device"
                )


def _reference(
    x: Tensor, ids: Tensor, weights: Tensor, down: Sequence[Tensor], up: Sequence[Tensor], gate: Sequence[Tensor],
    act: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The formula in the open: autograd differentiates it, and builds (N, J, d) for each table."""
    wide = torch.float64 if torch.float64 in (x.dtype, down[0].dtype) else torch.float32
    rows = [torch.cat(list(tables))[ids].to(wide) for tables in (down, up, gate) if tables]  # (N, J, d) each
    x = x.to(wide)
    hidden = act(torch.einsum("njd,nd->nj", rows[0], x))
    if gate:
        hidden = hidden * torch.einsum("njd,nd->nj", rows[2], x)
    return torch.einsum("nj,njd->nd", weights.to(wide) * hidden, rows[1])
