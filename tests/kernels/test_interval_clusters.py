"""The best cut of a row into intervals against every cut that there is."""

from __future__ import annotations

import itertools

import pytest
import torch

from trialist.kernels.interval_clusters import BACKENDS, available, cut_rows


def sums(rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros(len(rows), 1, dtype=torch.float64)
    return tuple(torch.cat([zero, x.cumsum(1)], 1) for x in (weights, weights * rows))


def cost(row, weights, borders) -> float:
    total = 0.0
    for first, last in itertools.pairwise(borders):
        if last > first:
            part, count = row[first:last], weights[first:last]
            mean = float((part * count).sum() / count.sum())
            total += float((count * (part - mean) ** 2).sum())
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "C"), [(1, 1), (1, 4), (2, 2), (5, 3), (9, 4), (12, 2)])
def test_no_cut_costs_less(backend, K, C):
    if backend == "c" and not available():
        pytest.skip("no C compiler")
    generator = torch.Generator().manual_seed(K * C)
    rows = torch.randn(6, K, generator=generator, dtype=torch.float64)
    rows[4] = rows[4].round()  # equal numbers
    rows = rows.sort(1).values
    weights = torch.rand(6, K, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    borders = cut_rows(*sums(rows, weights), C, backend=backend)
    assert borders.shape == (6, C + 1)
    assert (borders.diff(dim=1) >= 0).all()
    for row, count, found in zip(rows, weights, borders.tolist(), strict=True):
        assert (found[0], found[-1]) == (0, K)
        cuts = itertools.combinations_with_replacement(range(K + 1), C - 1)
        least = min(cost(row, count, (0, *cut, K)) for cut in cuts)
        assert cost(row, count, found) == pytest.approx(least, abs=1e-9)


@pytest.mark.skipif(not available(), reason="no C compiler")
def test_the_kernel_cuts_long_rows_as_the_reference_does():
    rows = torch.randn(5, 333, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    given = sums(rows, torch.rand(5, 333, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for C in (2, 4, 8):
        assert torch.equal(cut_rows(*given, C, backend="c"), cut_rows(*given, C, backend="reference"))


def test_sums_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="wanted float64"):
        cut_rows(torch.zeros(2, 3), torch.zeros(2, 3), 2)
