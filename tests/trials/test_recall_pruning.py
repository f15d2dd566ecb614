from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trials.conftest import arm_of, model_folder
from trialist.engine.contract import Outcome
from trialist.trials.recall_pruning import RecallPruningTrial, read

SMALL = {"layers": 1, "width": 16, "heads": 2, "fewest": 2, "most": 30, "batch": 8, "steps": 4, "test_items": 20}


@pytest.fixture
def trial():
    return RecallPruningTrial(**SMALL)


def shares_of(outcome):
    return [share for share, _ in outcome.curves["accuracy_by_share_of_bytes"]]


def test_all_arms_spend_the_same_tokens_and_are_read_over_the_same_bytes(trial, run_arm):
    arms = [arm for arm in trial.arms() if arm.setting == "assignment"]
    outcomes = {arm.name: run_arm(trial, arm) for arm in arms}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    for name, outcome in outcomes.items():
        assert {"accuracy_of_pruned", "accuracy_lost_by_pruning", "accuracy_of_full"} <= set(outcome.metrics)
        assert 0 <= outcome.metrics["accuracy_of_pruned"] <= 1
        if name != "full-cache":
            shares = shares_of(outcome)
            assert len(shares) == 8
            assert shares == sorted(shares)
            assert shares[0] <= 1 / 8
            assert shares[-2] >= 1 / 2
            assert outcome.curves["accuracy_by_share_of_bytes"][-1] == (1.0, outcome.metrics["accuracy_of_full"])
    of_full = {name: outcome.metrics["accuracy_of_full"] for name, outcome in outcomes.items()}
    assert of_full["recency"] == of_full["heavy-hitters"] == of_full["full-cache"]
    assert of_full["selective"] == of_full["selective-recency"] == of_full["selective-heavy-hitters"]


def test_arms_of_one_model_share_it(trial, run_arm, tmp_path):
    for name in ("recency", "heavy-hitters", "full-cache"):
        run_arm(trial, arm_of(trial, name, "assignment"))
    assert len(list((tmp_path / "stages").glob("model-*"))) == 1
    run_arm(trial, arm_of(trial, "recency", "chance"))
    assert len(list((tmp_path / "stages").glob("model-*"))) == 2


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    import shutil

    arm = arm_of(trial, "selective", "assignment")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    again = run_arm(trial, arm)
    assert (again.metrics, again.curves) == (first.metrics, first.curves)


def test_runs_that_tune_are_of_the_trained_model_alone(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "selective", "assignment"), seed=trial.tuning.seeds[0])
    assert "validation_loss" in outcome.metrics
    assert "accuracy_by_share_of_bytes" not in outcome.curves


def test_the_null_setting_has_answers_by_chance_and_no_references(trial):
    null = [arm for arm in trial.arms() if arm.setting == "chance"]
    deciding = {arm.name for arm in trial.arms() if arm.setting == "assignment" and arm.role != "reference"}
    assert {arm.name for arm in null} == deciding
    assert all(arm.null and arm.tune is None for arm in null)


def test_the_reading_is_the_mean_over_the_range_and_the_bytes_that_still_give_most_answers():
    points = [(0.0, 1.0), (-0.5, 1.0), (-2.0, 0.96), (-3.5, 0.9)]  # log2 of the share of bytes, share of right answers
    outcome = read(Outcome(), points)
    flat = read(Outcome(), [(0.0, 0.7), (-0.5, 0.6), (-3.5, 0.6)])
    assert flat.metrics["accuracy_of_pruned"] == pytest.approx(0.6)
    assert flat.metrics["accuracy_lost_by_pruning"] == pytest.approx(0.1)
    assert "0.0500 is not reached" in flat.undefined["times_fewer_bytes"]
    assert 0.96 > outcome.metrics["accuracy_of_pruned"] - 0.01 > 0.93
    assert 4.0 < outcome.metrics["times_fewer_bytes"] < 2**3.5


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm, tmp_path):
    from trialist.models import get_budgets, load_model

    trial = RecallPruningTrial(model=llama_folder, **SMALL)
    trial.check()
    run_arm(trial, arm_of(trial, "selective", "assignment"), keep_model=True)
    kept = get_budgets(load_model(str(model_folder(tmp_path))))
    assert len(kept) == 2
    assert len(set(kept)) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sinks": 4}, "--sinks 4: the smallest budget is 4 of 63 tokens"),
        ({"price": -1.0}, "--price -1.0"),
        ({"recent_share": 2.0}, "--recent-share 2.0"),
        ({"fewest": 31}, "--most 30 must be at least --fewest 31"),
        ({"most": 4, "fewest": 2}, "longer sequences by --most"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_runs(trial, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()


@pytest.mark.slow
def test_what_selective_attention_masked_can_go_and_recent_tokens_do_not_do(run_arm):
    torch.manual_seed(0)
    trial = RecallPruningTrial(steps=500, fewest=2, most=16, test_items=128, layers=2, learning_rate=2e-3)
    accuracy = {
        name: run_arm(trial, arm_of(trial, name, "assignment")).metrics["accuracy_of_pruned"]
        for name in ("selective", "selective-recency")
    }
    assert accuracy["selective"] > accuracy["selective-recency"] + 0.05
