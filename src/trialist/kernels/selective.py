"""Selective attention (arXiv 2410.02703): one head's positive logits hide tokens from all later queries.

    l[h]      = scaling * q[h] k[h]^T (+ additive mask)             logits, h = 1..H
    S[i, j]   = relu(l[sel][i, j]) for allowed j < i, 0 where protected
    F[i, j]   = penalty[j] + sum over m < i of S[m, j]              exclusive: a query does not see its own selection
    out[h]    = softmax(l[h] - F) v[h]
    M[i]      = sum over allowed j <= i of 1 - min(F[i, j], tau) / tau                about how many tokens i still sees

Letters: B batch, H query heads, G key/value heads, T queries, S columns (S >= T, queries are the last T), D head width.
"""

from __future__ import annotations

import functools
import logging
import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trialist.kernels import selective_cpu

log = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "c")
SHORT = 16  # fewer queries than this (decoding) go to PyTorch when backend is "auto"


def selective_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    selector_head: int = 0,
    protect: Tensor | None = None,
    penalty: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    tau: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Attention output `(B, T, H, D)` in the dtype of `query`, and the penalty F `(B, S)` that the next query would meet;
    with `tau`, as third the memory M `(B, T)`.

    query: `(B, H, T, D)`; key, value: `(B, G, S, D)` with H a multiple of G.
    attention_mask: bool (True may attend) or additive float, broadcastable to `(B, H, T, S)`; None is causal. An additive
        entry below half the lowest number of its dtype counts as excluded. A query with nothing to attend to gives zeros
        and selects nothing. Selections are always restricted to columns before the query's own.
    selector_head: the query head whose logits select; its key/value head is the one of its group.
    protect: bool `(B, S)`, True where a column is never hidden (the first real token of a row); None is column 0.
    penalty: `(B, S)`, what earlier calls returned, zero-extended to S; None is zero. No gradient flows into or out of it.
    dropout: probability of dropping an attention weight while `training`.
    tau: penalty from which on a token counts as forgotten in M, above 0; None computes no M.

    F is accumulated in float32 (float64 for float64 inputs). Differentiable once in query, key and value, also through F
    and M.
    Raises ValueError for shapes that do not fit.
    """
    B, S = query.shape[0], key.shape[2]
    _check(query, key, value, attention_mask, selector_head, protect, penalty, dropout, backend)
    if tau is not None and tau <= 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if protect is None:
        protect = torch.zeros(1, S, dtype=torch.bool, device=query.device)
        protect[:, 0] = True
    protect = protect.expand(B, S)
    penalty = query.new_zeros(B, S, dtype=wide) if penalty is None else penalty.detach().to(wide)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    rate = dropout if training else 0.0
    backend = _choose(backend, query, attention_mask, rate)
    arguments = (query, key, value, attention_mask, protect, penalty, scaling, selector_head, tau or 0.0, rate)
    with torch.autocast(query.device.type, enabled=False):
        if backend == "reference":
            results = _reference(*arguments)
        elif backend == "c":
            results = selective_cpu.selective_attention_cpu(*arguments[:-1])
        else:
            results = _SelectiveAttention.apply(*arguments)
        return results if tau is not None else results[:2]


def _choose(backend: str, query: Tensor, mask: Tensor | None, rate: float) -> str:
    """The backend that runs; ValueError where the one asked for cannot."""
    learned = mask is not None and mask.requires_grad
    obstacle = (
        f"runs on the CPU, not on {query.device}" if query.device.type != "cpu"
        else f"computes in float32, not {query.dtype}" if query.dtype == torch.float64
        else "has no dropout" if rate > 0
        else "takes one mask for all heads" if mask is not None and mask.shape[1] > 1
        else "gives attention_mask no gradient" if learned
        else "could not be compiled here" if not selective_cpu.available()
        else None
    )  # fmt: skip
    if backend == "c" and obstacle:
        raise ValueError(f"backend 'c' {obstacle}; pass backend='auto'")
    if backend == "torch" and learned:
        raise ValueError("backend 'torch' gives attention_mask no gradient; pass backend='reference' or mask.detach()")
    if backend != "auto":
        return backend
    short = query.shape[2] < SHORT  # packing the keys would cost more than the products
    chosen = "reference" if learned else "c" if obstacle is None and not short else "torch"
    if not torch.compiler.is_compiling() and not short:
        _say(chosen, str(query.device.type))
    return chosen


@functools.cache
def _say(backend: str, device: str) -> None:
    log.info("selective attention on %s runs through backend %r", device, backend)


def _check(query, key, value, mask, selector_head, protect, penalty, dropout, backend) -> None:  # type: ignore[no-untyped-def]
    B, H, T, D = query.shape
    G, S = key.shape[1], key.shape[2]
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if key.shape != value.shape[:3] + (D,) or key.shape[0] != B or value.shape[0] != B or H % G:
        raise ValueError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} do not fit query {tuple(query.shape)}: wanted (B, G, S, D) "
            "with the query's B and D, and a number of heads G that divides the query's heads"
        )
    if S < T:
        raise ValueError(
            f"key has {S} columns for {T} queries; the queries must be the last columns, so pass at least {T}"
        )
    if not 0 <= selector_head < H:
        raise ValueError(f"selector_head {selector_head} is not among the {H} query heads (0 to {H - 1})")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, wanted a probability in [0, 1)")
    if mask is not None:
        if mask.dim() != 4 or any(m not in (1, n) for m, n in zip(mask.shape, (B, H, T, S))):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, wanted one that broadcasts to {(B, H, T, S)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"attention_mask is {mask.dtype}, wanted bool (True may attend) or an additive float mask")
    for name, tensor in (("protect", protect), ("penalty", penalty)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[0] not in (1, B) or tensor.shape[1] != S):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted (B, S) = {(B, S)}")
    if protect is not None and protect.dtype != torch.bool:
        raise ValueError(f"protect is {protect.dtype}, wanted bool (True is never hidden)")


def _allowed(mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """Where a query may attend, bool, broadcastable to (B, H, T, S)."""
    if mask is None:
        return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _before(x: Tensor, reverse: bool = False) -> Tensor:
    """Exclusive prefix sum over the queries, or suffix sum: row i is the sum of the rows before (after) it. (B, T, S)

    In blocks of about sqrt(T) rows: PyTorch's cumsum over a middle dimension is slow on CPU and not deterministic on CUDA.
    """
    B, T, S = x.shape
    if torch.compiler.is_compiling() or (x.is_cuda and not torch.are_deterministic_algorithms_enabled()):
        sums = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
        zero = torch.zeros_like(x[:, :1])
        return torch.cat([sums[:, 1:], zero], 1) if reverse else torch.cat([zero, sums[:, :-1]], 1)
    n = math.isqrt(T - 1) + 1
    blocks = -(-T // n)
    x = torch.nn.functional.pad(x, (0, 0, 0, blocks * n - T)).view(B, blocks, n, S)
    sums = torch.empty_like(x)
    rows = range(n)[::-1] if reverse else range(n)
    sums[:, :, rows[0]] = 0.0
    for last, row in pairwise(rows):
        torch.add(sums[:, :, last], x[:, :, last], out=sums[:, :, row])
    totals = sums[:, :, rows[-1]] + x[:, :, rows[-1]]  # (B, blocks, S)
    for last, block in pairwise(range(blocks)[::-1] if reverse else range(blocks)):
        sums[:, block] += totals[:, last, None]
        totals[:, block] += totals[:, last]
    return sums.view(B, blocks * n, S)[:, :T]


def _reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, protect: Tensor, penalty: Tensor,
    scaling: float, selector_head: int, tau: float, rate: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The algorithm in the open: autograd differentiates it, every intermediate has shape (B, H, T, S)."""
    H, T, G, S = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    q, k, v = (x.to(penalty.dtype) for x in (query, key, value))
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)

    allowed = _allowed(mask, T, S, query.device)
    logits = q @ k.transpose(-1, -2) * scaling  # (B, H, T, S)
    if mask is not None and mask.dtype != torch.bool:
        logits = logits + mask.to(logits.dtype).masked_fill(~allowed, 0.0)

    selectable = allowed.expand(-1, H, -1, -1)[:, selector_head].tril(S - T - 1) & ~protect[:, None]  # (B, T, S)
    selections = logits[:, selector_head].relu().masked_fill(~selectable, 0.0)
    inclusive = selections.cumsum(1)
    F = penalty[:, None] + torch.cat([torch.zeros_like(inclusive[:, :1]), inclusive[:, :-1]], 1)

    weights = (logits - F[:, None]).masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
    weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # nothing to attend to: zeros, no gradient
    output = torch.dropout(weights, rate, rate > 0) @ v
    memory = None
    if tau > 0:
        looks_at = allowed.expand(-1, H, -1, -1)[:, selector_head].tril(S - T)
        memory = (1 - F / tau).relu().masked_fill(~looks_at, 0.0).sum(-1)  # (B, T)
    return output.transpose(1, 2).contiguous().to(query.dtype), (penalty + inclusive[:, -1]).detach(), memory


class _SelectiveAttention(torch.autograd.Function):
    """The same in place: one (B, H, T, S) buffer of weights is kept, and the gate of the selector's relu.

    With P the weights, dP their gradient and delta = sum_j P dP:  dl = P (dP - delta),  dF = -sum_h dl,
    dS = exclusive sum of dF over later queries, and dl[sel] += dS where S > 0. M adds -dM / tau to dF where F < tau.
    """

    @staticmethod
    def forward(  # type: ignore[override, no-untyped-def]
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, protect: Tensor, penalty: Tensor,
        scaling: float, selector_head: int, tau: float, rate: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
        lowest = torch.finfo(penalty.dtype).min
        grouped = query.reshape(B, G, H // G * T, D)  # heads of a group share keys: no repeated copy of them
        logits = (grouped.mul(scaling) @ key.transpose(-1, -2)).view(B, H, T, S).to(penalty.dtype)
        allowed = _allowed(mask, T, S, query.device)  # (B | 1, H | 1, T, S)
        per_head = allowed.shape[1] > 1
        additive = mask.to(logits.dtype) if mask is not None and mask.dtype != torch.bool else None
        if additive is not None and per_head:
            logits.add_(additive.clamp(min=lowest / 2))
            additive = None

        selections = logits[:, selector_head].clone()
        if additive is not None:
            selections.add_(additive[:, 0].clamp(min=lowest / 2))
        selectable = allowed[:, selector_head if per_head else 0].tril(S - T - 1) & ~protect[:, None]
        selections.relu_().mul_(selectable)
        bias = _before(selections).add_(penalty[:, None])  # F, then what is added to the logits of all heads
        new_penalty = bias[:, -1] + selections[:, -1]
        memory = living = None
        if tau > 0:
            looks_at = allowed[:, selector_head if per_head else 0].tril(S - T)
            remaining = (1 - bias / tau).relu_().mul_(looks_at)  # (B, T, S)
            memory, living = remaining.sum(-1), remaining > 0
        bias.neg_()
        if additive is not None:
            bias.add_(additive[:, 0].clamp(min=lowest / 2))
        if per_head:
            logits.add_(bias[:, None]).masked_fill_(~allowed, lowest)
        else:
            logits.add_(bias.masked_fill_(~allowed[:, 0], lowest)[:, None])
        cut = logits.dtype == torch.float32 and not logits.is_cuda
        if cut:  # hidden tokens would get weights of 1e-40, and such denormals slow every later product tenfold on CPU
            torch.maximum(logits, logits.amax(-1, keepdim=True) - 69.0, out=logits)
        weights = torch.softmax(logits, -1)
        del logits
        if cut:
            torch.threshold_(weights, 1.1e-30, 0.0)  # e^-69
        weights = weights.to(query.dtype)
        kept = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - rate) if rate > 0 else None
        dropped = weights if kept is None else weights * kept / (1 - rate)

        output = (dropped.view(B, G, H // G * T, S) @ value).view(B, H, T, D).transpose(1, 2)
        attends = None if mask is None else allowed.any(-1).transpose(1, 2)[..., None]  # (B | 1, T, H | 1, 1)
        output = output.contiguous() if attends is None else output * attends
        ctx.save_for_backward(query, key, value, output, weights, selections > 0, attends, kept, living)
        ctx.scaling, ctx.selector_head, ctx.tau, ctx.rate = scaling, selector_head, tau, rate
        ctx.mark_non_differentiable(new_penalty)
        return output, new_penalty, memory

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor | None, d_memory: Tensor | None):  # type: ignore[no-untyped-def, override]
        query, key, value, output, weights, gate, attends, kept, living = ctx.saved_tensors
        (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        group = (B, G, H // G * T)
        if attends is not None:
            grad = grad * attends
        delta = (grad.to(wide) * output).sum(-1).transpose(1, 2)[..., None]  # (B, H, T, 1)
        grad = grad.transpose(1, 2).reshape(*group, D)

        dropped = weights if kept is None else weights * kept / (1 - ctx.rate)
        d_value = dropped.view(*group, S).transpose(-1, -2) @ grad
        d_logits = (grad @ value.transpose(-1, -2)).view(B, H, T, S).to(wide)
        if kept is not None:
            d_logits.mul_(kept).div_(1 - ctx.rate)
        d_logits.sub_(delta).mul_(weights)
        d_penalty = d_logits.sum(1).neg_()  # dF, (B, T, S)
        if living is not None and d_memory is not None:
            d_penalty.sub_(living * (d_memory[..., None] / ctx.tau))
        later = _before(d_penalty, reverse=True)  # dS
        d_logits[:, ctx.selector_head].add_(later.mul_(gate))
        d_logits = d_logits.to(query.dtype).view(*group, S)
        d_query = (d_logits @ key).view(B, H, T, D).mul_(ctx.scaling)
        d_key = d_logits.transpose(-1, -2) @ query.reshape(*group, D).mul(ctx.scaling)
        return d_query, d_key, d_value, None, None, None, None, None, None, None
