from __future__ import annotations

import re

import numpy as np
import pytest

from trialist.data.words import Words
from trialist.trials._edited_copies import EDITS, NUMBERS, copies_of
from trialist.trials._removal import COPIES, RULES, recalls, removed

LETTERS = "abcdefghijklmnopqrstuvwxy"
ITEMS = [(" ".join(f"{item}{half}q{word}" for half in "uv" for word in LETTERS),) for item in LETTERS[:5]]
"""Texts of 50 words that all differ, also where numbers are all alike"""
QUESTION = (
    "Ann has 12 pears, gives 12 to Bo and buys two. How many pears are there? Don't guess 007.",
    "12 - 12 + 2 = 2",
)


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_question_leave_the_answer_but_for_its_numbers(edit) -> None:
    question, answer = EDITS[edit](QUESTION, draw())
    assert (question == QUESTION[0]) == (edit == "verbatim")
    assert (answer == QUESTION[1]) == (edit != "numbers swapped")


def test_case_and_punctuation_leave_the_words_that_are_compared() -> None:
    words = Words()
    for seed in range(20):
        (question, _) = EDITS["restyled"](QUESTION, draw(seed))
        assert question != QUESTION[0]
        assert words.split(question) == words.split(QUESTION[0])


def test_a_number_is_another_of_as_many_digits_wherever_it_stands() -> None:
    for seed in range(20):
        question, answer = EDITS["numbers swapped"](QUESTION, draw(seed))
        before, after = (re.findall(r"\d+|[^\d]+", " | ".join(texts)) for texts in (QUESTION, (question, answer)))
        swapped = {(old, new) for old, new in zip(before, after, strict=True) if old.isdigit()}
        assert {old for old, _ in swapped} == {"12", "007", "2"}
        assert len(swapped) == 3
        assert all(old != new and len(old) == len(new) and new[0] != "0" for old, new in swapped)
        words = [(old, new) for old, new in zip(QUESTION[0].split(), question.split(), strict=True) if old == "two."]
        assert words[0][1] != "two."
        assert words[0][1].rstrip(".") in NUMBERS


def test_dropped_words_leave_the_others_in_order() -> None:
    item = (" ".join(map(str, range(2_000))), "")
    left = [int(word) for word in EDITS["15 % dropped"](item, draw())[0].split()]
    assert left == sorted(left)
    assert 1_600 < len(left) < 1_800


def test_phrases_are_reworded_whole_and_keep_their_capital() -> None:
    assert EDITS["reworded"](("How many of the otters? A lot.",), draw()) == (
        "What number of out of this otters? One lot.",
    )


def test_copies_take_the_edits_in_turn() -> None:
    made = copies_of([("a b",), ("c d",)], ("verbatim", "restyled"), 3, draw())
    assert [row[0].lower() for row in made] == ["a b"] * 3 + ["c d"] * 3
    assert [made[place] for place in (0, 2, 3, 5)] == [("a b",), ("a b",), ("c d",), ("c d",)]


def test_one_word_of_many_makes_a_copy_that_is_not_verbatim() -> None:
    item = " ".join(f"w{word}" for word in range(1_100))
    rows = [(f"see {item} there",), (item.replace(" w700 ", " other "),), ("w1 w2 w3",)]
    assert removed("full-string", rows, [(item,)]).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("rule", "least"),
    [("tulu3", 26), ("longest", 26), ("gpt3", 13), ("open-r1", 8), ("full-string", 50), ("datatrove", 12)],
)
def test_a_rule_removes_rows_from_its_least_run_of_shared_words_on(rule, least) -> None:
    words = ITEMS[3][0].split()
    rows = [(" ".join(["x", *words[5 : 5 + size], "y"]),) for size in range(len(words) - 4)] + [ITEMS[3]]
    sizes = [*range(len(words) - 4), 50]
    assert removed(rule, rows, ITEMS).tolist() == [size >= least for size in sizes]


def test_two_short_runs_cover_half_of_an_item_and_are_no_long_run() -> None:
    words = ITEMS[0][0].split()
    row = (" ".join([*words[:12], "x", *words[20:34]]),)  # 26 of 50 words
    found = {rule: bool(removed(rule, [row], ITEMS)[0]) for rule in RULES}
    assert found == {
        "full-string": False,
        "datatrove": True,
        "tulu3": True,
        "gpt3": True,
        "open-r1": True,
        "longest": False,
    }


def test_rules_look_at_the_question_alone() -> None:
    rows = [("another question", ITEMS[0][0]), (ITEMS[0][0], "another answer")]
    assert removed("open-r1", rows, [(*ITEMS[0], "its answer")]).tolist() == [False, True]


def test_recall_is_that_of_looking_for_each_copy_by_itself() -> None:
    """Of items whose words all differ, a copy is found by `open-r1` when 8 words that stood together still do."""
    _, by_share = recalls("open-r1", ITEMS, draw(5))
    again = draw(5)
    for edit in ("restyled", "numbers swapped", "reworded"):
        copies_of(ITEMS, (edit,), COPIES, again)
    for share, found in by_share:
        chances = again.random((len(ITEMS) * COPIES, 50))
        left = [np.flatnonzero(row >= share) for row in chances]
        assert found == np.mean([(places[7:] - places[:-7] == 7).any() for places in left])


def test_whole_copies_are_all_found_and_heavily_edited_ones_are_not() -> None:
    for rule in RULES:
        by_edit, by_share = recalls(rule, ITEMS[:3], draw())
        shares = dict(by_share)
        assert shares[0.0] == 1.0
        assert shares[0.4] < (0.5 if rule == "open-r1" else 0.2)
        assert by_edit["reworded"] == 1.0  # of words that no template knows


def test_numbers_hide_an_item_from_rules_that_tell_them_apart() -> None:
    item = ("Ann has 12 pears and 14 plums and 16 figs and 18 nuts and 20 dates and 22 limes and 24 kiwis",)
    swapped = [EDITS["numbers swapped"](item, draw())]
    found = {rule: bool(removed(rule, swapped, [item])[0]) for rule in RULES}
    assert [rule for rule, one in found.items() if one] == ["datatrove"]


def test_n_and_coverage_are_those_given() -> None:
    words = ITEMS[1][0].split()
    rows = [(" ".join(words[:size]),) for size in (4, 5, 20)]
    assert removed("tulu3", rows, ITEMS, n=5, coverage=0.05).tolist() == [False, True, True]
    assert not removed("tulu3", rows, ITEMS, coverage=1.0).any()
