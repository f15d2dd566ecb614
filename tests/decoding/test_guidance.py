"""Contrastive guidance: the rule, on distributions worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trialist.decoding import ContrastiveGuidance

P_0, P_1, P_2 = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]


def logits(*distributions: list[float]) -> list[Tensor]:
    """Logits of distributions, each up to a constant of its own."""
    return [torch.tensor([p]).log() + 3.7 * number for number, p in enumerate(distributions)]


def distribution(option: ContrastiveGuidance, *p: list[float], past: Any = (), first: bool = False) -> Tensor:
    return option.combine(logits(*p), past, first)[0].double().softmax(-1)[0]


def expected(weights: list[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def near(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=1e-6)


def test_opad_is_the_conditioned_policy_times_the_exponential_of_the_reward():
    for beta in (0.5, 1.0, 3.0):
        option = ContrastiveGuidance.opad([[[1]]], beta, "token")
        weights = [c * math.exp(math.log(c / p) / beta) for p, c in zip(P_0, P_1)]
        assert near(distribution(option, P_0, P_1), expected(weights))


def test_the_four_names_of_a_strength_agree():
    named = [
        ContrastiveGuidance.opad([[[1]]], 2.0, "token"),
        ContrastiveGuidance.classifier_free([[[1]]], 1.5),
        ContrastiveGuidance.context_aware([[[1]]], 0.5),
        ContrastiveGuidance([[[1]]], 0.5),
    ]
    assert len({option.coefficients for option in named}) == 1
    assert named[0].coefficients == (-0.5, 1.5)


def test_two_steps_by_hand():
    past = [torch.tensor([[0.4, -0.2, 0.1]])]
    option = ContrastiveGuidance.opad([[[1]]], 1.0, "two_step")
    weights = [c * c / p * math.exp(d) for p, c, d in zip(P_0, P_1, (0.4, -0.2, 0.1))]
    found, change = option.combine(logits(P_0, P_1), past)
    assert near(found.double().softmax(-1)[0], expected(weights))
    assert near(change[0].double(), torch.tensor([math.log(c / p) for p, c in zip(P_0, P_1)], dtype=torch.float64))


def test_principles_add_up_by_weight_and_a_negative_one_leads_away():
    option = ContrastiveGuidance([[[1]], [[2]]], 1.0, weights=(0.75, -0.25))
    weights = [p * (c / p) ** 1.5 * (d / p) ** -0.5 for p, c, d in zip(P_0, P_1, P_2)]
    assert near(distribution(option, P_0, P_1, P_2), expected(weights))


def test_without_strength_several_principles_are_their_geometric_mean():
    option = ContrastiveGuidance([[[1]], [[2]]], 0.0)
    weights = [math.sqrt(c * d) for c, d in zip(P_1, P_2)]
    assert not option.needed[0]
    assert near(option.combine([None, *logits(P_1, P_2)])[0].double().softmax(-1)[0], expected(weights))


def test_contrastive_decoding_as_published_is_the_ratio_among_plausible_tokens():
    option = ContrastiveGuidance(amateur=object(), policy=0.0, mask_alpha=0.5)
    weights = [0.0, 0.3 / 0.3, 0.5 / 0.2]  # 0.2 is less than half of 0.5
    assert near(distribution(option, P_0, P_1), expected(weights))


def test_the_nucleus_is_that_of_the_conditioned_distribution():
    option = ContrastiveGuidance([[[1]]], 1.0, mask_top_p=0.6)
    weights = [0.0, 0.3**2 / 0.3, 0.5**2 / 0.2]
    assert near(distribution(option, P_0, P_1), expected(weights))


def test_constants_added_to_rewards_or_logits_change_no_distribution_and_it_sums_to_one():
    option = ContrastiveGuidance.opad([[[1]]], 0.7)
    past = [torch.tensor([[0.4, -0.2, 0.1]])]
    moved = [x + 11.0 for x in logits(P_0, P_1)]
    found = option.combine(logits(P_0, P_1), past)[0].double().softmax(-1)
    assert torch.allclose(found, option.combine(moved, [past[0] + 5.0])[0].double().softmax(-1), atol=1e-6)
    assert abs(found.sum().item() - 1) < 1e-12


@pytest.mark.parametrize("past", [[], [torch.tensor([[0.4, -0.2, 0.1]])]], ids=["first", "later"])
def test_impossible_tokens_are_numbers_or_impossible_never_nan(past):
    option = ContrastiveGuidance.opad([[[1]]], 0.5)
    both, here, there = distribution(option, [0.0, 0.4, 0.6], [0.0, 0.3, 0.7], past=past), None, None
    assert both[0] == 0
    assert both.isfinite().all()
    here = distribution(option, [0.2, 0.3, 0.5], [0.0, 0.4, 0.6], past=past)
    assert here[0] == 0
    there, change = option.combine(logits([0.0, 0.4, 0.6], [0.1, 0.3, 0.6]), past)
    assert there.isfinite().all()
    assert math.isclose(
        change[0, 0], math.log(0.1 / 0.4), rel_tol=1e-5
    )  # counts as the least probable that is possible


def test_what_both_found_impossible_a_step_ago_says_nothing_now():
    option = ContrastiveGuidance.opad([[[1]]], 1.0)
    change = option.combine(logits([0.0, 0.4, 0.6], [0.0, 0.3, 0.7]))[1]
    assert change[0, 0] == 0


def test_the_end_of_a_text_is_guided_like_any_token():
    end = 2
    shifted = ContrastiveGuidance([[[1]]], 1.0)
    low, high = [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]
    assert near(distribution(shifted, low, high)[end], torch.tensor(0.8 / (0.18 + 0.3 + 0.8), dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strength": math.inf}, "strength=inf"),
        ({"reward": "momentum"}, "reward='momentum': one of token, two_step, official"),
        ({"window": 0}, "window=0"),
        ({"mask_alpha": 1.5}, "mask_alpha=1.5"),
        ({"mask_top_p": 0.0}, "mask_top_p=0.0"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 contexts"),
        ({"policy": 0.0, "strength": 0.0}, "give a strength"),
        ({"amateur": object(), "weights": [-1.0]}, "at least one weight must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused_by_name(values, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        ContrastiveGuidance([[[1]]], **values)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_is_above_zero(beta):
    with pytest.raises(ValueError, match="beta"):
        ContrastiveGuidance.opad([[[1]]], beta)
