"""What a cache that stores less costs in nats: prompts, what follows them, and caches of equal measured bytes.

An arm says `channels` ("" or a score of `KeyChannels`), `recover`, and `policy` ("" or a policy of `TokenBudget`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trialist.engine.contract import Arm

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trialist.models import CompactCache


@dataclass(frozen=True)
class Passages:
    """Prompts of one length, and what follows them."""

    prompt: Tensor
    """(B, P)"""
    following: Tensor
    """(B, C)"""
    labels: Tensor
    """(B, C), -100 where nothing is scored"""
    ids: tuple[str, ...]
    """Of the B items"""
    clusters: tuple[str, ...]
    """Of the B items: what they have in common"""


@dataclass(frozen=True)
class Reading:
    """What one cache did to one batch of passages."""

    nats: tuple[float, ...]
    """A row's mean over the scored tokens"""
    right: tuple[float, ...]
    """A row's share of scored tokens that are the most probable ones"""
    bytes: float
    """That the cache holds behind a prompt, a row"""
    share: float
    """Of the bytes of all keys and values"""


@dataclass(frozen=True)
class Caches:
    """Caches for an arm: channels that are kept, or tokens whose bytes are those of these channels."""

    model: PreTrainedModel
    recent: int
    """Latest tokens that stay whole where channels are pruned"""
    window: int
    """Latest queries that decide on channels and tokens"""
    known: dict[tuple[int, str], float] = field(default_factory=dict)
    """Measured bytes of a prompt of so many tokens in such a cache"""

    def parts(self, arm: Arm, keep: float, budget: int | None) -> dict[str, Any]:
        """Arguments of `CompactCache`; nothing is cut again while the following tokens are scored."""
        from trialist.models import HeavyHitters, KeyChannels, Recency, SnapKV, TokenBudget

        never = 2**40
        found: dict[str, Any] = {}
        if arm["channels"]:
            found["keys"] = KeyChannels(
                keep=keep, score=arm["channels"], obs_window=self.window, recent=self.recent, every=never,
                recover=arm["recover"],
            )  # fmt: skip
        policies: dict[str, Any] = {"snapkv": SnapKV(window=self.window), "h2o": HeavyHitters(), "recency": Recency()}
        if arm["policy"] and budget is not None:
            found["eviction"] = TokenBudget(budget, policies[arm["policy"]], every=never)
        return found

    def read(self, passages: Passages, parts: dict[str, Any]) -> Reading:
        """Reads the prompts into such a cache, and scores what follows."""
        import torch

        from trialist.models import CompactCache, compact_attention

        cache = CompactCache(self.model, **parts)
        rows = len(passages.ids)
        with torch.no_grad(), compact_attention(self.model):
            first = self.model(passages.prompt, past_key_values=cache, logits_to_keep=1).logits
            held, dense = measured(cache)
            rest = self.model(passages.following, past_key_values=cache).logits
        logits = torch.cat([first, rest[:, :-1]], 1).float()  # (B, C, V)
        labels, scored = passages.labels.clamp(min=0), passages.labels >= 0
        nats = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        right = (logits.argmax(-1) == labels).float()
        count = scored.sum(-1)
        return Reading(
            tuple(((nats * scored).sum(-1) / count).tolist()),
            tuple(((right * scored).sum(-1) / count).tolist()),
            held / rows,
            held / dense,
        )

    def curve(self, arm: Arm, passages: Passages, keeps: Sequence[float]) -> list[Reading]:
        """A reading at each share of channels, or with as many tokens as fit in the bytes of that share, never fewer."""
        found = []
        for keep in keeps:
            if not arm["policy"]:
                found.append(self.read(passages, self.parts(arm, keep, None)))
                continue
            channels = Arm("channels", "reference", options={"channels": "key_norm", "recover": "none", "policy": ""})
            target = self.bytes_of(passages, self.parts(channels, keep, None))
            own = (1.0 + keep) / 2.0  # an arm that does both saves half of it by channels
            budget = self.budget_for(target, arm, own, passages)
            found.append(self.read(passages, self.parts(arm, own, budget)))
        return found

    def budget_for(self, target: float, arm: Arm, keep: float, passages: Passages) -> int:
        """The fewest tokens whose measured bytes reach `target`; bytes grow evenly with the budget."""
        P = passages.prompt.shape[1]
        low, high = max(self.window, self.recent) + 8, P - 1
        if not low < high:
            raise ValueError(
                f"prompts of {P} tokens are too short for a window of {max(self.window, self.recent)}; lower it"
            )
        one, other = (self.bytes_of(passages, self.parts(arm, keep, budget)) for budget in (low, high))
        slope = (other - one) / (high - low)
        return min(P, max(low, math.ceil(low + (target - one) / slope - 1e-6)))

    def bytes_of(self, passages: Passages, parts: dict[str, Any]) -> float:
        """Bytes behind a prompt a row, measured on one, once for each length."""
        import torch

        from trialist.models import CompactCache, compact_attention

        key = (passages.prompt.shape[1], repr(parts))
        if key not in self.known:
            cache = CompactCache(self.model, **parts)
            with torch.no_grad(), compact_attention(self.model):
                self.model(passages.prompt[:1], past_key_values=cache, logits_to_keep=1)
            self.known[key] = measured(cache)[0]
        return self.known[key]


def measured(cache: CompactCache) -> tuple[int, int]:
    """Bytes that a cache holds, and those of all keys and values."""
    return cache.nbytes(), sum(report.dense_bytes for report in cache.report())


def in_batches(passages: Passages, size: int) -> list[Passages]:
    """The same passages, `size` rows at a time."""
    rows = len(passages.ids)
    return [
        dataclasses.replace(
            passages,
            **{
                name: getattr(passages, name)[start : start + size]
                for name in ("prompt", "following", "labels", "ids", "clusters")
            },
        )
        for start in range(0, rows, size)
    ]
