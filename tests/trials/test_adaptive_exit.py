from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy import stats

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.models.flops import flops_per_token
from trialist.models.recurrent_depth.settings import CHOICES, THRESHOLDS
from trialist.models.recurrent_depth.steps import set_num_steps
from trialist.trials import adaptive_exit
from trialist.trials._walk_readings import Decoding, decoded, decoding_flops, predictions, right
from trialist.trials.adaptive_exit import AdaptiveExitTrial, accuracy, rank_correlation

SMALL = {"width": 16, "heads": 2, "recurrence": 3, "backprop": 2, "nodes": 3, "letters": 2, "hops": 4, "batch": 8, "steps": 12,
         "test_items": 9, "criterion": "latent_diff", "threshold": 0.5}  # fmt: skip


@pytest.fixture
def trial():
    return AdaptiveExitTrial(**SMALL)


@pytest.fixture
def learnt(monkeypatch) -> None:
    """Whatever a model of twelve steps knows is enough."""
    monkeypatch.setattr(adaptive_exit, "unlearnt", lambda correct: None)


def walker_and_items(trial, folder, hops: int = 4):
    """A fresh model, three rows that it reads and the tokens of the task."""
    walker, context = trial.walker(next(trial.arms())), Context(0, folder, folder)
    model = walker.build(context, hops).eval()
    return model, walker.items(context, 3, 9, hops), walker.symbols(model, context)


def test_all_arms_read_one_training_and_decode_the_same_tokens(trial, run_arm, learnt) -> None:
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "walks"}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    assert len({outcome.curves["train_loss"] for outcome in outcomes.values()}) == 1
    steps = {name: outcome.metrics["mean_steps"] for name, outcome in outcomes.items()}
    assert steps["exit"] < steps["all-steps"] == 6
    assert steps["random-exit"] == pytest.approx(steps["exit"])
    assert steps["mean-steps"] == math.ceil(steps["exit"])
    assert steps["fixed-steps"] == int(steps["fixed-steps"])
    assert "spearman_steps_hops" in outcomes["exit"].metrics
    assert "equally many steps" in outcomes["all-steps"].undefined["spearman_steps_hops"]


def test_the_cheapest_number_of_steps_that_answers_as_well_decides(trial) -> None:
    deciding = [(arm.name, arm.setting) for arm in trial.arms() if arm.role == "control"]
    assert deciding == [("all-steps", "walks"), ("fixed-steps", "walks"), ("fixed-steps", "one-hop")]
    assert [arm.null for arm in trial.arms() if arm.setting == "one-hop"] == [True, True]


def test_all_questions_of_the_negative_control_are_one_hop(trial, run_arm, learnt) -> None:
    outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == "one-hop"]
    assert [len(outcome.curves["accuracy_by_hops"]) for outcome in outcomes] == [1, 1]
    assert len({outcome.cost.tokens for outcome in outcomes}) == 1
    assert "all answers are of one hop" in outcomes[1].undefined["spearman_steps_hops"]


def test_an_exit_of_a_model_that_has_not_learnt_single_hops_says_nothing(trial, run_arm) -> None:
    outcome = run_arm(trial, arm_of(trial, "exit", "walks"))
    assert "mean_steps" not in outcome.metrics
    assert "of single hops are right" in outcome.undefined["mean_steps"]


def test_the_fewest_steps_are_the_first_that_reach_the_wanted_accuracy(trial, monkeypatch) -> None:
    shares = {1: 0.2, 2: 0.7, 3: 0.6, 4: 0.9, 5: 0.9}

    def pretend(model, items, symbols, num_steps: int) -> torch.Tensor:
        return (torch.arange(10) < 10 * shares[num_steps])[:, None]

    monkeypatch.setattr(adaptive_exit, "right", pretend)
    assert [trial.fewest(None, {}, None, wanted) for wanted in (0.1, 0.6, 0.8, 0.95)] == [1, 2, 4, 6]


def test_fixed_steps_are_chosen_on_validation_walks_to_answer_as_well_as_the_exit(trial, run_arm, tmp_path) -> None:
    arm = arm_of(trial, "fixed-steps", "walks")
    chosen = int(run_arm(trial, arm).metrics["mean_steps"])
    walker, context = trial.walker(arm), Context(0, tmp_path / "again", tmp_path / "stages")
    model, _ = adaptive_exit.load_stage(walker.stage(context, trial.longest), "cpu")
    held_out, symbols = walker.items(context, adaptive_exit.VALIDATION, 9, 6), walker.symbols(model, context)
    exits = decoded(model, held_out, symbols, num_steps=6, exit_criterion="latent_diff", exit_threshold=0.5)
    wanted = accuracy(exits, held_out) - 0.005
    reached = [
        steps for steps in range(1, 7)
        if float(right(model, held_out, symbols, num_steps=steps).float().mean()) >= wanted
    ]  # fmt: skip
    assert chosen == min(reached, default=6)


def test_every_criterion_of_the_model_can_be_asked_for() -> None:
    assert {None, *adaptive_exit.CRITERIA} == set(CHOICES["exit_criterion"])


def test_threshold_zero_is_the_control(trial, run_arm, learnt) -> None:
    never = dataclasses.replace(trial, threshold=0.0)
    exit_, control = (run_arm(never, arm_of(never, name, "walks")).metrics for name in ("exit", "all-steps"))
    assert (exit_["accuracy"], exit_["mean_steps"]) == (control["accuracy"], control["mean_steps"])


@pytest.mark.parametrize("criterion", ["cosine", "argmax"])
def test_without_a_threshold_a_criterion_has_its_own(trial, run_arm, learnt, criterion: str) -> None:
    own = dataclasses.replace(trial, criterion=criterion, threshold=None)
    said = dataclasses.replace(own, threshold=float(THRESHOLDS[criterion]))
    first, second = (run_arm(each, arm_of(each, "exit", "walks")).metrics for each in (own, said))
    assert first == second


def test_the_cost_is_that_of_decoding(trial, run_arm, learnt) -> None:
    costs = {name: run_arm(trial, arm_of(trial, name, "walks")).cost for name in ("exit", "all-steps", "random-exit")}
    assert costs["exit"].tokens == 2 * 8 * 8  # two batches of eight rows of a node, six letters and the end
    assert costs["exit"].flops < costs["all-steps"].flops
    assert costs["exit"].seconds > 0
    assert (costs["random-exit"].flops, costs["random-exit"].seconds) == (costs["exit"].flops, None)


def test_flops_of_decoding_are_linear_in_steps_and_looks_are_paid(trial, tmp_path) -> None:
    model, items, _ = walker_and_items(trial, tmp_path)
    T = items["input_ids"].shape[1]
    per_token = []
    for steps in (1, 2):
        set_num_steps(model, steps)
        per_token.append(flops_per_token(model, T // 2))
    steps = torch.full((3, T), 5)
    plain = decoding_flops(model, steps, None)
    assert plain == pytest.approx(3 * T * (per_token[0] + 4 * (per_token[1] - per_token[0])))
    assert decoding_flops(model, steps, "latent_diff") == plain
    width, symbols = 16, model.config.vocab_size
    layer = 2 * (4 * width**2 + 3 * width * model.config.intermediate_size) + 4 * width * (T // 2)
    looks = 3 * T * 5 * (layer + 2 * width * symbols)  # coda and head, after every step
    assert decoding_flops(model, steps, "kl") == pytest.approx(plain + looks)


def test_the_reference_by_kl_carries_the_sweeps(trial, run_arm) -> None:
    curves = {name: dict(points) for name, points in run_arm(trial, arm_of(trial, "exit-kl", "walks")).curves.items()}
    for name in ("latent_diff", "latent_diff_warm_start"):
        assert list(curves[f"accuracy_of_{name}_by_threshold"]) == [0.01, 0.03, 0.1, 0.3]
        steps = list(curves[f"steps_of_{name}_by_threshold"].values())
        assert steps == sorted(steps, reverse=True)
    assert "steps_of_kl_by_threshold" in curves
    assert list(curves["accuracy_by_steps"]) == list(curves["accuracy_warm_start_by_steps"]) == [1, 2, 4]
    assert list(curves["accuracy_by_kv_slots"]) == [1, 2, 4, 6]


def test_sweeps_over_slots_and_warm_starts_run_what_they_name(trial, tmp_path, monkeypatch) -> None:
    seen: list[dict] = []

    def note(model, items, symbols, **options) -> Decoding:
        seen.append(options)
        return Decoding(items["labels"][:, 2:], torch.ones(1, 1), None)

    monkeypatch.setattr(adaptive_exit, "decoded", note)
    model, items, symbols = walker_and_items(trial, tmp_path)
    trial.sweeps(model, items, symbols)
    assert [options["kv_slots"] for options in seen if "kv_slots" in options] == [1, 2, 4]
    assert sum(options.get("warm_start", False) for options in seen) == 4 + 3
    assert seen[-1] == {"num_steps": 6}


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm) -> None:
    arm = arm_of(trial, "random-exit", "walks")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_decoding_token_by_token_predicts_what_one_pass_predicts(trial, tmp_path) -> None:
    model, items, symbols = walker_and_items(trial, tmp_path)
    for options in ({}, {"exit_criterion": "latent_diff", "exit_threshold": 0.5}):
        decoding, wanted = decoded(model, items, symbols, **options), predictions(model, items, symbols, **options)
        assert torch.equal(decoding.found, wanted[0])
        assert torch.equal(decoding.taken, wanted[1])


def test_accuracy_averages_over_all_answers() -> None:
    items = {"labels": torch.tensor([[-100, -100, 4, 5], [-100, -100, 6, 7]])}
    assert accuracy(Decoding(torch.tensor([[4, 4], [6, 7]]), torch.ones(2, 2), None), items) == 0.75


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
