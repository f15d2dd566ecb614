"""Recency and heavy hitters on standard attention: a pass over many tokens is decoding them one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models.conftest import assert_left, brought, layout, states
from trialist.models.eviction.attention import attend_evicting
from trialist.models.eviction.cache import EvictingCacheLayer
from trialist.models.eviction.policies import HeavyHitters, Recency


def by_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    budget: int,
    scaling: float,
    policy: Recency | HeavyHitters,
) -> tuple[Tensor, list[list[list[int]]]]:
    """The definition, one number at a time: output (B, T, H, D) in float64, and what is alive at the end of each row and
    key/value head."""
    B, H, T, D = query.shape
    G = key.shape[1]
    q, k, v = (x.detach().double() for x in (query, key, value))
    output, ends = torch.zeros(B, T, H, D, dtype=torch.float64), []
    for b in range(B):
        rows = []
        for g in range(G):
            alive: list[int] = []
            received = [0.0] * T
            for i in range(T):
                if not visible[b, i, i]:
                    continue  # padding
                look = [j for j in alive if visible[b, i, j]] + [i]
                for h in range(g * H // G, (g + 1) * H // G):
                    weights = [math.exp(float(q[b, h, i] @ k[b, g, j]) * scaling) for j in look]
                    for j, weight in zip(look, weights):
                        output[b, i, h] += weight / sum(weights) * v[b, g, j]
                        received[j] += weight / sum(weights)
                alive.append(i)
                here = [j for j in alive if visible[b, i, j]]
                while len(here) > budget:
                    if isinstance(policy, Recency):
                        document = [j for j in range(T) if visible[b, i, j]]
                        gone = next(j for j in here if j not in document[: policy.sinks])
                    else:
                        recent = max(1, round(budget * policy.recent_share))
                        gone = min(here[: len(here) - recent], key=lambda j: (received[j], j))
                    alive.remove(gone)
                    here.remove(gone)
            rows.append([j for j in alive if visible[b, T - 1, j]])
        ends.append(rows)
    return output, ends


def evicting(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, policy, budget: int, layer=None
) -> Tensor:  # type: ignore[no-untyped-def]
    H, G = query.shape[1], keys.shape[1]

    def attend(mask: Tensor | None) -> tuple[Tensor, None]:
        shared = [x.repeat_interleave(H // G, 1) for x in (keys, values)]
        causal = mask is None and query.shape[2] > 1
        if mask is None and causal and keys.shape[2] > query.shape[2]:
            raise AssertionError("past keys need a mask")
        output = torch.nn.functional.scaled_dot_product_attention(query, *shared, mask, is_causal=causal, scale=0.5)
        return output.transpose(1, 2), None

    return attend_evicting(attend, query, keys, mask, scaling=0.5, policy=policy, budget=budget, layer=layer)[0]


POLICIES = [Recency(2), Recency(0), HeavyHitters(), HeavyHitters(0.0), HeavyHitters(1.0)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=str)


@policies
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole", "packed"])
@pytest.mark.parametrize("budget", [3, 6])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_full_pass_is_the_step_by_step_definition(policy, kind: str, budget: int, mask: str) -> None:
    query, key, value = states()
    visible = layout(kind)
    expected, _ = by_steps(query, key, value, visible, budget, 0.5, policy)
    given = visible[:, None]
    if mask == "float":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, torch.finfo(torch.float64).min)
    output = evicting(query, key, value, given, policy, budget)
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)


@policies
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [6, 1, 5, 1], [2, 4, 7]], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole"])
def test_pieces_give_the_definition_and_keep_its_survivors(policy, pieces: list[int], kind: str) -> None:
    query, key, value = states(seed=1)
    visible, budget = layout(kind), 5
    expected, ends = by_steps(query, key, value, visible, budget, 0.5, policy)
    layer, outputs, start = EvictingCacheLayer(), [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        mask = visible[:, None, part, : part.stop]
        keys, values = brought(layer, key[:, :, part], value[:, :, part])
        outputs.append(evicting(query[:, :, part], keys, values, mask, policy, budget, layer))
        start += piece
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], expected[real], rtol=1e-10, atol=1e-10)
    assert_left(layer, key, visible, ends)
    assert layer.keys.shape[2] == budget


def test_heavy_hitters_in_small_blocks_of_queries_are_the_same(monkeypatch) -> None:
    from trialist.models.eviction import policies as module

    query, key, value = states()
    mask = layout("left padding")[:, None]
    expected = evicting(query, key, value, mask, HeavyHitters(), 5)
    monkeypatch.setattr(module, "LOGITS", 2 * 4 * 13 * 3)
    torch.testing.assert_close(evicting(query, key, value, mask, HeavyHitters(), 5), expected)


def test_a_token_that_everyone_attends_to_stays_and_others_leave_with_age() -> None:
    query, key, value = states(B=1, H=1, G=1)
    key[...] = 0
    key[:, :, 3], query[...] = 4.0, 1.0
    layer = EvictingCacheLayer()
    evicting(query, *brought(layer, key, value), None, HeavyHitters(0.5), 4, layer)
    layer._drop()
    assert layer.columns.tolist() == [[[0, 3, 11, 12]]]  # token 0 gathered attention before token 3 came


@pytest.mark.parametrize("removed", [1, 2, 3])
@policies
def test_crop_within_the_latest_call_takes_evictions_back(policy, removed: int) -> None:
    query, key, value = states(T=12)
    visible = layout("plain", T=12)
    visible[1, :, :3] = False

    def feed(layer: EvictingCacheLayer, pieces: list[int], start: int = 0) -> Tensor:
        output = query
        for piece in pieces:
            part = slice(start, start + piece)
            keys, values = brought(layer, key[:, :, part], value[:, :, part])
            mask = visible[:, None, part, : part.stop]
            output = evicting(query[:, :, part], keys, values, mask, policy, 4, layer)
            start += piece
        return output

    cropped, fresh = EvictingCacheLayer(), EvictingCacheLayer()
    feed(cropped, [6, 3])
    cropped.crop(-removed)
    feed(fresh, [6, 3 - removed] if removed < 3 else [6])
    torch.testing.assert_close(feed(cropped, [2, 1], 9 - removed), feed(fresh, [2, 1], 9 - removed))
    assert torch.equal(cropped.columns, fresh.columns)
