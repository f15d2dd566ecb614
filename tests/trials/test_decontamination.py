from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.trials.conftest import arm_of
from trialist.trials.decontamination import DecontaminationTrial, passages

SMALL = {
    "items": 5, "item_words": 12, "copies": 2, "train_bytes": 6_000, "layers": 1, "width": 16, "heads": 2, "length": 64,
    "batch": 2, "steps": 4,
}  # fmt: skip
ITEMS = [" ".join(f"w{item}x{word}" for word in range(30)) for item in range(40)]
ROWS = [" ".join(f"r{row}x{word}" for word in range(50)) for row in range(60)]


@pytest.fixture
def trial(text_file):
    return DecontaminationTrial(data=text_file, **SMALL)


def test_all_arms_take_the_same_steps_and_only_their_rows_differ(trial, run_arm):
    trial.check()
    for setting in ("edited copies", "copies of other items"):
        outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting}
        assert {outcome.cost.steps for outcome in outcomes.values()} == {4}
        left = {name: outcome.metrics["planted_rows_left"] for name, outcome in outcomes.items()}
        assert (left["planted"], left["clean"]) == (1.0, 0.0)
        assert left["n-grams removed"] < left["exact copies removed"]


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = arm_of(trial, "n-grams removed", "edited copies")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_removal_by_ngrams_finds_edited_copies_and_removal_of_copies_only_whole_ones(trial):
    trial = dataclasses.replace(trial, copies=3)
    rows, planted = trial.plant(ROWS, ITEMS, np.random.default_rng(0))
    whole = np.array([any(item in row for item in ITEMS) for row in rows])
    assert (planted.sum(), len(rows)) == (120, 180)
    assert 0 < whole.sum() < 60
    assert trial.kept("planted", rows, planted, ITEMS).all()
    assert np.array_equal(trial.kept("exact copies removed", rows, planted, ITEMS), ~whole)
    kept = trial.kept("n-grams removed", rows, planted, ITEMS)
    assert kept[~planted].all()
    assert kept[planted].mean() < 0.4
    assert np.array_equal(trial.kept("clean", rows, planted, ITEMS), ~planted)


def test_at_coverage_one_the_treatment_is_the_control(trial, run_arm):
    neutral = dataclasses.replace(trial, coverage=1.0)
    treated, control = (
        run_arm(neutral, arm_of(neutral, name, "edited copies")) for name in ("n-grams removed", "planted")
    )
    assert treated.metrics == control.metrics


def test_passages_do_not_overlap_and_too_few_are_refused():
    words = [f"w{number}" for number in range(100)]
    found = passages([" ".join(words)], 4, 10, "own.txt")
    assert [len(passage.split()) for passage in found] == [10] * 4
    assert len({word for passage in found for word in passage.split()}) == 40
    with pytest.raises(
        ValueError, match=r"own\.txt: its test split holds 5 passages of 10 words, 6 are needed; lower --items"
    ):
        passages([" ".join(words)], 6, 10, "own.txt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"items": 0}, "--items must be at least 1"),
        ({"item_words": 7}, "--item-words 7 must be at least --n 8"),
        ({"replaced": 1.5}, "--replaced is a share from 0 to 1"),
        ({"width": 15}, "--width 15 must be a multiple of --heads 2"),
        ({"items": 5_000}, "15000 are needed; lower --items"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, given, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **given).check()
