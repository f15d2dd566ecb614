"""Rows of weighted numbers in ascending order, with the prefix sums that give the cost of any interval at once.

    cost(i, j) = min over c of sum of f (w - c)^2 over places i .. j - 1 = S2 - S1^2 / S0        S_n = sum of f w^n

As S2 of all places is the same however they are cut, least cost is greatest gain, S1^2 / S0.
Letters: R rows, K numbers in a row, C intervals, borders x (R, C + 1) with x[0] = 0 and x[C] = K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-9
"""Share of the mean sensitivity of its row that every weight counts at least: so every cluster has a mean"""


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Rows scaled to a largest magnitude of 1 and a mean sensitivity of 1, sorted."""

    values: Tensor
    """(R, K) float64, ascending"""
    weights: Tensor
    """(R, K) float64, > 0"""
    order: Tensor
    """(R, K): where each value stood"""
    s0: Tensor
    s1: Tensor
    """(R, K + 1) prefix sums of f and f w, beginning with 0"""

    @property
    def size(self) -> int:
        return self.values.shape[1]


def sort_rows(weight: Tensor, sensitivity: Tensor | None) -> SortedRows:
    """weight: (R, K). sensitivity: (R, K) or (K,), >= 0; None is 1 everywhere, and so is a row of zeros."""
    values, order = weight.double().sort(dim=1)
    values = values / values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    if sensitivity is None:
        weights = torch.ones_like(values)
    else:
        weights = sensitivity.double().expand(weight.shape).gather(1, order)
        mean = weights.mean(1, keepdim=True)
        weights = torch.where(mean > 0, weights / mean, 1.0) + LEAST
    zero = values.new_zeros(len(values), 1)
    s0, s1 = (torch.cat([zero, x.cumsum(1)], 1) for x in (weights, weights * values))
    return SortedRows(values, weights, order, s0, s1)


def labels_of(borders: Tensor, K: int) -> Tensor:
    """(R, K): the interval that each place lies in. borders: (R, C + 1)."""
    places = torch.arange(K, device=borders.device).expand(len(borders), K).contiguous()
    return torch.searchsorted(borders[:, 1:-1].contiguous(), places, right=True)


def centroids(rows: SortedRows, labels: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Weighted means (R, C) of the scaled values, NaN for empty clusters, and the weighted cost (R,) around them.

    By sums over members and not by differences of prefix sums, which lose digits.
    """
    zeros = rows.values.new_zeros(len(rows.values), C)
    s0 = zeros.scatter_add(1, labels, rows.weights)
    means = zeros.scatter_add(1, labels, rows.weights * rows.values) / s0
    cost = (rows.weights * (rows.values - means.gather(1, labels)) ** 2).sum(1)
    return means, cost
