from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.trials._symbols import accuracy, symbol_ids
from trialist.trials.selective_recall import SelectiveRecallTrial

SMALL = {"layers": 1, "width": 16, "heads": 2, "fewest": 2, "most": 3, "batch": 16, "steps": 15, "test_items": 7}


@pytest.fixture
def trial():
    return SelectiveRecallTrial(**SMALL)


def test_all_arms_spend_the_same_tokens_and_are_asked_at_three_lengths(trial, run_arm):
    for setting in ("assignment", "copying"):
        outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting]
        assert len({outcome.cost.tokens for outcome in outcomes}) == 1
        for outcome in outcomes:
            assert set(outcome.metrics) == {"accuracy_1x", "accuracy_2x", "accuracy_4x", "validation_loss"}
            assert 0 <= outcome.metrics["accuracy_4x"] <= 1


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = arm_of(trial, "selective", "assignment")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_the_symbols_are_distinct_ids_of_any_vocabulary():
    for vocabulary in (16, 17, 259, 49_152):
        ids = symbol_ids(vocabulary, 16)
        assert len(set(ids.tolist())) == 16
        assert 0 <= min(ids) <= max(ids) < vocabulary
    with pytest.raises(ValueError, match="the task needs 16"):
        symbol_ids(15, 16)


class Echo(torch.nn.Module):
    """Always certain that the next token is the one it is told, and right about all but one answer."""

    def forward(self, input_ids, logits_to_keep, use_cache):
        following = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        following[0, -2] = (following[0, -2] + 1) % 9
        logits = torch.nn.functional.one_hot(following, 9).float()
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_accuracy_counts_the_answers_at_the_end_of_every_row():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 2, 2]])
    labels = ids.clone()
    labels[:, :2] = -100  # two answers a row, six in all, one wrong
    assert accuracy(Echo(), {"input_ids": ids, "labels": labels}) == pytest.approx(5 / 6)


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm):
    trial = SelectiveRecallTrial(model=llama_folder, **SMALL)
    trial.check()
    assert {arm.name for arm in trial.arms()} == {"standard", "selective"}
    outcome = run_arm(trial, arm_of(trial, "selective", "assignment"))
    assert outcome.cost.tokens > 0


def test_lengths_beyond_a_given_model_are_refused(llama_folder):
    with pytest.raises(ValueError, match="longer than"):
        SelectiveRecallTrial(model=llama_folder, **{**SMALL, "most": 10}).check()


def test_fewest_above_most_is_refused(trial):
    with pytest.raises(ValueError, match="--most 3 must be at least --fewest 4"):
        dataclasses.replace(trial, fewest=4).check()


@pytest.mark.slow
def test_selective_attention_learns_the_task_within_training_lengths(run_arm):
    trial = SelectiveRecallTrial(steps=500, fewest=2, most=6, test_items=128)
    outcome = run_arm(trial, arm_of(trial, "selective", "assignment"))
    assert outcome.metrics["accuracy_1x"] > 0.9
