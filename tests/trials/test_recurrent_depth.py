from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.engine.plan import check_arms
from trialist.engine.tuning import Tuned, grid
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM
from trialist.trials import recurrent_depth
from trialist.trials._walk_readings import (
    answered,
    by_hops,
    curve_by_hops,
    flops_per_answer,
    predictions,
    right,
    unlearnt,
)
from trialist.trials._walks import layer_numbers
from trialist.trials.recurrent_depth import RecurrentDepthTrial

SMALL = {"width": 16, "heads": 2, "recurrence": 2, "backprop": 2, "nodes": 3, "letters": 2, "hops": 2, "batch": 8, "steps": 12,
         "test_items": 9}  # fmt: skip


@pytest.fixture
def trial():
    return RecurrentDepthTrial(**SMALL)


@pytest.fixture
def learnt(monkeypatch) -> None:
    """Whatever a model of twelve steps knows is enough."""
    monkeypatch.setattr(recurrent_depth, "unlearnt", lambda correct: None)


def test_all_arms_of_a_setting_spend_the_same_tokens(trial, run_arm, learnt) -> None:
    for setting in ("walks", "coins"):
        outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting]
        assert len({outcome.cost.tokens for outcome in outcomes}) == 1
        for outcome in outcomes:
            shares = {"accuracy_deeper", "accuracy_trained", "accuracy_hardest_trained"}
            assert shares <= set(outcome.metrics)
            assert all(0 <= outcome.metrics[name] <= 1 for name in shares)


def test_a_treatment_that_has_not_learnt_single_hops_says_nothing_of_depth(trial, run_arm) -> None:
    outcome = run_arm(trial, arm_of(trial, "recurrent", "walks"))
    assert "accuracy_deeper" not in outcome.metrics
    assert "of single hops are right, 0.95 are needed" in outcome.undefined["accuracy_deeper"]
    assert "validation_accuracy" in outcome.metrics  # which tunes
    assert "accuracy_deeper" in run_arm(trial, arm_of(trial, "recurrent", "coins")).metrics


def test_single_hops_are_learnt_where_nineteen_of_twenty_are_right() -> None:
    correct = torch.ones(20, 3, dtype=torch.bool)
    correct[0] = False
    assert unlearnt(correct) is None
    correct[1, 0] = False
    assert "0.900 of single hops" in str(unlearnt(correct))


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


def test_the_deep_stack_costs_at_least_the_flops_of_an_answer_in_twice_the_mean_steps_and_at_most_one_layer_more(
    trial, tmp_path
) -> None:
    context = Context(0, tmp_path, tmp_path)
    models = {
        name: trial.walker(arm_of(trial, name, "walks")).build(context, 4)
        for name in ("deep-stack", "recurrent", "once")
    }
    items = trial.walker(arm_of(trial, "recurrent", "walks")).items(context, 1, 3, 4)
    models["recurrent"].config.recurrent["num_steps"] = 4
    flops = {name: flops_per_answer(model, items) for name, model in models.items()}
    layer = flops["once"] / 3
    assert flops["recurrent"] <= flops["deep-stack"] <= flops["recurrent"] + layer


def test_flops_of_an_answer_are_those_of_the_row_over_its_answers() -> None:
    config = ModularDecoderConfig(
        vocab_size=11, hidden_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    items = {"input_ids": torch.zeros(3, 5, dtype=torch.long), "labels": torch.tensor([[-100, -100, 1, 2, -100]] * 3)}
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 24) + 8 * 11
    per_token = 2 * matrices + 2 * 4 * 8 * 5  # attention: 4 heads * width * length in each layer
    assert flops_per_answer(ModularDecoderForCausalLM(config), items) == 5 * per_token / 2


def test_arms_that_differ_in_their_reading_share_one_training(trial, run_arm) -> None:
    first = run_arm(trial, arm_of(trial, "recurrent-mean-steps", "walks"))
    second = run_arm(trial, arm_of(trial, "recurrent", "walks"))
    assert first.curves["train_loss"] == second.curves["train_loss"]
    assert first.cost == second.cost


def test_tuning_chooses_one_model_for_all_its_readings(trial) -> None:
    arms = list(trial.arms())
    check_arms("recurrent-depth", trial, arms)
    knobs = {arm.name: grid(arm) for arm in arms if arm.tune}
    assert "recurrent-mean-steps" not in knobs
    tuned = Tuned({name: points[i % 3] for i, (name, points) in enumerate(sorted(knobs.items()))}).apply(arms)
    walkers = {arm.name: trial.walker(arm) for arm in tuned if arm.setting == "walks"}
    assert walkers["recurrent-mean-steps"] == walkers["recurrent"]
    assert len({walker.learning_rate for walker in walkers.values()}) == 3


def test_the_rate_is_tuned_at_both_readings_of_one_model(trial, run_arm, monkeypatch) -> None:
    seen: list[dict] = []

    def note(model, items, symbols, **options):
        seen.append(options)
        return right(model, items, symbols, **options)

    monkeypatch.setattr(recurrent_depth, "right", note)
    values = [
        run_arm(trial, arm_of(trial, name, "walks")).metrics["validation_accuracy"]
        for name in ("recurrent-mean-steps", "recurrent")
    ]
    assert [options for options in seen if options] == 2 * [{"num_steps": 2}, {"num_steps": 4}]
    assert values[0] == values[1]


def test_an_arm_hands_over_its_model_set_to_its_reading(trial, run_arm, tmp_path) -> None:
    for name, steps in (("recurrent-mean-steps", 2), ("recurrent", 4)):
        outcome = run_arm(trial, arm_of(trial, name, "walks"), keep_model=True)
        saved = next(folder for folder in tmp_path.glob(f"walks-{name}-*/model"))
        assert ModularDecoderConfig.from_pretrained(saved).recurrent["num_steps"] == steps
        assert outcome.metrics["flops_per_answer"] > 0


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path) -> None:
    arm = arm_of(trial, "once", "walks")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_the_treatment_reports_accuracy_by_hops_and_steps(trial, run_arm) -> None:
    arm = arm_of(trial, "recurrent", "walks")
    outcome = run_arm(trial, arm)
    curves = {name: dict(points) for name, points in outcome.curves.items() if "_by_" in name}
    bands = [f"accuracy_of_hops_{hop}_{hop}_by_steps" for hop in (1, 2, 3, 4)]
    for name in (*bands, "recurrence_gain_by_steps", "token_correlation_by_steps", "flops_per_answer_by_steps"):
        assert list(curves[name]) == [1, 2, 4, 8]
    assert [curves[band][4.0] for band in bands] == list(curves["accuracy_by_hops"].values())  # its own reading
    assert curves["recurrence_gain_by_steps"][1.0] == 0
    assert outcome.metrics["flops_per_answer"] == curves["flops_per_answer_by_steps"][4.0]
    times = curves["flops_per_answer_by_steps"][4.0] / curves["flops_per_answer_by_steps"][2.0]
    assert f"{times:.2f} times the FLOPs of one at its mean steps" in outcome.notes[0]


def test_a_recurrent_model_is_read_at_its_mean_at_twice_its_mean_and_around_them(trial) -> None:
    assert dataclasses.replace(trial, recurrence=6).numbers_of_steps == (1, 2, 4, 6, 8, 12, 16)


def test_the_curve_by_hops_is_the_mean_over_rows() -> None:
    assert curve_by_hops(torch.tensor([[1, 5, 2], [0, 4, 2]])) == ((1, 0.5), (2, 4.5), (3, 2))


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
    names = [arm.name for arm in trial.arms() if arm.setting == "walks"]
    assert names == ["once", "stack", "recurrent-mean-steps", "recurrent"]
    for name in names:
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
