"""Normalisation of retrieval queries over the batch, blind to padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

QUERY_NORMS = ("batchnorm", "layernorm", "none")


def build_query_norm(kind: str, heads: int, width: int) -> QueryNorm:
    return {"batchnorm": QueryBatchNorm, "layernorm": QueryLayerNorm, "none": QueryNorm}[kind](heads, width)


class QueryNorm(nn.Module):
    """Leaves queries `(N, heads * width)` as they are. `frozen`: statistics no longer follow the batch."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.frozen = False

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
    statistics in evaluation, when frozen, and for a batch of fewer than two tokens.

    Under gradient accumulation and data parallelism each micro-batch has statistics of its own.
    """

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
        by_batch = self.training and not self.frozen and queries.shape[0] > 1
        if by_batch and mask is not None:
            mean, variance = self._statistics_of_real_tokens(queries, mask, mean, variance)
            return (queries - mean) * (weight * (variance + self.eps).rsqrt()) + bias
        if not by_batch:
            return nn.functional.batch_norm(queries, mean, variance, weight, bias, False, self.momentum, self.eps)
        mean, variance = mean.clone(), variance.clone()
        normed = nn.functional.batch_norm(queries, mean, variance, weight, bias, True, self.momentum, self.eps)
        self._remember(mean, variance)
        return normed

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if not _recomputed():
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)

    def _statistics_of_real_tokens(
        self, queries: Tensor, mask: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        real = mask.to(queries.dtype)
        count = real.sum()
        batch_mean = real @ queries / count.clamp(min=1)
        batch_variance = real @ (queries - batch_mean).square() / count.clamp(min=1)
        enough = count > 1
        share = self.momentum * enough
        unbiased = batch_variance.detach() * (count / (count - 1).clamp(min=1))  # what torch keeps a running mean of
        self._remember(mean + share * (batch_mean.detach() - mean), variance + share * (unbiased - variance))
        return torch.where(enough, batch_mean, mean), torch.where(enough, batch_variance, variance)


def _recomputed() -> bool:
    """Whether this forward pass is the repetition that gradient checkpointing makes during the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
