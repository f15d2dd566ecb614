"""Which channels stay: the rule of ThinK for grouped queries and padding, held against explicit norms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trialist.models import KeyChannels
from trialist.models.compact_cache.channels import best, causal, kept_count, key_scores, real_columns, value_scores

QUERY = KeyChannels(keep=0.5, obs_window=3)


def draw(B=2, H=6, G=3, n=7, S=7, D=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, n, D), (B, G, S, D), (B, G, S, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * torch.arange(1, D + 1) for shape in shapes]


def left_padding(B=2, n=7, S=7, padded=4):
    """What queries see `(B, 1, n, S)`, the second row padded on the left; and its real queries and columns."""
    mask = causal(n, S, torch.device("cpu")).repeat(B, 1, 1, 1)
    mask[1, :, :, :padded] = False
    return mask, torch.arange(n)[None] >= torch.tensor([[0], [padded]])


def test_the_score_is_the_norm_of_the_outer_product_of_the_channels():
    query, key, _ = draw(H=3)
    scores = key_scores(QUERY, query, key, 0)
    for b in range(2):
        for g in range(3):
            for j in range(5):
                outer = query[b, g, -3:, j, None] * key[b, g, None, :, j]
                torch.testing.assert_close(scores[b, g, j], torch.linalg.matrix_norm(outer))


def test_the_squares_of_a_group_add_up_to_the_error_in_all_its_logits():
    query, key, _ = draw()
    scores = key_scores(QUERY, query, key, 0)
    for j in range(5):
        channel = torch.zeros(5, dtype=torch.float64)
        channel[j] = 1.0
        logits = (query[:, :, -3:] * channel).view(2, 3, 2, 3, 5) @ key[:, :, None].transpose(-1, -2)
        torch.testing.assert_close(scores[..., j], logits.square().sum((2, 3, 4)).sqrt())


def test_the_best_channels_are_those_of_the_published_rule():
    query, key, _ = draw(D=12)
    mean = query[:, :, -3:].square().mean(2).view(2, 3, 2, 12).mean(2) * key.square().mean(2)
    gone = mean.topk(int(12 * 0.4), largest=False).indices
    kept = best(key_scores(QUERY, query, key, 0), kept_count(12, 0.6))
    for b in range(2):
        for g in range(3):
            assert sorted([*kept[b, g].tolist(), *gone[b, g].tolist()]) == list(range(12))


def test_the_order_of_tokens_does_not_matter():
    query, key, _ = draw()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(key_scores(QUERY, query, key[:, :, order], 0), key_scores(QUERY, query, key, 0))


def test_a_query_channel_that_grows_as_its_key_channel_shrinks_scores_the_same():
    query, key, _ = draw()
    factor = torch.tensor([0.1, 3.0, 1.0, 20.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(key_scores(QUERY, query * factor, key / factor, 0), key_scores(QUERY, query, key, 0))
    size = dataclasses.replace(QUERY, score="key_norm")
    assert not torch.allclose(key_scores(size, query, key / factor, 0), key_scores(size, query, key, 0))


def test_the_channel_that_carries_the_signal_stays():
    query, key, _ = draw(D=8)
    query[..., 2] *= 1000.0
    assert (best(key_scores(QUERY, query, key, 0), 1) == 2).all()
    size = dataclasses.replace(QUERY, score="key_norm")
    assert (best(key_scores(size, query, key, 0), 1) != 2).all()


@pytest.mark.parametrize("score", ["query", "key_norm", "random", "value"])
def test_a_padded_row_scores_like_the_row_alone(score):
    query, key, value = draw()
    mask, real = left_padding()
    query[1, :, :4], key[1, :, :4] = 1e3, -1e3  # what padding leaves behind must not count
    settings = dataclasses.replace(QUERY, score="query" if score == "value" else score)
    if score == "value":
        together = value_scores(settings, query, key, value, mask, 0.4, queries=real)
        alone = value_scores(settings, query[1:, :, 4:], key[1:, :, 4:], value[1:, :, 4:], None, 0.4)
    else:
        together = key_scores(settings, query, key, 3, columns=real_columns(mask, 3), queries=real)
        alone = key_scores(settings, query[1:, :, 4:], key[1:, :, 4:], 3)
    torch.testing.assert_close(together[1:], alone)


def test_random_channels_differ_by_layer_and_seed_and_not_by_row():
    query, key, _ = draw(D=32)
    random = dataclasses.replace(QUERY, score="random")
    scores = key_scores(random, query, key, 0)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores, key_scores(random, query, key, 0))
    assert not torch.equal(scores, key_scores(random, query, key, 1))
    assert not torch.equal(scores, key_scores(dataclasses.replace(random, seed=1), query, key, 0))


def test_value_scores_are_the_norms_of_explicit_outputs():
    query, key, value = draw(n=4)
    scores = value_scores(QUERY, query, key, value, None, 0.4)
    for b in range(2):
        for g in range(3):
            total = torch.zeros(5, dtype=torch.float64)
            for h in (2 * g, 2 * g + 1):
                for t in (1, 2, 3):  # the latest three of four queries
                    sees = 7 - 4 + t + 1
                    weights = (key[b, g, :sees] @ query[b, h, t] * 0.4).softmax(-1)
                    total += (weights @ value[b, g, :sees]).square()
            torch.testing.assert_close(scores[b, g], total.sqrt())


@pytest.mark.parametrize(
    ("width", "keep", "round_to", "count"),
    [(128, 0.6, 1, 77), (64, 0.6, 1, 39), (10, 0.9, 1, 9), (64, 0.6, 16, 48), (64, 0.99, 16, 64), (4, 0.01, 1, 1),
     (5, 1.0, 1, 5)],
)  # fmt: skip
def test_the_share_that_goes_is_rounded_down_as_published(width, keep, round_to, count):
    assert kept_count(width, keep, round_to) == count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 1.2}, "keep is 1.2"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"value_keep": 0.0}, "value_keep is 0.0"),
        ({"score": "queries"}, "'queries' is unknown.*query, key_norm, random"),
        ({"recover": "median"}, "'median' is unknown"),
        ({"recent": -1}, "recent is -1"),
        ({"obs_window": 0}, "obs_window is 0"),
        ({"every": 0}, "every is 0"),
        ({"round_to": 0}, "round_to is 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        KeyChannels(**settings)
