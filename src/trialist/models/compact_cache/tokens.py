"""Which tokens a compact cache gives up, and SnapKV (arXiv 2404.14469) as a policy beside those of `models.eviction`.

B batch, H query heads, G key/value heads, T queries, S columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trialist.models.compact_cache.channels import causal, observed, real_queries
from trialist.models.eviction.cache import Scores
from trialist.models.eviction.policies import POLICIES, Block, Policy
from trialist.models.packed_attention import pack, pack_mask, packed_softmax

POOLS = ("mean", "max")


@dataclass(frozen=True)
class SnapKV:
    """The latest `window` tokens stay, and of the others those to which their queries attend most.

    The attention of the window is averaged over its queries and over the heads of a group, and smoothed over `kernel`
    neighbouring tokens. A policy for a cache that is cut when a prompt was read: `enable_eviction`, which cuts step by step,
    would ask it with too few queries. The paper's code smooths by the mean over 5 tokens, its text by the maximum over 7.
    """

    window: int = 32
    kernel: int = 5
    pool: str = "mean"
    scored = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(
                f"window is {self.window} and kernel {self.kernel}; give at least 1 token, and an odd number of neighbours"
            )
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown; choose one of {', '.join(POOLS)}")

    @property
    def least(self) -> int:
        return self.window + 1

    def check(self, budget: int) -> None:
        if budget < self.least:
            raise ValueError(
                f"a budget of {budget} tokens cannot hold the window of {self.window}; give {self.least} or more"
            )

    def play(self, block: Block, budget: int) -> tuple[Tensor, Scores, Tensor]:
        """As `Policy.play` says; every query of the call still sees everything."""
        (B, H, T, _), (G, S), device = block.query.shape, block.key.shape[1:3], block.query.device
        mask = block.attention_mask if block.attention_mask is not None else causal(T, S, device)
        seen = (block.visible(G) if block.attention_mask is not None else mask).expand(B, -1, T, S)  # type: ignore[union-attr]
        alive = seen.any(2)  # (B, 1 | G, S)
        if budget >= S:
            return seen, (), alive.expand(B, G, S)
        n = min(self.window, T)
        query, mask = block.query[:, :, T - n :], mask[:, :, T - n :]
        weights = packed_softmax(pack(query, G) @ block.key.transpose(-1, -2), pack_mask(mask, H, G), block.scaling)
        weights = observed(weights.view(B, H, n, S), real_queries(mask, n), n).view(B, G, -1, S)
        votes = weights.mean(2)[..., : S - self.window]  # (B, G, S - window)
        smooth = torch.nn.functional.avg_pool1d if self.pool == "mean" else torch.nn.functional.max_pool1d
        votes = smooth(votes, self.kernel, stride=1, padding=self.kernel // 2)
        # padding that stands beside a token which many look at gets votes by the smoothing
        votes = votes.masked_fill(~alive[..., : S - self.window], -1.0)
        chosen = votes.topk(budget - self.window, -1).indices
        stays = torch.zeros(B, G, S, dtype=torch.bool, device=device).scatter(-1, chosen, True)
        stays[..., S - self.window :] = True
        return seen, (), stays & alive


EVICTION: dict[str, type] = {**POLICIES, "snapkv": SnapKV}


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a cache keeps once a prompt was read, and which."""

    budget: int | None = None
    """Tokens that each layer keeps; None keeps all, and nothing changes"""
    policy: str | Policy = "snapkv"
    """`snapkv`, `h2o` (heavy hitters), `recency`, or an object with `play`, as `models.eviction.policies` describes"""
    every: int = 32
    """Tokens by which the cache may outgrow its budget while it decodes, before it is cut again"""

    def __post_init__(self) -> None:
        if isinstance(self.policy, str) and self.policy not in EVICTION:
            raise ValueError(f"policy {self.policy!r} is unknown; choose one of {', '.join(EVICTION)}")
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1 token")
        if self.budget is None:
            return
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < self.chosen.least:
            raise ValueError(f"budget is {self.budget!r}; give at least {self.chosen.least} tokens, or None for all")
        self.chosen.check(self.budget)

    @property
    def chosen(self) -> Policy:
        return EVICTION[self.policy]() if isinstance(self.policy, str) else self.policy

    @property
    def neutral(self) -> bool:
        return self.budget is None

    @property
    def observes(self) -> int | None:
        """The latest queries that the policy looks at when the cache is cut; None is all since it was cut before."""
        policy = self.chosen
        return None if policy.scored else int(getattr(policy, "window", 1))
