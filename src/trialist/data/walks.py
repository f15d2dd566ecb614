"""Generated pointer chasing: walks through a labelled graph, and as their negative control single hops decided by a coin.

Every letter names a permutation of the nodes. A walk shows a node and then letters, and the answer after each letter is where
the walk stands: after h letters, h pointers must be followed one after the other. The permutations do not commute, so that
order counts and no sum over the letters gives the answer.
"""

# B rows, h hops, q questions, T tokens

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import IGNORED

Task = Literal["walks", "coins"]


@dataclass(frozen=True)
class Graph:
    """`letters` random permutations of `nodes` nodes. Token ids: nodes first, then letters, then `end`."""

    nodes: int = 8
    letters: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nodes < 2 or self.letters < 1:
            raise ValueError(f"a graph needs at least 2 nodes and 1 letter, not {self.nodes} and {self.letters}")

    @property
    def end(self) -> int:
        return self.nodes + self.letters

    @property
    def size(self) -> int:
        """Number of token ids."""
        return self.end + 1

    @functools.cached_property
    def pointers(self) -> np.ndarray:
        """Where each letter leads from each node, (letters, nodes)."""
        generator = np.random.default_rng([self.seed, self.nodes, self.letters])
        return np.stack([generator.permutation(self.nodes) for _ in range(self.letters)])

    @functools.cached_property
    def ways(self) -> np.ndarray:
        """Two places where each letter may lead from each node, never the same, (2, letters, nodes)."""
        generator = np.random.default_rng([self.seed, self.nodes, self.letters, 2])
        shift = generator.integers(1, self.nodes, size=(self.letters, 1))
        return np.stack([self.pointers, (self.pointers + shift) % self.nodes])


def walks(graph: Graph, rows: int, hops: int, *, generator: np.random.Generator) -> dict[str, Tensor]:
    """A node, h letters, `end`: `input_ids` (B, h + 2). `labels[:, t + 1]` is where the walk stands after letter t.

    Labels are no input: no answer is shown.
    """
    _check(rows, hops)
    node = generator.integers(graph.nodes, size=rows)
    letters = generator.integers(graph.letters, size=(rows, hops))
    tokens = np.full((rows, hops + 2), graph.end)
    labels = np.full((rows, hops + 2), IGNORED)
    tokens[:, 0], tokens[:, 1:-1] = node, graph.nodes + letters
    for hop in range(hops):
        node = graph.pointers[letters[:, hop], node]
        labels[:, hop + 2] = node
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


def coins(graph: Graph, rows: int, questions: int, *, generator: np.random.Generator) -> dict[str, Tensor]:
    """q times a node and a letter, then `end`: `input_ids` (B, 2q + 1). The label after each letter is one of the two nodes of
    `graph.ways`, by the toss of a coin: one hop is to be followed, and nobody can be right more often than every other time.
    """
    _check(rows, questions)
    nodes = generator.integers(graph.nodes, size=(rows, questions))
    letters = generator.integers(graph.letters, size=(rows, questions))
    tokens = np.full((rows, 2 * questions + 1), graph.end)
    labels = np.full((rows, 2 * questions + 1), IGNORED)
    tokens[:, 0:-1:2], tokens[:, 1::2] = nodes, graph.nodes + letters
    labels[:, 2::2] = graph.ways[generator.integers(2, size=(rows, questions)), letters, nodes]
    return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


@dataclass(frozen=True)
class WalkBatches:
    """The batch at a step, a function of seed and step alone.

    hops: letters of a walk, or questions in a row of coins. rise: over so many steps walks grow from 1 hop to `hops`; 0 asks
    for all hops from the start.
    """

    task: Task
    graph: Graph
    batch_size: int
    seed: int
    hops: int
    rise: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is unknown; one of {', '.join(TASKS)}")
        if self.hops < 1 or self.rise < 0:
            raise ValueError(f"expected hops >= 1 and rise >= 0, not {self.hops} and {self.rise}")

    def hops_at(self, step: int) -> int:
        if step >= self.rise or self.task == "coins":
            return self.hops
        return 1 + min(self.hops - 1, self.hops * step // self.rise)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, (B, T) int64."""
        generator = np.random.default_rng([self.seed, step])
        return TASKS[self.task](self.graph, self.batch_size, self.hops_at(step), generator=generator)


TASKS = {"walks": walks, "coins": coins}


def _check(rows: int, hops: int) -> None:
    if rows < 1 or hops < 1:
        raise ValueError(f"rows and hops must be at least 1, not {rows} and {hops}")
