"""PEER, a mixture of a million experts of one neuron each, in place of a feed-forward layer (arXiv 2407.04153).

    q[i] = norm(W[i] x)                                     query of head i, normalised over the batch
    s[i, (a, b)] = C[a] . q[i][:D/2] + C'[b] . q[i][D/2:]   n sub-keys a half, n x n = N experts, shared by all heads
    y = sum over heads i, and over the k best experts j of each, of g[i, j] act(u[j] . x) v[j],   g[i] = softmax of s[i]

Retrieval is exact and costs O(n), not O(N). Experts are numbered in shells: (a, b) has id m^2 + m + a - b with
m = max(a, b), so the pairs below n are the ids below n^2, and a larger pool only appends rows.

B batch, T time, N tokens, d hidden size, D key width, H heads, K experts a head, n sub-keys of a half
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trialist.kernels.expert_lookup import ACTIVATIONS, BACKENDS, expert_lookup, gather_dot
from trialist.kernels.product_keys import product_top_k
from trialist.models.peer.query_norm import QUERY_NORMS, build_query_norm

SCORES = ("softmax", "sigmoid", "relu")
FREEZE = ("experts", "experts+keys", "experts+keys+query")


def shell_id(a: Tensor, b: Tensor) -> Tensor:
    """Ids of pairs of sub-keys, all int64 of one shape: those with a, b < n are 0 to n^2 - 1 (Rosenberg and Strong)."""
    m = torch.maximum(a, b)
    return m * m + m + a - b


def shell_pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (a, b) of these ids: the inverse of `shell_id`."""
    m = ids.double().sqrt().long()
    m = m - (m * m > ids).long() + ((m + 1) * (m + 1) <= ids).long()  # the root is rounded
    r = ids - m * m
    return torch.where(r < m, r, m), torch.where(r < m, m, 2 * m - r)


@functools.cache
def second_moment(activation: str, spread: float = 1.0) -> float:
    """E[act(z)^2] for z normal with standard deviation `spread`."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64, device="cpu")
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * ACTIVATIONS[activation](spread * z).square(), z))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sides_of(num_experts: int, generations: Sequence[int] | None) -> list[int]:
    """The sides n of the pool after each generation; ValueError where they do not fit the number of experts."""
    if not _is_int(num_experts):
        raise ValueError(f"num_experts is {num_experts!r}; it must be an int")
    side = math.isqrt(max(num_experts, 0))
    if side < 1 or side * side != num_experts:
        raise ValueError(
            f"num_experts is {num_experts}; product keys need a perfect square: {max(side, 1) ** 2} or {(side + 1) ** 2}"
        )
    sides = [side] if generations is None else list(generations)
    growing = all(_is_int(side) for side in sides) and all(a < b for a, b in pairwise([0, *sides]))
    if not sides or not growing or sides[-1] != side:
        raise ValueError(
            f"generations is {generations}; it lists the growing sides of the pool and ends with that of all "
            f"{num_experts} experts, {side}"
        )
    return sides


def check_peer(
    num_experts: int = 1024**2,
    num_heads: int = 8,
    top_k: int = 16,
    key_dim: int = 128,
    activation: str = "gelu",
    score: str = "softmax",
    query_norm: str = "batchnorm",
    glu: bool = False,
    sparse_grad: bool = False,
    backend: str = "auto",
    learning_rate_scale: float = 1.0,
    generations: Sequence[int] | None = None,
) -> list[int]:
    """Raises ValueError for settings of `PEER` that cannot work; returns the sides of its generations."""
    sides = sides_of(num_experts, generations)
    for name, value in {"num_heads": num_heads, "top_k": top_k}.items():
        if not _is_int(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least 1")
    if not _is_int(key_dim) or key_dim < 2 or key_dim % 2:
        raise ValueError(f"key_dim is {key_dim!r}; it must be even, half of it for each of the two sub-keys")
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}, but there are only {num_experts} experts")
    choices = {"activation": (activation, ACTIVATIONS), "score": (score, SCORES), "query_norm": (query_norm, QUERY_NORMS),
               "backend": (backend, BACKENDS)}  # fmt: skip
    for name, (choice, known) in choices.items():
        if choice not in known:
            raise ValueError(f"{name} is {choice!r}; choose one of {', '.join(known)}")
    if score == "softmax" and top_k == 1:
        raise ValueError(
            "a softmax over top_k=1 score is always 1, so queries and keys would get no gradient; "
            "pass score='sigmoid' or a larger top_k"
        )
    if not learning_rate_scale > 0:
        raise ValueError(f"learning_rate_scale is {learning_rate_scale}; it must be > 0")
    return sides


class PEER(nn.Module):
    """The layer, usable alone: `(..., hidden_size)` to the same shape.

    num_experts: a perfect square. num_heads, top_k: experts a token uses are num_heads * top_k. key_dim: width of a
    query, even. score: what makes weights of the scores of the chosen experts. query_norm: "batchnorm" is the paper's and
    uses all experts more evenly; it mixes the tokens of a batch in training mode, never in evaluation mode. glu: experts
    are act(u . x) (w . x) v. sparse_grad: sparse gradients of the tables, for optimizers that take them. output_std:
    standard deviation of the initial output for an input of unit variance. learning_rate_scale: of the expert tables, in
    the parameter groups that the layer declares. generations: sides of the pool after each `grow`, None for a pool that
    never grew.

    Differentiable once; twice with backend="einsum". Raises ValueError for settings that cannot work, input and masks that do
    not fit and, on the CPU, for tokens other than padding that hold NaN.
    """

    recorded_in: str | None = None
    """Field of a model's configuration that holds the settings of its layers of this class"""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 1024**2,
        num_heads: int = 8,
        top_k: int = 16,
        key_dim: int = 128,
        activation: str = "gelu",
        score: str = "softmax",
        query_norm: str = "batchnorm",
        glu: bool = False,
        sparse_grad: bool = False,
        backend: str = "auto",
        *,
        output_std: float = 1.0,
        learning_rate_scale: float = 1.0,
        generations: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "num_experts": num_experts, "num_heads": num_heads, "top_k": top_k, "key_dim": key_dim,
            "activation": activation, "score": score, "query_norm": query_norm, "glu": glu, "sparse_grad": sparse_grad,
            "backend": backend, "learning_rate_scale": learning_rate_scale, "generations": generations,
        }  # fmt: skip
        sides = check_peer(**self.settings)
        self.hidden_size, self.num_heads, self.top_k, self.key_dim = hidden_size, num_heads, top_k, key_dim
        self.activation, self.score, self.glu = activation, score, glu
        self.sparse_grad, self.backend = sparse_grad, backend
        self.output_std, self.learning_rate_scale = output_std, learning_rate_scale
        self.query_proj = nn.Linear(hidden_size, num_heads * key_dim, bias=False)
        self.query_norm = build_query_norm(query_norm, num_heads, key_dim)
        self.keys = nn.ParameterList()
        """(2, sub-keys of the generation, D / 2) each"""
        self.down, self.up, self.gate = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        """u, v and w: (experts of the generation, d) each"""
        self.sides: list[int] = []
        self._active_side: int | None = None
        for side in sides:
            self._append(side)
        self.draw_initial_weights()

    def _append(self, side: int, like: Tensor | None = None) -> None:
        last = self.sides[-1] if self.sides else 0
        place: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.keys.append(nn.Parameter(torch.empty(2, side - last, self.key_dim // 2, **place)))
        for table in (self.down, self.up, *([self.gate] if self.glu else [])):
            table.append(nn.Parameter(torch.empty(side**2 - last**2, self.hidden_size, **place)))
        self.sides.append(side)

    @torch.no_grad()
    def draw_initial_weights(self) -> None:
        """Sub-keys uniform within 1 / sqrt(D), u normal with 1 / sqrt(d), v so that the output has `output_std`."""
        init.xavier_uniform_(self.query_proj.weight)
        for keys in self.keys:
            init.uniform_(keys, -(self.key_dim**-0.5), self.key_dim**-0.5)
        for rows in (*self.down, *self.gate):
            init.normal_(rows, mean=0.0, std=self.hidden_size**-0.5)
        spread = self.output_std / math.sqrt(self._squared_weights() * second_moment(self.activation))
        for rows in self.up:
            init.normal_(rows, mean=0.0, std=spread)

    def _squared_weights(self) -> float:
        """About what the squared weights of a token's experts add up to at the start, when the scores of a head are close."""
        best = math.sqrt(2 / 3 * math.log(1 + self.num_experts / self.top_k))  # scores start with variance 1/3
        each = {"softmax": 1 / self.top_k, "sigmoid": 1 / (1 + math.exp(-best)), "relu": best}[self.score]
        return self.num_heads * self.top_k * each**2

    @property
    def side(self) -> int:
        """Sub-keys of a half, n."""
        return self.sides[-1]

    @property
    def num_experts(self) -> int:
        return self.side**2

    @property
    def active_side(self) -> int:
        """Only pairs of the first `active_side` sub-keys are retrieved: with the side before `grow`, the layer of then. No
        file holds it: a loaded layer retrieves all."""
        return self._active_side or self.side

    @active_side.setter
    def active_side(self, side: int | None) -> None:
        if side is not None and not (1 <= side <= self.side and side**2 >= self.top_k):
            raise ValueError(
                f"active_side is {side}; wanted at most {self.side}, and enough for top_k={self.top_k} experts (None is all)"
            )
        self._active_side = side

    def retrieve(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids int64 and weights (at least float32) of the chosen experts, `(..., H, K)` each, best first in every head."""
        tokens = self._tokens(x, padding_mask)
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        projected = self.query_proj(tokens)
        wide = torch.float64 if projected.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):  # scores in bfloat16 would tie
            queries = self.query_norm(projected.to(wide), mask).view(-1, 2, self.key_dim // 2)  # (N H, 2, D / 2)
            keys = torch.cat(list(self.keys), 1).to(wide)[:, : self.active_side]  # (2, n, D / 2)
            backend = self.backend if self.backend != "einsum" else "embedding_bag"
            pairs = product_top_k(queries, keys, self.top_k, backend=backend)  # (N H, K, 2)
            # only the chosen scores are differentiated: keeping all n of each half would dwarf the layer
            first, second = (
                gather_dot(queries[:, half], [keys[half]], pairs[..., half].contiguous(), backend=backend)
                for half in (0, 1)
            )
            scores = (first + second).view(*x.shape[:-1], self.num_heads, self.top_k)
            ids = shell_id(pairs[..., 0], pairs[..., 1]).view(scores.shape)
            if self.score == "softmax":
                return ids, scores.softmax(-1)
            return ids, scores.sigmoid() if self.score == "sigmoid" else scores.relu()

    def _tokens(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """`(N, d)`: the tokens of `x`, 0 at padding, whatever stands there."""
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x is {tuple(x.shape)}, wanted (..., {self.hidden_size})")
        if padding_mask is None:
            return x.reshape(-1, self.hidden_size)
        if padding_mask.shape != x.shape[:-1] or padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask {tuple(padding_mask.shape)} of {padding_mask.dtype} does not fit x {tuple(x.shape)}: wanted "
                f"{tuple(x.shape[:-1])} of torch.bool, False at padding"
            )
        return x.masked_fill(~padding_mask[..., None], 0).reshape(-1, self.hidden_size)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """padding_mask: bool, the shape of `x` without its last dimension, False at padding; None where there is none."""
        ids, weights = self.retrieve(x, padding_mask)
        tokens, count = self._tokens(x, padding_mask), self.num_heads * self.top_k
        y = expert_lookup(
            tokens, ids.reshape(len(tokens), count), weights.reshape(len(tokens), count),
            list(self.down), list(self.up), list(self.gate), activation=self.activation, sparse_grad=self.sparse_grad,
            backend=self.backend,
        )  # fmt: skip
        return y.view_as(x)

    @torch.no_grad()
    def grow(self, new_side: int, generator: torch.Generator | None = None) -> None:
        """Append sub-keys and experts until the pool has `new_side`^2; the ids and weights of the old ones stay.

        New sub-keys are drawn like the old ones (their mean and spread), new experts contribute nothing before they are
        trained (v = 0); but they are retrieved in place of old ones, unless `active_side` holds them back. An optimizer
        made before does not know them: make a new one. Inside a model call `grow_experts`, which records it for loading.
        """
        if new_side <= self.side:
            raise ValueError(f"new_side is {new_side}; the pool has side {self.side} and can only grow")
        old = torch.cat(list(self.keys), 1).float()  # (2, n, D / 2)
        mean, spread = old.mean(1, keepdim=True), old.std(1, keepdim=True, correction=0)
        if self.side == 1:
            spread = torch.full_like(spread, (3 * self.key_dim) ** -0.5)
        self._append(new_side, like=self.keys[0])
        where = "cpu" if generator is None else generator.device

        def normal(parameter: Tensor) -> Tensor:
            return torch.randn(parameter.shape, generator=generator, device=where).to(parameter.device)

        self.keys[-1].copy_(mean + spread * normal(self.keys[-1]))
        for tables in (self.down, self.gate) if self.glu else (self.down,):
            tables[-1].copy_(self.hidden_size**-0.5 * normal(tables[-1]))
        self.up[-1].zero_()
        self.settings |= {"num_experts": self.num_experts, "generations": list(self.sides)}

    def freeze(self, what: Literal["experts", "experts+keys", "experts+keys+query"] = "experts") -> None:
        """Stop training all experts that exist now, also their sub-keys, also the queries (with their running statistics).

        Parameters stop requiring gradients, so no optimizer's decay or momentum moves them. What `grow` adds is trained.
        No file holds what is frozen: freeze a loaded layer again.
        """
        if what not in FREEZE:
            raise ValueError(f"freeze takes {', '.join(map(repr, FREEZE))}, not {what!r}")
        frozen: list[nn.Parameter] = [*self.down, *self.up, *self.gate]
        if what != "experts":
            frozen += list(self.keys)
        if what == "experts+keys+query":
            frozen += [*self.query_proj.parameters(), *self.query_norm.parameters()]
        for parameter in frozen:
            parameter.requires_grad_(False)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Expert tables with their own learning rate, sub-keys with the common one; neither decays: rows are embeddings."""
        tables = {"params": [*self.down, *self.up, *self.gate], "name": "peer_experts", "weight_decay": 0.0,
                  "learning_rate_scale": self.learning_rate_scale, "sparse": self.sparse_grad}  # fmt: skip
        return [tables, {"params": list(self.keys), "name": "peer_keys", "weight_decay": 0.0}]

    def flops_per_token(self, length: int) -> float:
        """Scores of all sub-keys and of the chosen pairs, and the experts; the projection of the queries is not included."""
        H, K, D = self.num_heads, self.top_k, self.key_dim
        return 2.0 * H * D * (self.active_side + K) + 2.0 * H * K * self.hidden_size * (3 if self.glu else 2)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts} experts, {self.num_heads} heads x {self.top_k}, keys of {self.key_dim}"
