"""Generated facts: two key symbols name a value. Random values can only be stored; values by a rule can be inferred.

A fact is a row of three tokens, key, key and value, and the value is its label. Facts are spread evenly over training:
every epoch holds each fact once, in an order of its own.
"""

# M facts, B rows of a batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Kind = Literal["random", "rule"]


@dataclass(frozen=True)
class FactVocabulary:
    """Token ids: first keys, then second keys, then values."""

    keys: int = 256
    """Symbols of each of the two places of a key"""
    classes: int = 16
    """A rule knows a key only by its class: there are classes^2 values, for random facts too"""

    def __post_init__(self) -> None:
        if self.keys < 1 or self.classes < 2:
            raise ValueError(f"at least 1 key and 2 classes are needed, not {self.keys} and {self.classes}")

    @property
    def values(self) -> int:
        return self.classes**2

    @property
    def size(self) -> int:
        return 2 * self.keys + self.values


VOCABULARY = FactVocabulary()


def draw_facts(
    counts: Sequence[int], *, seed: int, kind: Kind = "random", vocabulary: FactVocabulary = VOCABULARY
) -> list[Tensor]:
    """Disjoint sets of facts: tokens int64 `(M, 3)` for each of `counts`, no two with the same pair of keys.

    kind: "random" draws every value uniformly; by "rule", every symbol belongs to a random class and the value is
    classes * (class of the first) + (class of the second). Raises ValueError for more facts than pairs of keys.
    """
    keys, classes = vocabulary.keys, vocabulary.classes
    if kind not in ("random", "rule"):
        raise ValueError(f"kind of facts {kind!r} is unknown; 'random' or 'rule'")
    if min(counts, default=0) < 1 or sum(counts) > keys**2:
        raise ValueError(
            f"{list(counts)} facts cannot be drawn from {keys} x {keys} pairs of keys; give at least 1 each, {keys**2} in all"
        )
    generator = np.random.default_rng(seed)
    first, second = np.divmod(generator.permutation(keys**2)[: sum(counts)], keys)
    if kind == "random":
        values = generator.integers(vocabulary.values, size=len(first))
    else:
        members = generator.integers(classes, size=(2, keys))
        values = classes * members[0, first] + members[1, second]
    tokens = torch.from_numpy(np.stack([first, keys + second, 2 * keys + values], axis=1))  # (M, 3)
    return list(tokens.split(list(counts)))


@dataclass(frozen=True)
class FactBatches:
    """The batch at a step, a function of seed and step alone; a batch may begin in one epoch and end in the next."""

    facts: Tensor
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or len(self.facts) < 1:
            raise ValueError(f"batches of {self.batch_size} of {len(self.facts)} facts; both must be at least 1")

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, 3) int64; only the value is labelled."""
        count = len(self.facts)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = places // count
        rows = np.concatenate(
            [
                np.random.default_rng([self.seed, int(epoch)]).permutation(count)[places[epochs == epoch] % count]
                for epoch in np.unique(epochs)
            ]
        )
        return fact_batch(self.facts[torch.from_numpy(rows)])


def fact_batch(facts: Tensor) -> dict[str, Tensor]:
    """Facts `(B, 3)` as a batch."""
    labels = facts.clone()
    labels[:, :2] = IGNORED
    return {"input_ids": facts, "labels": labels}
