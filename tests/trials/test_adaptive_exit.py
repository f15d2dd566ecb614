from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import stats

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.trials._walks import decoded, predictions
from trialist.trials.adaptive_exit import AdaptiveExitTrial, rank_correlation, scores

SMALL = {"width": 16, "heads": 2, "recurrence": 3, "backprop": 2, "nodes": 3, "letters": 2, "hops": 4, "batch": 8, "steps": 12,
         "test_items": 9, "criterion": "latent_diff", "threshold": 0.5}  # fmt: skip


@pytest.fixture
def trial():
    return AdaptiveExitTrial(**SMALL)


def test_all_arms_read_one_training_and_spend_the_same_tokens(trial, run_arm) -> None:
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms()}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    steps = {name: outcome.metrics["mean_steps"] for name, outcome in outcomes.items()}
    assert steps["exit"] < steps["all-steps"] == 6
    assert steps["random-exit"] == pytest.approx(steps["exit"])
    assert steps["mean-steps"] == math.ceil(steps["exit"])
    assert "spearman_steps_hops" in outcomes["exit"].metrics
    assert "equally many steps" in outcomes["all-steps"].undefined["spearman_steps_hops"]


def test_threshold_zero_is_the_control(trial, run_arm) -> None:
    never = dataclasses.replace(trial, threshold=0.0)
    exit_, control = (run_arm(never, arm_of(never, name, "walks")).metrics for name in ("exit", "all-steps"))
    assert (exit_["accuracy"], exit_["mean_steps"]) == (control["accuracy"], control["mean_steps"])


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm) -> None:
    arm = arm_of(trial, "random-exit", "walks")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_decoding_token_by_token_predicts_what_one_pass_predicts(trial, tmp_path) -> None:
    walker, context = trial.walker(next(trial.arms())), Context(0, tmp_path, tmp_path)
    model = walker.build(context, 4).eval()
    items, symbols = walker.items(context, 3, 9, 4), walker.symbols(model, context)
    for options in ({}, {"exit_criterion": "latent_diff", "exit_threshold": 0.5}):
        found, wanted = decoded(model, items, symbols, **options), predictions(model, items, symbols, **options)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_scores_average_over_all_answers() -> None:
    items = {"labels": torch.tensor([[-100, -100, 4, 5], [-100, -100, 6, 7]])}
    found, taken = torch.tensor([[4, 4], [6, 7]]), torch.tensor([[1, 3], [1, 5]])
    assert scores(found, taken, items) == {"accuracy": 0.75, "mean_steps": 2.5}


def test_rank_correlation_is_spearmans_between_hops_and_steps() -> None:
    taken = torch.tensor([[1, 2, 2, 5], [2, 1, 4, 4]])
    expected = stats.spearmanr([0, 1, 2, 3, 0, 1, 2, 3], taken.flatten()).statistic
    assert rank_correlation(taken) == pytest.approx(expected)
    assert rank_correlation(torch.full((2, 3), 7)) is None


def test_a_given_model_gets_a_loop_and_goes_through_the_same_path(llama_folder, run_arm) -> None:
    trial = AdaptiveExitTrial(model=llama_folder, **{**SMALL, "layers": "0,1,1"})
    trial.check()
    assert run_arm(trial, arm_of(trial, "exit", "walks")).cost.tokens > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"criterion": "depth"}, "--criterion 'depth': one of kl"),
        ({"threshold": -1.0}, "--threshold must be at least 0"),
        ({"layers": "1"}, "three numbers"),
        ({"hops": 0}, "--hops must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()
