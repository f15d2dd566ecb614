"""Weighted 1-D k-means of rows: the best clusters by dynamic programming, or k-means++ and Lloyd's iterations.

Clusters of sorted numbers are intervals, so a clustering of C clusters is C - 1 borders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trialist.kernels.interval_clusters import cut_rows
from trialist.weights.nested.sums import SortedRows

ITERATIONS = 50


def best_seeds(rows: SortedRows, C: int) -> Tensor:
    """Borders (R, C + 1) of the clustering of least weighted cost into C clusters, some empty where there are too few numbers."""
    return cut_rows(rows.s0, rows.s1, C)


def drawn_seeds(rows: SortedRows, C: int, generator: torch.Generator) -> Tensor:
    """Borders (R, C + 1) by k-means++ on the weighted numbers and at most 50 of Lloyd's iterations."""
    R, K = rows.values.shape
    device = rows.values.device

    def draw(mass: Tensor) -> Tensor:
        total = mass.cumsum(1)
        level = torch.rand(R, 1, generator=generator, dtype=torch.float64).to(device) * total[:, -1:]
        return rows.values.gather(1, torch.searchsorted(total, level).clamp(max=K - 1))

    centers = draw(rows.weights)
    distance = (rows.values - centers).square()
    for _ in range(C - 1):
        centers = torch.cat([centers, draw(rows.weights * distance)], 1)
        distance = torch.minimum(distance, (rows.values - centers[:, -1:]).square())
    centers = centers.sort(1).values
    zero, end = (torch.full((R, 1), value, dtype=torch.long, device=device) for value in (0, K))
    borders = torch.cat([zero, end], 1)
    for _ in range(ITERATIONS):
        middles = (centers[:, 1:] + centers[:, :-1]) / 2
        moved = torch.cat([zero, torch.searchsorted(rows.values, middles.contiguous()), end], 1)
        if moved.shape == borders.shape and torch.equal(moved, borders):
            break
        borders = moved
        s0, s1 = rows.s0.gather(1, borders).diff(dim=1), rows.s1.gather(1, borders).diff(dim=1)
        centers = torch.where(s0 > 0, s1 / s0, centers).sort(1).values
    return borders
