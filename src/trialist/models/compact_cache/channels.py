"""Which channels of cached keys are worth keeping: ThinK (arXiv 2407.21018), for grouped queries and padded batches.

With the latest queries Q `(n, D)` and the cached keys K `(S, D)` of a head, channel j contributes `Q[:, j] K[:, j]^T` to the
attention logits. Its Frobenius norm, `|Q[:, j]| |K[:, j]|`, is the score; the channels of the smallest scores go. The query
heads of a group share their keys, so the squares are summed over the group, which is the error that pruning makes in all of
their logits. Padding is no query and no key.

B batch, H query heads, G key/value heads, R rows of columns a batch row has (1 or G), n queries, S stored columns, D width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trialist.models.masks import visible_columns
from trialist.models.packed_attention import pack, pack_mask, packed_softmax

SCORES = ("query", "key_norm", "random")
RECOVERIES = ("none", "mean")


@dataclass(frozen=True)
class KeyChannels:
    """How a cache prunes the channels of its keys once a prompt was read."""

    keep: float = 1.0
    """Share of the channels of each key that is kept, in (0, 1]; 1 keeps all of them, and nothing changes"""
    score: str = "query"
    """What decides: `query` (the ThinK rule), `key_norm` (size of the keys alone) or `random`"""
    obs_window: int = 32
    """Latest queries of the prompt that score channels; all of a shorter one"""
    recent: int = 32
    """Latest tokens that stay whole"""
    every: int = 32
    """Tokens by which the whole ones may outgrow `recent` before they are pruned too, by the channels chosen first"""
    round_to: int = 1
    """Kept channels are rounded up to a multiple of this; kernels of GPUs want 16"""
    value_keep: float = 1.0
    """Share of the channels of each value that is kept; values bear it less well than keys"""
    recover: str = "none"
    """`mean` adds what the dropped channels contribute on average over the pruned tokens; `none` adds nothing"""
    seed: int = 0
    """Of `random`"""

    def __post_init__(self) -> None:
        for name in ("keep", "value_keep"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; give a share of the channels in (0, 1], 1 keeps all"
                )
        if self.score not in SCORES:
            raise ValueError(f"score {self.score!r} is unknown; choose one of {', '.join(SCORES)}")
        if self.recover not in RECOVERIES:
            raise ValueError(f"recover {self.recover!r} is unknown; choose one of {', '.join(RECOVERIES)}")
        for name, least in (("obs_window", 1), ("recent", 0), ("every", 1), ("round_to", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def neutral(self) -> bool:
        return self.keep == 1.0 and self.value_keep == 1.0


def kept_count(width: int, keep: float, round_to: int = 1) -> int:
    """Channels that stay of `width`: all but the floor of the share that goes, at least one, rounded up to `round_to`."""
    kept = max(1, width - math.floor(width * (1.0 - keep) + 1e-9))
    return min(width, -(-kept // round_to) * round_to)


def best(scores: Tensor, count: int) -> Tensor:
    """Ascending indices `(B, G, count)` of the channels with the largest scores `(B, G, D)`."""
    return scores.topk(count, -1).indices.sort(-1).values


def key_scores(
    settings: KeyChannels,
    query: Tensor,
    key: Tensor,
    layer: int,
    *,
    columns: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """A score for each channel, `(B, G, D)`, in float32 at least.

    query `(B, H, n, D)`, key `(B, G, S, D)`; columns `(B | 1, 1 | G, S)` and queries `(B | 1, n)` tell those that are no
    padding, None for all. layer: makes `random` draw other channels in every layer, the same for all rows.
    """
    B, G, _, D = key.shape
    if settings.score == "random":
        generator = torch.Generator().manual_seed(settings.seed * 65_537 + layer)
        return torch.rand(1, G, D, generator=generator).to(key.device).expand(B, G, D)
    sizes = _norm(key if columns is None else key.masked_fill(~columns[..., None], 0.0))  # (B, G, D)
    if settings.score == "key_norm":
        return sizes
    seen = _norm(observed(query, queries, settings.obs_window))  # (B, H, D)
    return seen.view(B, G, -1, D).square().sum(2).sqrt() * sizes


def value_scores(
    settings: KeyChannels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    queries: Tensor | None = None,
) -> Tensor:
    """The norm of what each channel of the values adds to the outputs of the latest queries, `(B, G, D)`; the attention is
    that of whole keys. mask `(B | 1, 1 | R | H, n, S)`, None is causal; other arguments as of `key_scores`."""
    groups, n = key.shape[1], query.shape[2]
    if mask is None:
        mask = causal(n, key.shape[2], key.device)
    rows = pack(query, groups)  # (B, G, H / G * n, D)
    weights = packed_softmax(rows @ key.transpose(-1, -2), pack_mask(mask, query.shape[1], groups), scaling)
    output = (weights.to(value.dtype) @ value).view(*query.shape[:3], -1)  # (B, H, n, D)
    outputs = _norm(observed(output, queries, settings.obs_window))
    return outputs.view(*key.shape[:2], -1, outputs.shape[-1]).square().sum(2).sqrt()


def _norm(x: Tensor) -> Tensor:
    """Of each channel over the tokens, `(B, H, n, D)` -> `(B, H, D)`; half precision is summed in float32."""
    return torch.linalg.vector_norm(x, dim=2, dtype=torch.promote_types(x.dtype, torch.float32))


def observed(states: Tensor, queries: Tensor | None, window: int) -> Tensor:
    """States `(B, H, n, D)` of the queries, 0 but at the latest `window` of each row that are no padding."""
    if queries is None:
        return states[:, :, max(0, states.shape[2] - window) :]
    latest = queries & (queries.flip(-1).cumsum(-1).flip(-1) <= window)
    return states.masked_fill(~latest[:, None, :, None], 0.0)


def real_queries(mask: Tensor | None, queries: int) -> Tensor | None:
    """Which of the queries, those of the last columns of a mask `(B | 1, R, n, S)`, see themselves `(B | 1, n)`: padding does
    not. None stays None."""
    if mask is None:
        return None
    own = torch.arange(mask.shape[-1] - queries, mask.shape[-1], device=mask.device)
    seen = visible_columns(mask).any(1)  # (B, n, S)
    return seen.gather(-1, own.view(1, queries, 1).expand(len(mask), queries, 1))[..., 0]


def real_columns(mask: Tensor | None, groups: int) -> Tensor | None:
    """Columns that some query sees, `(B | 1, 1 | G, S)`: those that are no padding. None stays None."""
    if mask is None:
        return None
    seen = visible_columns(mask).any(2)
    return seen if seen.shape[1] in (1, groups) else seen[:, :: seen.shape[1] // groups]


def causal(queries: int, columns: int, device: torch.device) -> Tensor:
    """What each of the last `queries` of `columns` may look at, bool `(1, 1, n, S)`."""
    every = torch.arange(columns, device=device)
    return (every <= every[columns - queries :, None])[None, None]
