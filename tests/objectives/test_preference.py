"""The family of preference losses: formulas against hand-written sums, and its members against each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trialist.objectives.preference import D2PO, METHODS, Preference, preference_loss, token_weights

LENGTHS = ((4, 6), (5, 2), (3, 3))
"""Tokens of the chosen and of the rejected answer of each pair"""
WIDTHS = (7, 6)
ALPHA: dict[str, Any] = {"r-dpo": {"alpha": 0.07}, "ld-dpo": {"alpha": 0.4}}


def pairs(seed: int = 0, lengths: Any = LENGTHS, left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """Log-probabilities whose padding holds what must not count."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for side, name in enumerate(("chosen", "rejected")):
        width = WIDTHS[side] + extra
        mask = torch.zeros(len(lengths), width, dtype=torch.bool)
        for kind in ("logps", "ref"):
            values = torch.full((len(lengths), width), 1e6, dtype=torch.float64)
            for row, size in enumerate(lengths):
                place = slice(width - size[side], None) if left else slice(0, size[side])
                values[row, place] = -3 * torch.rand(size[side], generator=generator, dtype=torch.float64)
                mask[row, place] = True
            tensors[f"{name}_logps" if kind == "logps" else f"ref_{name}_logps"] = values
        tensors[f"{name}_mask"] = mask
    return tensors


def answers(tensors: dict[str, Tensor], name: str, ref: bool = True) -> list[list[float]]:
    """Log-ratios of each answer as lists of numbers."""
    values = tensors[f"{name}_logps"] - (tensors[f"ref_{name}_logps"] if ref else 0)
    return [row[mask].tolist() for row, mask in zip(values, tensors[f"{name}_mask"], strict=True)]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_is_the_sum_over_pairs_worked_by_hand() -> None:
    tensors = pairs()
    expected = sum(
        softplus(-0.3 * (sum(w) - sum(r))) for w, r in zip(answers(tensors, "chosen"), answers(tensors, "rejected"))
    )
    loss, stats = preference_loss(**tensors, method="dpo", beta=0.3)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert int(stats["weight"]) == 3
    assert float(stats["reward_margin"]) == pytest.approx(float(stats["chosen_reward"] - stats["rejected_reward"]))


@pytest.mark.parametrize("start", [0, 1])
def test_d2po_discounts_each_token_by_its_place_in_the_answer(start: int) -> None:
    tensors = pairs()

    def total(ratios: list[float]) -> float:
        return sum(0.7 ** (t + start) * ratio for t, ratio in enumerate(ratios))

    expected = sum(
        softplus(-0.3 * (total(w) - total(r))) for w, r in zip(answers(tensors, "chosen"), answers(tensors, "rejected"))
    )
    loss, _ = preference_loss(**tensors, method="d2po", beta=0.3, gamma=0.7, exponent_start=start)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_simpo_is_the_difference_of_means_against_a_margin() -> None:
    tensors = {name: tensor for name, tensor in pairs().items() if not name.startswith("ref")}
    chosen, rejected = (
        [sum(values) / len(values) for values in answers({**pairs()}, name, ref=False)]
        for name in ("chosen", "rejected")
    )
    expected = sum(softplus(-(2.0 * (w - r) - 1.2)) for w, r in zip(chosen, rejected))
    loss, _ = preference_loss(**tensors, method="simpo", beta=2.0, margin=1.2)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_r_dpo_counts_the_difference_of_lengths() -> None:
    tensors = pairs()
    expected = 0.0
    for w, r in zip(answers(tensors, "chosen"), answers(tensors, "rejected")):
        expected += softplus(-(0.1 * (sum(w) - sum(r)) + 0.07 * (len(w) - len(r))))
    assert float(preference_loss(**tensors, method="r-dpo", alpha=0.07)[0]) == pytest.approx(expected, rel=1e-12)


def test_ld_dpo_weighs_tokens_beyond_the_shorter_answer_by_alpha() -> None:
    mask = pairs()["chosen_mask"]
    weights = token_weights(mask, torch.tensor([4, 2, 3]), torch.float64, "ld-dpo", alpha=0.4)
    assert weights.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 0.4, 0.4, 0.4, 0, 0], [1, 1, 1, 0, 0, 0, 0]]


def test_ld_dpo_is_the_sum_with_its_weights_worked_by_hand() -> None:
    tensors = pairs()

    def total(ratios: list[float], other: list[float]) -> float:
        shared = min(len(ratios), len(other))
        return sum(ratios[:shared]) + 0.4 * sum(ratios[shared:])

    expected = sum(
        softplus(-0.3 * (total(w, r) - total(r, w)))
        for w, r in zip(answers(tensors, "chosen"), answers(tensors, "rejected"))
    )
    loss, _ = preference_loss(**tensors, method="ld-dpo", beta=0.3, alpha=0.4)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({"method": "d2po", "gamma": 0.7, "normalize": "weights"}, lambda n: sum(0.7**t for t in range(n))),
        ({"method": "d2po", "gamma": 0.7, "normalize": "length"}, lambda n: n),
    ],
    ids=["weights", "length"],
)
def test_decayed_sums_are_divided_by_what_was_asked_for(options: dict[str, Any], divisor: Any) -> None:
    tensors = pairs()

    def score(ratios: list[float]) -> float:
        return sum(0.7**t * ratio for t, ratio in enumerate(ratios)) / divisor(len(ratios))

    expected = sum(
        softplus(-2.0 * (score(w) - score(r))) for w, r in zip(answers(tensors, "chosen"), answers(tensors, "rejected"))
    )
    assert float(preference_loss(**tensors, beta=2.0, **options)[0]) == pytest.approx(expected, rel=1e-12)


def test_sampo_costs_what_one_of_the_choices_of_tokens_costs_and_takes_each() -> None:
    tensors = pairs(lengths=((4, 2),))
    (longer,), (shorter,) = answers(tensors, "chosen"), answers(tensors, "rejected")
    choices = [softplus(-0.3 * (sum(chosen) - sum(shorter))) for chosen in itertools.combinations(longer, 2)]
    taken = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        loss = float(preference_loss(**tensors, method="sampo", beta=0.3, generator=generator)[0])
        nearest = min(range(6), key=lambda index: abs(choices[index] - loss))
        assert loss == pytest.approx(choices[nearest], rel=1e-12)
        taken.add(nearest)
    assert taken == set(range(6))


def test_sums_of_bfloat16_are_taken_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-2 * torch.rand(1, 1000, generator=generator) for _ in range(2))
    mask = torch.ones(1, 1000, dtype=torch.bool)
    rounded = chosen.bfloat16(), rejected.bfloat16()
    exact = 0.1 * float((rounded[0].double() - rounded[1].double()).sum())
    loss, stats = preference_loss(*rounded, mask, mask, method="dpo")
    assert loss.dtype == torch.float32
    assert float(stats["reward_margin"]) == pytest.approx(exact, rel=1e-4)


def test_sampo_takes_as_many_tokens_of_the_longer_answer_as_the_shorter_has() -> None:
    mask = pairs()["chosen_mask"]
    shorter = torch.tensor([4, 2, 3])
    draws = torch.stack(
        [
            token_weights(mask, shorter, torch.float64, "sampo", generator=torch.Generator().manual_seed(seed))
            for seed in range(400)
        ]
    )
    assert torch.equal(draws.sum(-1), shorter.double().expand(400, 3))
    assert not draws[:, ~mask].any()
    torch.testing.assert_close(draws[:, 1, :5].mean(0), torch.full((5,), 0.4).double(), atol=0.1, rtol=0)


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    tensors = pairs()
    plain, _ = preference_loss(**tensors, method="dpo")
    flipped, _ = preference_loss(**swapped(tensors), method="dpo")
    smoothed, _ = preference_loss(**tensors, method="dpo", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * flipped)


# neutral settings


@pytest.mark.parametrize(
    "neutral",
    [
        {"method": "d2po", "gamma": 1.0},
        {"method": "d2po", "gamma": 1.0, "exponent_start": 1},
        {"method": "ld-dpo", "alpha": 1.0},
        {"method": "r-dpo", "alpha": 0.0},
    ],
    ids=str,
)
def test_loss_and_gradient_of_the_neutral_setting_are_those_of_dpo_to_the_bit(neutral: dict[str, Any]) -> None:
    results = []
    for options in (neutral, {"method": "dpo"}):
        tensors = pairs()
        learned = [tensors[f"{name}_logps"].requires_grad_() for name in ("chosen", "rejected")]
        loss, _ = preference_loss(**tensors, **options)
        results.append((loss, *torch.autograd.grad(loss, learned)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_sampo_on_answers_of_equal_length_is_dpo() -> None:
    tensors = pairs(lengths=((3, 3), (5, 5)))
    assert torch.equal(preference_loss(**tensors, method="sampo")[0], preference_loss(**tensors, method="dpo")[0])


def test_decay_divided_by_its_weights_at_gamma_one_is_simpo() -> None:
    tensors = {name: tensor for name, tensor in pairs().items() if not name.startswith("ref")}
    found, _ = preference_loss(**tensors, method="d2po", gamma=1.0, normalize="weights", beta=2.0, margin=1.0)
    torch.testing.assert_close(found, preference_loss(**tensors, method="simpo", beta=2.0, margin=1.0)[0])


def test_counting_from_one_is_a_beta_times_gamma() -> None:
    tensors = pairs()
    official, _ = preference_loss(**tensors, beta=0.5, gamma=0.8, exponent_start=1)
    torch.testing.assert_close(official, preference_loss(**tensors, beta=0.5 * 0.8, gamma=0.8)[0], rtol=1e-12, atol=0)


def test_gradients_fall_by_gamma_from_token_to_token() -> None:
    tensors = pairs()
    tensors["chosen_logps"].requires_grad_()
    preference_loss(**tensors, gamma=0.9)[0].backward()
    gradient = tensors["chosen_logps"].grad
    assert gradient is not None
    torch.testing.assert_close(gradient[1, :5] / gradient[1, 0], 0.9 ** torch.arange(5.0).double(), rtol=1e-12, atol=0)


def test_a_vanishing_gamma_looks_at_the_first_token_only() -> None:
    tensors = pairs()
    first = (answers(tensors, "chosen"), answers(tensors, "rejected"))
    expected = sum(softplus(-0.1 * (w[0] - r[0])) for w, r in zip(*first))
    assert float(preference_loss(**tensors, gamma=1e-12)[0]) == pytest.approx(expected, rel=1e-9)


def test_long_answers_underflow_to_zero_weight_not_to_a_broken_loss() -> None:
    logps = torch.full((1, 1500), -2.0, requires_grad=True)
    mask = torch.ones(1, 1500, dtype=torch.bool)
    loss, _ = preference_loss(logps, logps.detach() - 1, mask, mask, gamma=0.5)
    loss.backward()
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    assert float(loss.detach()) == pytest.approx(softplus(-0.1 * 2.0), rel=1e-6)  # 1 + 1/2 + 1/4 + ... = 2


# invariances


@pytest.mark.parametrize("method", METHODS)
def test_padding_on_either_side_and_more_of_it_change_nothing(method: str) -> None:
    if method == "sampo":
        lengths: Any = ((4, 4), (2, 2))  # no draw: another width would draw other tokens
    else:
        lengths = LENGTHS
    options = {"method": method, **ALPHA.get(method, {})}
    found = [
        preference_loss(**without_reference(pairs(0, lengths, left, extra), method), **options)[0]
        for left, extra in ((False, 0), (True, 0), (True, 3))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("simpo", "r-dpo")])
def test_a_policy_that_is_the_reference_costs_ln_2_a_pair(method: str) -> None:
    tensors = pairs()
    tensors |= {f"ref_{name}_logps": tensors[f"{name}_logps"].clone() for name in ("chosen", "rejected")}
    loss, stats = preference_loss(**tensors, method=method, **ALPHA.get(method, {}))
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-12)
    assert float(stats["accuracy"]) == 1.5


def test_swapping_the_answers_flips_the_sign_of_the_logit() -> None:
    tensors = pairs(lengths=((4, 6),))
    plain, stats = preference_loss(**tensors)
    back, flipped = preference_loss(**swapped(tensors))
    assert float(back - plain) == pytest.approx(
        float(stats["reward_margin"]), rel=1e-9
    )  # softplus(u) - softplus(-u) = u
    assert float(flipped["reward_margin"]) == -float(stats["reward_margin"])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_exact_in_float64(method: str) -> None:
    tensors = without_reference(pairs(), method)
    masks = tensors["chosen_mask"], tensors["rejected_mask"]
    references = tensors.get("ref_chosen_logps"), tensors.get("ref_rejected_logps")

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return preference_loss(
            chosen, rejected, *masks, *references, method=method, generator=generator, **ALPHA.get(method, {})
        )[0]

    inputs = [tensors[f"{name}_logps"].masked_fill(~mask, -1.0).requires_grad_() for name, mask in
              zip(("chosen", "rejected"), masks, strict=True)]  # fmt: skip
    assert torch.autograd.gradcheck(loss, inputs)


# bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], not 0.0; 1 is DPO"),
        ({"gamma": 1.1}, r"gamma must be in \(0, 1\]"),
        ({"gamma": math.nan}, r"gamma must be in \(0, 1\]"),
        ({"method": "dpo", "gamma": 0.5}, "belong to d2po; method dpo has none"),
        ({"method": "simpo", "exponent_start": 1}, "belong to d2po; method simpo has none"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"exponent_start": 2}, "exponent_start is 0"),
        ({"method": "ppo"}, "unknown method 'ppo'; there are dpo, d2po"),
        ({"method": "r-dpo"}, "r-dpo needs alpha; 0 is DPO"),
        ({"method": "ld-dpo", "alpha": 1.5}, r"alpha of ld-dpo must be in \[0, 1\]"),
        ({"alpha": 0.5}, "method d2po has none"),
        ({"normalize": "tokens"}, "normalize must be"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
    ],
)
def test_parameters_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preference_loss(**pairs(), **options)
    with pytest.raises(ValueError, match=words):
        Preference(**{"method": "d2po", **options})


def test_an_answer_without_tokens_is_named_by_its_example() -> None:
    tensors = pairs()
    tensors["rejected_mask"][1] = False
    with pytest.raises(ValueError, match="example 1: its rejected answer has no token"):
        preference_loss(**tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("column", "who"), [("chosen_logps", "the model"), ("ref_chosen_logps", "the reference")])
def test_what_is_not_finite_is_named_by_its_example_and_padding_may_hold_anything(
    column: str, who: str, value: float
) -> None:
    tensors = pairs()
    tensors[column][2, 4] = value  # padding
    assert preference_loss(**tensors)[0].isfinite()
    tensors[column][2, 1] = value
    with pytest.raises(
        ValueError, match=f"example 2: log-probabilities of its chosen answer under {who} are not finite"
    ):
        preference_loss(**tensors)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    tensors = pairs()
    with pytest.raises(ValueError, match="chosen: the mask has shape"):
        preference_loss(**{**tensors, "chosen_mask": tensors["chosen_mask"][:, 1:]})
    with pytest.raises(ValueError, match="or of neither"):
        preference_loss(**{**tensors, "ref_rejected_logps": None})
    with pytest.raises(ValueError, match="simpo has no reference"):
        preference_loss(**tensors, method="simpo")


def test_a_half_life_is_a_gamma() -> None:
    assert D2PO(half_life=10).decay ** 10 == pytest.approx(0.5)
    assert D2PO().decay == 0.98
    with pytest.raises(ValueError, match="give one of them"):
        D2PO(gamma=0.9, half_life=10)
    with pytest.raises(ValueError, match="half_life is a number of tokens > 0"):
        D2PO(half_life=0)


def test_a_half_life_belongs_to_d2po() -> None:
    with pytest.raises(ValueError, match="gamma, half_life and exponent_start belong to d2po; method dpo has none"):
        Preference("dpo", half_life=3)


@pytest.mark.parametrize(
    ("method", "normalize", "beta"),
    [
        ("dpo", None, 0.1), ("d2po", None, 0.1), ("dpo-norm", None, 5.0), ("simpo", None, 2.0), ("dpo", "length", 5.0),
        ("d2po", "weights", 5.0), ("dpo-norm", "none", 0.1), ("simpo", "none", 0.1), ("simpo", "weights", 2.0),
    ],
)  # fmt: skip
def test_beta_follows_what_sums_are_divided_by(method: str, normalize: str | None, beta: float) -> None:
    assert Preference(method, normalize=normalize).temperature == beta
    tensors = without_reference(pairs(), method)
    found, given = (preference_loss(**tensors, method=method, normalize=normalize, beta=b)[0] for b in (None, beta))
    assert torch.equal(found, given)


def test_methods_without_a_reference_say_so() -> None:
    assert D2PO().method == "d2po"
    assert not Preference("simpo").needs_reference
    assert not D2PO(reference_free=True).needs_reference


def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {
        name.replace(side, other[side]): tensor for name, tensor in tensors.items() for side in other if side in name
    }


def without_reference(tensors: dict[str, Tensor], method: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if method != "simpo" or not name.startswith("ref")}
