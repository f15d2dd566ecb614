from __future__ import annotations

import random

import pytest

from trialist.decoding.budget_forcing.baselines import (
    class_conditional,
    majority_vote,
    rejection_sample,
    step_conditional,
    token_conditional,
    until_spent,
)


def test_limits_stand_in_the_prompt_in_tokens_and_in_steps_of_a_hundred():
    question = "What is {x} in {limit} + 1?"
    assert token_conditional(question, 250).startswith(question)
    assert "250 tokens" in token_conditional(question, 250)
    assert "2 steps" in step_conditional(question, 250)
    assert "1 steps" in step_conditional(question, 30)
    assert step_conditional(question, 90, "{question} in {limit} lines", per_step=30) == f"{question} in 3 lines"
    assert class_conditional(question, "short") != class_conditional(question, "long")
    assert class_conditional("q", "short", {"short": "{question}!"}) == "q!"


def test_rejection_sampling_asks_again_for_those_that_do_not_fit_and_counts_every_try():
    lengths = {0: [9, 9, 2], 1: [1], 2: [9, 9, 9, 9]}
    asked = []

    def draw(numbers):
        asked.append(list(numbers))
        return [lengths[number][len(asked) - 1] for number in numbers]

    found = rejection_sample(draw, 3, lambda length: length <= 3, lambda length: length, most=4)
    assert asked == [[0, 1, 2], [0, 2], [0, 2], [2]]
    assert [(one.sample, one.tries, one.tokens) for one in found] == [(2, 3, 20), (1, 1, 1), (None, 4, 36)]


def test_the_price_of_rejection_is_one_over_the_chance_to_fit():
    draw = random.Random(0)
    found = rejection_sample(
        lambda numbers: [draw.randrange(5) for _ in numbers], 4000, lambda x: x == 0, lambda x: 1, most=200
    )
    assert sum(one.tries for one in found) / 4000 == pytest.approx(5, abs=0.3)  # geometric, sd sqrt(20 / 4000) = 0.07
    assert all(one.sample == 0 for one in found)


def test_the_majority_decides_the_earliest_among_equals_and_the_silent_do_not_vote():
    assert majority_vote(["a", "b", "b"]) == "b"
    assert majority_vote(["b", "a", "a", "b"]) == "b"
    assert majority_vote([None, None, "c"]) == "c"
    assert majority_vote([None]) is None
    assert majority_vote([]) is None


def test_as_many_samples_as_reach_the_budget():
    assert until_spent([4, 4, 4], 8) == 2
    assert until_spent([4, 4, 4], 9) == 3
    assert until_spent([4, 4, 4], 1) == 1
    with pytest.raises(ValueError, match="3 samples have 12 tokens, fewer than 13"):
        until_spent([4, 4, 4], 13)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: token_conditional("q", 0), "at least 1, not 0"),
        (lambda: token_conditional("q", 9, "{question}"), "has no {limit}"),
        (lambda: token_conditional("q", 9, "{limit}"), "has no {question}"),
        (lambda: step_conditional("q", 9, per_step=0), "per_step"),
        (lambda: class_conditional("q", "medium"), "one of short, long"),
        (lambda: rejection_sample(lambda numbers: [], 1, bool, int, most=2), "0 samples for 1 prompts"),
        (lambda: rejection_sample(lambda numbers: [], 1, bool, int, most=0), "most must be"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
