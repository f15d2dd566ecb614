from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trialist.kernels import expert_lookup_cpu, product_keys
from trialist.kernels.product_keys import product_top_k

BACKENDS = [
    "embedding_bag",
    pytest.param("c", marks=pytest.mark.skipif(not expert_lookup_cpu.available(), reason="no C compiler")),
]
backend_case = pytest.mark.parametrize("backend", BACKENDS)


def all_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Of every product key, (R, n, n)."""
    return (queries[:, 0] @ keys[0].T)[:, :, None] + (queries[:, 1] @ keys[1].T)[:, None]


@backend_case
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (3, 1), (5, 3), (5, 8), (5, 25), (7, 48), (40, 16), (129, 16), (300, 7), (64, 64)]
)
def test_the_k_best_of_all_product_keys_are_found_in_order(backend: str, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n * k)
    queries, keys = torch.randn(23, 2, 5, generator=generator), torch.randn(2, n, 5, generator=generator)
    pairs = product_top_k(queries, keys, k, backend=backend)
    scores = all_scores(queries, keys)
    found = scores[torch.arange(23)[:, None], pairs[..., 0], pairs[..., 1]]
    torch.testing.assert_close(found, scores.flatten(1).topk(k).values)
    assert all(len({tuple(pair) for pair in row.tolist()}) == k for row in pairs)


@backend_case
def test_equal_scores_still_give_k_distinct_keys(backend: str) -> None:
    pairs = product_top_k(torch.zeros(4, 2, 3), torch.randn(2, 50, 3), 16, backend=backend)
    assert all(len({tuple(pair) for pair in row.tolist()}) == 16 for row in pairs)
    assert 0 <= int(pairs.min()) <= int(pairs.max()) < 50


@backend_case
@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
def test_the_scale_of_the_scores_does_not_matter(backend: str, scale: float) -> None:
    queries, keys = torch.randn(9, 2, 4, dtype=torch.float64).float(), torch.randn(2, 200, 4)
    plain = product_top_k(queries, keys, 16, backend=backend)
    assert torch.equal(product_top_k(queries * scale, keys, 16, backend=backend), plain)


@backend_case
def test_scores_far_from_normal_are_searched_exactly_too(backend: str) -> None:
    keys = torch.zeros(2, 500, 1)
    keys[:, ::7, 0] = -1e6
    keys[:, 123, 0], keys[:, 77, 0] = 1e6, 5.0
    pairs = product_top_k(torch.ones(1, 2, 1), keys, 3, backend=backend)[0].tolist()
    assert pairs[0] == [123, 123]
    assert sorted(pairs[1:]) == [[77, 123], [123, 77]]


@backend_case
def test_tiles_of_queries_change_nothing(backend: str, monkeypatch) -> None:
    queries, keys = torch.randn(19, 2, 4), torch.randn(2, 30, 4)
    whole = product_top_k(queries, keys, 5, backend=backend)
    monkeypatch.setattr(product_keys, "TILE", 4 * 30)
    assert torch.equal(product_top_k(queries, keys, 5, backend=backend), whole)


@backend_case
def test_no_gradient_flows_and_no_query_gives_no_row(backend: str) -> None:
    queries = torch.randn(0, 2, 4, requires_grad=True)
    pairs = product_top_k(queries, torch.randn(2, 30, 4), 5, backend=backend)
    assert pairs.shape == (0, 5, 2)
    assert not pairs.requires_grad


@backend_case
@pytest.mark.parametrize("place", ["queries", "keys"])
def test_scores_that_are_not_a_number_are_refused_in_words(backend: str, place: str) -> None:
    queries, keys = torch.randn(9, 2, 4), torch.randn(2, 60, 4)
    {"queries": queries, "keys": keys}[place][0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="hold NaN"):
        product_top_k(queries, keys, 5, backend=backend)


@backend_case
def test_infinite_scores_are_ordinary_ones(backend: str) -> None:
    keys = torch.rand(2, 60, 1)
    keys[0, 9], keys[0, 11] = torch.inf, -torch.inf
    pairs = product_top_k(torch.ones(1, 2, 1), keys, 4, backend=backend)[0]
    assert set(pairs[:, 0].tolist()) == {9}


@pytest.mark.parametrize("k", [0, 10])
def test_more_keys_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="3 x 3 product keys allow 1 to 9"):
        product_top_k(torch.randn(2, 2, 4), torch.randn(2, 3, 4), k)
