"""The two products of the expert lookup and the gradient of their tables, on tensors that fit; `expert_lookup.py` checks them.

Letters as there: N tokens, J experts a token, d width; M = N J entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from trialist.kernels import expert_lookup_cpu as cpu


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


def groups_of(ids: Tensor, tables: Sequence[Tensor], backend: str, *, trained: Sequence[Tensor]) -> list[Tensor]:
    """What `_scatter` needs to know of ids; nothing where no table is trained."""
    if not (torch.is_grad_enabled() and any(table.requires_grad for table in trained)):
        return []
    return list(_group_by_id(ids, sum(table.shape[0] for table in tables), backend))


@torch.library.custom_op("trialist::group_by_id", mutates_args=())
def _group_by_id(ids: Tensor, total: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of M entries with ids below `total`: the entries sorted by id `(M,)`, the K ids that occur, ascending, then `total`
    `(M,)`, and where the entries of each begin and, from place K on, end `(M + 1,)`."""
    if backend == "c":
        return cpu.group_by_id(ids, total)
    ordered, order = ids.reshape(-1).sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    starts = begins.nonzero().squeeze(-1)  # (K,)
    rows, offsets = ordered.new_full(ordered.shape, total), ordered.new_full((ordered.numel() + 1,), ordered.numel())
    rows[: starts.numel()], offsets[: starts.numel()] = ordered[starts], starts
    return order, rows, offsets


@_group_by_id.register_fake
def _(ids, total, backend):  # type: ignore[no-untyped-def]
    entries = ids.numel()
    return ids.new_empty(entries), ids.new_empty(entries), ids.new_empty(entries + 1)


def _scatter(
    weights: Tensor,
    x: Tensor,
    tables: Sequence[Tensor],
    ids: Tensor,
    groups: Sequence[Tensor],
    needed: Sequence[bool],
    sparse: bool,
    backend: str,
) -> list[Tensor | None]:
    """Per generation the gradient of its table: row e is the sum of weights[n, j] x[n] over ids[n, j] = e."""
    starts = [0, *accumulate(table.shape[0] for table in tables)]
    order, rows, offsets = groups
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


# The dense gradients come from custom operators, which torch.compile takes as they are. Each is differentiated by the
# others. An operator may return no None, so a table that needs no gradient gets one without rows.


@torch.library.custom_op("trialist::gather_dot", mutates_args=())
def dense_dot(x: Tensor, tables: list[Tensor], ids: Tensor, groups: list[Tensor], backend: str) -> Tensor:
    return _dots(x, tables, ids, backend)


@dense_dot.register_fake
def _(x, tables, ids, groups, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(ids.shape, dtype=_wide(x))


@torch.library.custom_op("trialist::gather_sum", mutates_args=())
def dense_sum(weights: Tensor, tables: list[Tensor], ids: Tensor, groups: list[Tensor], backend: str) -> Tensor:
    return _sums(weights, tables, ids, backend)


@dense_sum.register_fake
def _(weights, tables, ids, groups, backend):  # type: ignore[no-untyped-def]
    return weights.new_empty(ids.shape[0], tables[0].shape[1], dtype=_wide(weights))


@torch.library.custom_op("trialist::scatter_to_tables", mutates_args=())
def _scatter_dense(
    weights: Tensor,
    x: Tensor,
    tables: list[Tensor],
    ids: Tensor,
    groups: list[Tensor],
    needed: list[bool],
    backend: str,
) -> list[Tensor]:
    found = _scatter(weights, x, tables, ids, groups, needed, False, backend)
    return [table.new_empty(0, table.shape[1]) if got is None else got for table, got in zip(tables, found)]


@_scatter_dense.register_fake
def _(weights, x, tables, ids, groups, needed, backend):  # type: ignore[no-untyped-def]
    return [table.new_empty(table.shape if wanted else (0, table.shape[1])) for table, wanted in zip(tables, needed)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    operand, tables, ids, groups, ctx.backend = inputs
    ctx.generations = len(tables)
    ctx.save_for_backward(operand, ids, *tables, *groups)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    operand, ids, *rest = ctx.saved_tensors
    return operand, ids, rest[: ctx.generations], rest[ctx.generations :]


def _table_gradients(
    ctx: Any, weights: Tensor, x: Tensor, tables: list[Tensor], ids: Tensor, groups: list[Tensor]
) -> list[Tensor | None]:
    needed = [bool(wanted) for wanted in ctx.needs_input_grad[1]]
    if not any(needed):
        return [None] * len(tables)
    found = _scatter_dense(weights, x, tables, ids, groups, needed, ctx.backend)
    return [gradient if wanted else None for gradient, wanted in zip(found, needed)]


def _differentiate_dot(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, ids, tables, groups = _saved(ctx)
    d_x = dense_sum(grad, tables, ids, groups, ctx.backend) if ctx.needs_input_grad[0] else None
    return d_x, _table_gradients(ctx, grad, x, tables, ids, groups), None, [None] * len(groups), None


def _differentiate_sum(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    weights, ids, tables, groups = _saved(ctx)
    d_weights = dense_dot(grad, tables, ids, groups, ctx.backend) if ctx.needs_input_grad[0] else None
    return d_weights, _table_gradients(ctx, weights, grad, tables, ids, groups), None, [None] * len(groups), None


def _save_scatter(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weights, x, tables, ids, groups, ctx.needed, ctx.backend = inputs
    ctx.shapes = [table.shape for table in tables]
    ctx.save_for_backward(weights, x, ids, *groups)


def _differentiate_scatter(ctx, grads: list[Tensor]):  # type: ignore[no-untyped-def]
    weights, x, ids, *groups = ctx.saved_tensors
    rows = [grad if wanted else grad.new_zeros(shape) for grad, wanted, shape in zip(grads, ctx.needed, ctx.shapes)]
    d_weights = dense_dot(x, rows, ids, groups, ctx.backend)
    d_x = dense_sum(weights, rows, ids, groups, ctx.backend)
    return d_weights, d_x, [None] * len(rows), None, [None] * len(groups), None, None


dense_dot.register_autograd(_differentiate_dot, setup_context=_save)
dense_sum.register_autograd(_differentiate_sum, setup_context=_save)
_scatter_dense.register_autograd(_differentiate_scatter, setup_context=_save_scatter)


class _SparseGather(torch.autograd.Function):
    """Either product with sparse gradients of its tables. Eager only: no operator returns sparse tensors to a compiler."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, name: str, operand: Tensor, ids: Tensor, backend: str, generations: int, *rest: Tensor
    ) -> Tensor:
        """rest: tables, then groups."""
        ctx.save_for_backward(operand, ids, *rest)
        ctx.name, ctx.backend, ctx.generations = name, backend, generations
        return (_dots if name == "dot" else _sums)(operand, rest[:generations], ids, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        operand, ids, tables, groups = _saved(ctx)
        dual = _sums if ctx.name == "dot" else _dots
        d_operand = dual(grad, tables, ids, ctx.backend) if ctx.needs_input_grad[1] else None
        weights, x = (grad, operand) if ctx.name == "dot" else (operand, grad)
        needed = ctx.needs_input_grad[5 : 5 + len(tables)]
        found: list[Tensor | None] = [None] * len(tables)
        if any(needed):
            found = _scatter(weights, x, tables, ids, groups, needed, True, ctx.backend)
        return None, d_operand, None, None, None, *found, *([None] * len(groups))


@torch.compiler.disable
def sparse_dot(x: Tensor, tables: list[Tensor], ids: Tensor, groups: list[Tensor], backend: str) -> Tensor:
    return _SparseGather.apply("dot", x, ids, backend, len(tables), *tables, *groups)


@torch.compiler.disable
def sparse_sum(weights: Tensor, tables: list[Tensor], ids: Tensor, groups: list[Tensor], backend: str) -> Tensor:
    return _SparseGather.apply("sum", weights, ids, backend, len(tables), *tables, *groups)
