from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.trials._walks import answered, by_hops, layer_numbers, predictions, right
from trialist.trials.recurrent_depth import RecurrentDepthTrial

SMALL = {"width": 16, "heads": 2, "recurrence": 2, "backprop": 2, "nodes": 3, "letters": 2, "hops": 2, "batch": 8, "steps": 12,
         "test_items": 9}  # fmt: skip


@pytest.fixture
def trial():
    return RecurrentDepthTrial(**SMALL)


def test_all_arms_of_a_setting_spend_the_same_tokens(trial, run_arm) -> None:
    for setting in ("walks", "coins"):
        outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting]
        assert len({outcome.cost.tokens for outcome in outcomes}) == 1
        for outcome in outcomes:
            assert {"accuracy_deeper", "accuracy_trained", "accuracy_hardest_trained"} <= set(outcome.metrics)
            assert all(0 <= value <= 1 for name, value in outcome.metrics.items() if name.startswith(("acc", "hops")))


def test_the_stack_costs_at_least_the_training_flops_of_the_recurrent_model_and_at_most_one_layer_more(
    trial, run_arm
) -> None:
    stack, recurrent = (run_arm(trial, arm_of(trial, name, "walks")).cost.flops for name in ("stack", "recurrent"))
    layer = run_arm(trial, arm_of(trial, "once", "walks")).cost.flops / 3
    assert recurrent <= stack <= recurrent + layer


def test_the_same_layers_run_once_have_as_many_parameters(trial, tmp_path) -> None:
    context = Context(0, tmp_path, tmp_path)
    counts = {
        name: sum(p.numel() for p in trial.walker(arm_of(trial, name, "walks")).build(context, 4).parameters())
        for name in ("once", "recurrent", "stack")
    }
    assert counts["once"] == counts["recurrent"] < counts["stack"]


def test_arms_that_differ_in_their_reading_share_one_training(trial, run_arm) -> None:
    first = run_arm(trial, arm_of(trial, "recurrent-mean-steps", "walks"))
    second = run_arm(trial, arm_of(trial, "recurrent", "walks"))
    assert first.curves == second.curves
    assert first.cost == second.cost


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path) -> None:
    arm = arm_of(trial, "once", "walks")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_the_treatment_reports_accuracy_by_hops_and_steps(trial, run_arm) -> None:
    metrics = run_arm(trial, arm_of(trial, "recurrent", "walks")).metrics
    assert {"hops_1_1_steps_1", "hops_4_4_steps_32", "recurrence_gain", "token_correlation"} <= set(metrics)


class Successor(torch.nn.Module):
    """Certain that the next token is one more than the last, in a vocabulary twice as large as the task's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache, **options):
        return type("Output", (), {"logits": torch.nn.functional.one_hot(input_ids + 2, 40).float()})


def test_predictions_are_read_where_answers_stand_and_in_the_tokens_of_the_task() -> None:
    items = {"input_ids": torch.tensor([[1, 5, 6, 9]]), "labels": torch.tensor([[-100, -100, 6, 3]])}
    assert answered(items).tolist() == [1, 2]
    symbols = torch.arange(12) * 2  # task token s is model token 2s
    assert predictions(Successor(), items, symbols)[0].tolist() == [[6, 7]]


def test_accuracy_by_hops_averages_over_its_band() -> None:
    correct = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]).bool()
    assert by_hops(correct, [(1, 2), (3, 4)]) == {"hops_1_2": 0.75, "hops_3_4": 0.25}


def test_a_given_model_gets_a_loop_and_goes_through_the_same_path(llama_folder, run_arm) -> None:
    trial = RecurrentDepthTrial(model=llama_folder, **{**SMALL, "layers": "0,1,1", "lora": 2})
    trial.check()
    for name in ("recurrent", "stack", "once"):
        assert run_arm(trial, arm_of(trial, name, "walks")).cost.tokens > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "1,0,1"}, "three numbers, before, in and after the loop"),
        ({"layers": "1,2"}, "three numbers"),
        ({"nodes": 1}, "--nodes must be at least 2"),
        ({"recurrence": 0}, "--recurrence must be at least 1"),
        ({"width": 15}, "--width 15 must be a multiple of --heads 2"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()


def test_numbers_of_layers_are_read_from_text() -> None:
    assert layer_numbers("1, 2,1") == (1, 2, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learnt short walks, its walker and the context it was trained in."""
    trial = RecurrentDepthTrial(nodes=6, hops=6, recurrence=6, steps=500)
    folder = tmp_path_factory.mktemp("trained")
    context = Context(0, folder / "run", folder / "stages")
    walker = trial.walker(arm_of(trial, "recurrent", "walks"))
    return walker.train(context, trial.longest)[0].eval(), walker, context


@pytest.mark.slow
def test_more_steps_follow_more_pointers(trained) -> None:
    model, walker, context = trained
    items, symbols = walker.items(context, 5, 128, 6), walker.symbols(model, context)
    few, many = (right(model, items, symbols, num_steps=steps)[:, 4:6].float().mean() for steps in (1, 8))
    assert many > few + 0.2


@pytest.mark.slow
def test_states_of_a_trained_model_forget_where_they_started(trained) -> None:
    model, walker, context = trained
    ids = walker.items(context, 5, 64, 4)["input_ids"]
    runs = []
    for seed in (1, 2):
        model.config.recurrent["seed"] = seed
        with torch.no_grad():
            runs.append(model(ids, num_steps=12, output_latent_states=True).latent_states)
    distances = [float((one - other).norm(dim=-1).mean()) for one, other in zip(*runs, strict=True)]
    assert distances[12] < 0.1 * distances[0]
    assert distances[12] < distances[4] < distances[0]
