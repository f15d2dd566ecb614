"""Normalisation of retrieval queries over the batch, blind to padding."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import initialization as init

QUERY_NORMS = ("batchnorm", "sync_batchnorm", "layernorm", "none")


def build_query_norm(kind: str, heads: int, width: int) -> QueryNorm:
    norms = {
        "batchnorm": QueryBatchNorm,
        "sync_batchnorm": QuerySyncBatchNorm,
        "layernorm": QueryLayerNorm,
        "none": QueryNorm,
    }
    return norms[kind](heads, width)


class QueryNorm(nn.Module):
    """Leaves queries `(N, heads * width)` as they are."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width

    def forward(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        return queries


class QueryLayerNorm(QueryNorm):
    """Each query to mean 0 and variance 1, with a scale and a shift of its head: no token depends on another."""

    def __init__(self, heads: int, width: int, eps: float = 1e-5) -> None:
        super().__init__(heads, width)
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(heads * width)), nn.Parameter(torch.zeros(heads * width))

    def draw_initial_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = nn.functional.layer_norm(queries.view(-1, self.heads, self.width), (self.width,), eps=self.eps)
        return normed.flatten(1) * self.weight.to(queries.dtype) + self.bias.to(queries.dtype)


class QueryBatchNorm(QueryNorm):
    """Each query feature to mean 0 and variance 1 over the tokens that are not padding, in training; by running
    statistics in evaluation, for a batch of fewer than two tokens, and where scale and shift are not trained: what is
    frozen, as the base of an adapter, must stay what it was saved as, and statistics are a part of it.

    Under gradient accumulation and data parallelism each micro-batch has statistics of its own.
    """

    across_ranks = False
    """Whether every rank must run every pass in training mode"""
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, heads: int, width: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(heads, width)
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(heads * width)), nn.Parameter(torch.zeros(heads * width))
        self.register_buffer("running_mean", torch.zeros(heads * width))
        self.register_buffer("running_var", torch.ones(heads * width))

    def draw_initial_weights(self) -> None:
        for ones in (self.weight, self.running_var):
            init.ones_(ones)
        for zeros in (self.bias, self.running_mean):
            init.zeros_(zeros)

    def forward(self, queries: Tensor, mask: Tensor | None = None) -> Tensor:
        """queries `(N, heads * width)`, mask bool `(N,)`, False at padding; padding is normalised too, but not counted."""
        kind = queries.dtype
        weight, bias, mean, variance = (
            tensor.to(kind) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        trained = self.weight.requires_grad or self.bias.requires_grad
        by_batch = bool(self.training and trained and (queries.shape[0] > 1 or self.across_ranks))
        if by_batch and (mask is not None or self.across_ranks):
            mask = queries.new_ones(queries.shape[0]) if mask is None else mask
            mean, variance = self._statistics_of_real_tokens(queries, mask, mean, variance)
            return (queries - mean) * (weight * (variance + self.eps).rsqrt()) + bias
        # the backward pass needs them as they were, and a later pass moves them
        mean, variance = mean.clone(), variance.clone()
        normed = nn.functional.batch_norm(queries, mean, variance, weight, bias, by_batch, self.momentum, self.eps)
        if by_batch:
            remember_statistics(self.running_mean, self.running_var, mean, variance)
        return normed

    def _statistics_of_real_tokens(
        self, queries: Tensor, mask: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        real = mask.to(queries.dtype)
        count, total = self._over_ranks(torch.cat([real.sum()[None], real @ queries])).split([1, queries.shape[1]])
        batch_mean = total / count.clamp(min=1)
        batch_variance = self._over_ranks(real @ (queries - batch_mean).square()) / count.clamp(min=1)
        enough = count > 1
        share = self.momentum * enough
        unbiased = batch_variance.detach() * (count / (count - 1).clamp(min=1))  # what torch keeps a running mean of
        remember_statistics(
            self.running_mean, self.running_var,
            mean + share * (batch_mean.detach() - mean), variance + share * (unbiased - variance),
        )  # fmt: skip
        return torch.where(enough, batch_mean, mean), torch.where(enough, batch_variance, variance)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return sums


class QuerySyncBatchNorm(QueryBatchNorm):
    """Batch normalisation over the tokens of all ranks: each rank must run as many passes in training mode as the others.

    Its weights are those of `QueryBatchNorm`, and so is what it does on a process of its own.
    """

    across_ranks = True

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return add_over_ranks(sums)


@torch.library.custom_op("trialist::remember_statistics", mutates_args=("running_mean", "running_var"))
def remember_statistics(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Copies new statistics over the running ones, all `(heads * width,)`, but not in the repetition of a forward pass that
    gradient checkpointing makes during the backward pass. An operator, because compiled code must ask when it runs."""
    if torch._C._current_graph_task_id() == -1:
        running_mean.copy_(mean)
        running_var.copy_(variance)


@remember_statistics.register_fake
def _(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor) -> None:
    return None


@torch.library.custom_op("trialist::add_over_ranks", mutates_args=())
def add_over_ranks(values: Tensor) -> Tensor:
    """The sum over the processes of the default group, differentiable; a copy where there is none."""
    total = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


@add_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


# the losses of all ranks depend on the values of each
add_over_ranks.register_autograd(lambda ctx, gradient: add_over_ranks(gradient.contiguous()))
