"""The expert lookup of PEER (arXiv 2407.04153): a small MLP of rows that each token gathers from large tables.

    y[n] = sum over j of weights[n, j] act(down[id] . x[n]) (gate[id] . x[n]) up[id],   id = ids[n, j]

It is composed of two products that are each other's derivative, so that nothing of shape (N, J, d) is ever built:

    gather_dot(x, table, ids)[n, j]   = table[ids[n, j]] . x[n]
    gather_sum(w, table, ids)[n]      = sum over j of w[n, j] table[ids[n, j]]

and the gradient of the table, in both, is the sum over the entries of a row: `scatter`, of the entries sorted by id.

Letters: N tokens, J experts a token, d width, E experts. A table may be given in parts ("generations") whose rows
are numbered through; the lookup spans them without joining them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, gelu, relu, silu

from trialist.kernels import expert_lookup_cpu as cpu

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
    down, up, gate: tables `(E_g, d)` of float32, bfloat16 or float64, one a generation; without `gate` its factor is 1.
    sparse_grad: gradients of the tables are sparse COO tensors of the rows that were used, not dense `(E_g, d)`.
    backend: "einsum" gathers `(N, J, d)` and is the reference; "embedding_bag" and "c" do not; "auto" is "c" where it can.

    Sums are in float32 (float64 where an input is); "embedding_bag" rounds its operands to the dtype of the tables.
    Differentiable in x, weights and tables. Raises ValueError for shapes that do not fit and for a backend that cannot run,
    IndexError for ids outside the tables.
    """
    _check(x, ids, weights, down, up, gate, activation)
    backend = choose_backend(backend, x, down)
    act = ACTIVATIONS[activation]
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        if backend == "einsum":
            return _reference(x, ids, weights, down, up, gate, act).to(dtype)
        wide = torch.float64 if torch.float64 in (dtype, down[0].dtype) else torch.float32
        x, weights = x.to(wide), weights.to(wide)
        hidden = act(gather_dot(x, down, ids, sparse_grad=sparse_grad, backend=backend))  # (N, J)
        if gate:
            hidden = hidden * gather_dot(x, gate, ids, sparse_grad=sparse_grad, backend=backend)
        return gather_sum(weights * hidden, up, ids, sparse_grad=sparse_grad, backend=backend).to(dtype)


def gather_dot(
    x: Tensor, tables: Sequence[Tensor], ids: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """`(N, J)`: the product of x[n] `(N, d)` with each of the rows ids[n] `(N, J)`, in the dtype of `x`, at least float32."""
    return _run(_gather_dot, _gather_dot_sparse, x, tables, ids, sparse_grad, backend)


def gather_sum(
    weights: Tensor, tables: Sequence[Tensor], ids: Tensor, *, sparse_grad: bool = False, backend: str = "auto"
) -> Tensor:
    """`(N, d)`: the sum of the rows ids[n] `(N, J)` by weights[n] `(N, J)`, in the dtype of `weights`, at least float32."""
    return _run(_gather_sum, _gather_sum_sparse, weights, tables, ids, sparse_grad, backend)


def _run(
    dense: Any, sparse: Any, operand: Tensor, tables: Sequence[Tensor], ids: Tensor, sparse_grad: bool, backend: str
) -> Tensor:
    backend = choose_backend(backend, operand, tables)
    if backend == "einsum":
        raise ValueError("backend 'einsum' gathers for the whole lookup at once; call expert_lookup with it")
    return (sparse if sparse_grad else dense)(operand, list(tables), ids, backend)


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
    if ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype}, wanted torch.int64")
    shapes = [[tuple(table.shape) for table in tables] for tables in (down, up, *([gate] if gate else []))]
    if not down or any(shape != shapes[0] for shape in shapes) or any(s[1:] != x.shape[1:] for s in shapes[0]):
        raise ValueError(
            f"tables of shapes {shapes} do not fit x {tuple(x.shape)}: wanted equal lists of (experts, {x.shape[1]}) in "
            "down, up and gate"
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


def _parts(tables: Sequence[Tensor], ids: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Per generation with entries: its index, the places of its entries, their tokens and their ids within the table."""
    flat = ids.reshape(-1)
    tokens = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
    starts = [0, *accumulate(table.shape[0] for table in tables)]
    if flat.numel() and not ids.is_cuda and not 0 <= int(flat.min()) <= int(flat.max()) < starts[-1]:
        raise IndexError(f"an expert id lies outside 0 to {starts[-1] - 1}")
    if len(tables) == 1:
        return [(0, torch.arange(flat.numel(), device=ids.device), tokens, flat)]
    found = []
    for generation, (start, end) in enumerate(pairwise(starts)):
        places = ((flat >= start) & (flat < end)).nonzero().squeeze(-1)
        found.append((generation, places, tokens[places], flat[places] - start))
    return found


def _bags(tokens: Tensor, count: int) -> Tensor:
    """Where the entries of each of `count` tokens begin, in an ascending list of tokens."""
    return torch.searchsorted(tokens, torch.arange(count, device=tokens.device))


def _dots(x: Tensor, tables: Sequence[Tensor], ids: Tensor, backend: str) -> Tensor:
    if backend == "c":
        return cpu.gather_dot(x, tables, ids)
    out = x.new_zeros(ids.numel(), dtype=_wide(x))
    for generation, places, tokens, local in _parts(tables, ids):
        table = tables[generation]
        # the derivative of embedding_bag by its weights is what is wanted here, and has an operator of its own
        out[places] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x.to(table.dtype).contiguous(), table, local, _bags(tokens, ids.shape[0]), tokens, 0
        ).to(out.dtype)
    return out.view(ids.shape)


def _sums(weights: Tensor, tables: Sequence[Tensor], ids: Tensor, backend: str) -> Tensor:
    if backend == "c":
        return cpu.gather_sum(weights, tables, ids)
    out = weights.new_zeros(ids.shape[0], tables[0].shape[1], dtype=_wide(weights))
    for generation, places, tokens, local in _parts(tables, ids):
        table, bags = tables[generation], _bags(tokens, ids.shape[0])
        chosen = weights.reshape(-1)[places].to(table.dtype)
        out += embedding_bag(local, table, bags, mode="sum", per_sample_weights=chosen).to(out.dtype)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(ids: Tensor, total: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Entries sorted by id, ids that occur, and where the entries of each begin and end."""
    if backend == "c":
        return cpu.group_by_id(ids, total)
    ordered, order = ids.reshape(-1).sort(stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    return order, rows, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _scatter(
    weights: Tensor,
    x: Tensor,
    tables: Sequence[Tensor],
    ids: Tensor,
    needed: Sequence[bool],
    sparse: bool,
    backend: str,
) -> list[Tensor | None]:
    """Per generation the gradient of its table: row e is the sum of weights[n, j] x[n] over ids[n, j] = e."""
    starts = [0, *accumulate(table.shape[0] for table in tables)]
    order, rows, offsets = _grouped(ids, starts[-1], backend)
    edges = torch.searchsorted(rows, torch.tensor(starts, device=rows.device)).tolist()
    gradients: list[Tensor | None] = []
    for table, start, (first, last), wanted in zip(tables, starts, pairwise(edges), needed):
        if not wanted:
            gradients.append(None)
            continue
        places, bounds = rows[first:last] - start, offsets[first : last + 1]  # (K,), (K + 1,)
        shape = (last - first if sparse else table.shape[0], table.shape[1])
        if backend == "c":
            out = cpu.scatter_sum(weights, x, order, bounds, None if sparse else places, shape)
        else:
            out = x.new_zeros(shape, dtype=_wide(x))
        if backend != "c" and last > first:
            entries = order[offsets[first] : offsets[last]]
            bags, scale = bounds[:-1] - bounds[0], weights.reshape(-1)[entries].to(x.dtype)
            sums = embedding_bag(entries // ids.shape[1], x, bags, mode="sum", per_sample_weights=scale)
            out = sums.to(out.dtype) if sparse else out.index_copy_(0, places, sums.to(out.dtype))
        out = out.to(table.dtype)
        if sparse:
            out = torch.sparse_coo_tensor(places[None], out, table.shape, is_coalesced=True, check_invariants=False)
        gradients.append(out)
    return gradients


# The dense gradients come from custom operators, which torch.compile takes as they are. An operator may return no None,
# so a table that needs no gradient gets one without rows.


@torch.library.custom_op("trialist::gather_dot", mutates_args=())
def _gather_dot(x: Tensor, tables: list[Tensor], ids: Tensor, backend: str) -> Tensor:
    return _dots(x, tables, ids, backend)


@_gather_dot.register_fake
def _(x, tables, ids, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(ids.shape, dtype=_wide(x))


@torch.library.custom_op("trialist::gather_sum", mutates_args=())
def _gather_sum(weights: Tensor, tables: list[Tensor], ids: Tensor, backend: str) -> Tensor:
    return _sums(weights, tables, ids, backend)


@_gather_sum.register_fake
def _(weights, tables, ids, backend):  # type: ignore[no-untyped-def]
    return weights.new_empty(ids.shape[0], tables[0].shape[1], dtype=_wide(weights))


@torch.library.custom_op("trialist::scatter_to_tables", mutates_args=())
def _scatter_dense(
    weights: Tensor, x: Tensor, tables: list[Tensor], ids: Tensor, needed: list[bool], backend: str
) -> list[Tensor]:
    found = _scatter(weights, x, tables, ids, needed, False, backend)
    return [table.new_empty(0, table.shape[1]) if got is None else got for table, got in zip(tables, found)]


@_scatter_dense.register_fake
def _(weights, x, tables, ids, needed, backend):  # type: ignore[no-untyped-def]
    return [table.new_empty(table.shape if wanted else (0, table.shape[1])) for table, wanted in zip(tables, needed)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    operand, tables, ids, ctx.backend = inputs
    ctx.save_for_backward(operand, ids, *tables)


def _table_gradients(ctx: Any, weights: Tensor, x: Tensor, tables: list[Tensor], ids: Tensor) -> list[Tensor | None]:
    needed = [bool(wanted) for wanted in ctx.needs_input_grad[1]]
    if not any(needed):
        return [None] * len(tables)
    found = _scatter_dense(weights, x, tables, ids, needed, ctx.backend)
    return [gradient if wanted else None for gradient, wanted in zip(found, needed)]


def _differentiate_dot(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, ids, *tables = ctx.saved_tensors
    d_x = _gather_sum(grad, tables, ids, ctx.backend) if ctx.needs_input_grad[0] else None
    return d_x, _table_gradients(ctx, grad, x, tables, ids), None, None


def _differentiate_sum(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    weights, ids, *tables = ctx.saved_tensors
    d_weights = _gather_dot(grad, tables, ids, ctx.backend) if ctx.needs_input_grad[0] else None
    return d_weights, _table_gradients(ctx, weights, grad, tables, ids), None, None


_gather_dot.register_autograd(_differentiate_dot, setup_context=_save)
_gather_sum.register_autograd(_differentiate_sum, setup_context=_save)


class _SparseGather(torch.autograd.Function):
    """Either product with sparse gradients of its tables. Eager only: no operator returns sparse tensors to a compiler."""

    @staticmethod
    def forward(ctx: Any, name: str, operand: Tensor, ids: Tensor, backend: str, *tables: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(operand, ids, *tables)
        ctx.name, ctx.backend = name, backend
        return (_dots if name == "dot" else _sums)(operand, tables, ids, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        operand, ids, *tables = ctx.saved_tensors
        dual = _sums if ctx.name == "dot" else _dots
        d_operand = dual(grad, tables, ids, ctx.backend) if ctx.needs_input_grad[1] else None
        weights, x = (grad, operand) if ctx.name == "dot" else (operand, grad)
        needed = ctx.needs_input_grad[4:]
        return None, d_operand, None, None, *_scatter(weights, x, tables, ids, needed, True, ctx.backend)


@torch.compiler.disable
def _gather_dot_sparse(x: Tensor, tables: list[Tensor], ids: Tensor, backend: str) -> Tensor:
    return _SparseGather.apply("dot", x, ids, backend, *tables)


@torch.compiler.disable
def _gather_sum_sparse(weights: Tensor, tables: list[Tensor], ids: Tensor, backend: str) -> Tensor:
    return _SparseGather.apply("sum", weights, ids, backend, *tables)
