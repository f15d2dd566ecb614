from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch

from tests.engine.decided import run as record
from tests.trials.conftest import arm_of, model_folder
from trialist.engine.contract import Outcome
from trialist.engine.effects import Cell, slope
from trialist.engine.intervals import Undefined
from trialist.engine.verdict import decide
from trialist.trials._lr_batch_grid import GIVEN, LAW, NULL, PUBLISHED, RULES, RatioEffect, points
from trialist.trials.lr_batch_ratio import LearningRateBatchTrial, answered

SMALL = {
    "layers": 1, "width": 16, "heads": 2, "digits": 3, "letters": 4, "hops": 1, "pretraining": 3, "examples": 10, "batch": 4,
    "steps": 5, "test_items": 9, "device": "cpu",
}  # fmt: skip
MIDDLE = {"learning_rate": 1e-3, "batch": 16, "steps": 96, "learning_rates": 5, "factor": 2.0, "spread": 4}


@pytest.fixture
def trial():
    return LearningRateBatchTrial(**SMALL)


def cells(setting, score):
    """Cells of a setting at the sizes of the presets, `score(task, lr, batch, steps)` in logarithms of base 2."""
    made = []
    for arm in LearningRateBatchTrial().arms():
        if arm.setting != setting:
            continue
        r, b, s = (math.log2(arm[name]) for name in ("learning_rate", "batch", "steps"))
        covariates = {
            "log_lr": r, "log_batch": b, "log_ratio": r - b, "log_lr_time": r + s, "log_lr_time_squared": (r + s) ** 2,
        }  # fmt: skip
        outcome = Outcome(metrics={"score": score(arm["task"], r, b, s)}, covariates=covariates)
        made.append(Cell(arm, 0, outcome))
    random.Random(0).shuffle(made)
    return made


def test_each_rule_holds_equal_what_it_is_named_after():
    grids = {rule: list(points(rule, **MIDDLE)) for rule in RULES}
    assert {point.batch * point.steps for point in grids["equal-epochs"]} == {16 * 96}
    assert {point.steps for point in grids["equal-steps"]} == {96}
    assert {round(point.learning_rate * point.steps, 9) for point in grids["equal-lr-time"]} == {0.096}
    for grid in grids.values():
        assert len(set(grid)) == 15
        assert {point.batch for point in grid} == {4, 16, 64}
        assert len({point.learning_rate for point in grid}) == 5
    with pytest.raises(ValueError, match="rule 'equal' is unknown"):
        list(points("equal", **MIDDLE))


TASTES = {"reasoning": 0.9, "pattern": -0.4, "format": 0.1}


def bent(task, time):
    """What a task makes of learning-rate time: neither linear nor of second order."""
    return math.exp(TASTES[task] * time / 3) + math.sin(time)


def test_training_harder_looks_like_a_ratio_effect_and_vanishes_given_learning_rate_time():
    def score(task, r, b, s):
        return bent(task, r + s)

    effect = RatioEffect()
    assert abs(effect(cells(PUBLISHED, score), "score")) > 0.05
    for setting in (GIVEN, "equal-steps", "equal-lr-time"):
        assert effect(cells(setting, score), "score") == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("setting", [GIVEN, "equal-steps", "equal-lr-time"])
def test_a_planted_interaction_is_found_beyond_learning_rate_time(setting):
    def score(task, r, b, s):
        return bent(task, r + s) + TASTES[task] * (r - b)

    expected = TASTES["reasoning"] - (TASTES["pattern"] + TASTES["format"]) / 2
    assert RatioEffect()(cells(setting, score), "score") == pytest.approx(expected)


def test_at_equal_epochs_ratio_and_learning_rate_time_cannot_be_told_apart():
    with pytest.raises(Undefined, match="do not determine"):
        slope("log_ratio", "score", given=("log_lr_time",))(cells(PUBLISHED, lambda task, r, b, s: r), "score")


@pytest.mark.parametrize("setting", LAW)
def test_the_pure_ratio_law_is_a_sum_of_slopes_of_zero(setting):
    effect = RatioEffect()
    assert effect(cells(setting, lambda task, r, b, s: 0.3 * (r - b)), "score") == pytest.approx(0)
    assert effect(cells(setting, lambda task, r, b, s: 0.3 * (r + s)), "score") == pytest.approx(0.3)
    assert effect(cells(setting, lambda task, r, b, s: 0.3 * r - 0.15 * b), "score") == pytest.approx(0.15)


def test_twins_are_compared_with_each_other():
    def score(task, r, b, s):
        return (0.5 if task == "pattern" else 0.2) * (r - b) + r + s

    assert RatioEffect()(cells(NULL, score), "score") == pytest.approx(0.3)


def decided(score, seeds=4, noise=0.002):
    """The verdict over planted scores in every setting, `score(task, lr, batch, steps)` in logarithms of base 2."""
    trial, generator = LearningRateBatchTrial(), random.Random(1)
    arms, records = list(trial.arms()), []
    for setting in dict.fromkeys(arm.setting for arm in arms):
        for seed in range(seeds):
            for cell in cells(setting, lambda *place: score(*place) + noise * generator.gauss(0, 1)):
                records.append(
                    record(
                        cell.arm.name, seed, cell.outcome.metrics, setting=setting, covariates=cell.outcome.covariates
                    )
                )
    return decide(trial, arms, records)


def test_what_is_learning_rate_time_alone_is_no_effect_beside_a_published_one():
    found = decided(lambda task, r, b, s: 0.02 * bent(task.removesuffix("-twin"), r + s))
    assert found.word == "no effect"
    settings = {effect.setting: effect for effect in found.settings}
    assert settings[PUBLISHED].low > 0
    for setting in ("equal-steps", "equal-lr-time"):
        assert settings[setting].low < 0 < settings[setting].high
    assert settings["law-reasoning"].low > 0  # not a pure ratio law
    assert [effect.null_word for effect in found.null_effects] == ["shown null"]


def test_a_ratio_that_counts_for_reasoning_is_supported():
    found = decided(lambda task, r, b, s: (0.03 if task == "reasoning" else 0.0) * (r - b))
    assert found.word == "supported"
    assert found.effects[0].effect == pytest.approx(0.03, abs=0.002)
    assert "interaction of task and log2(lr/batch) given learning-rate time" in found.sentence
    law = next(effect for effect in found.settings if effect.setting == "law-reasoning")
    assert law.low < 0 < law.high


def test_settings_share_the_training_of_equal_cells(trial, run_arm):
    arms = [arm for arm in trial.arms() if arm.options == next(iter(trial.arms())).options]
    assert len(arms) == len({arm.setting for arm in arms}) == 3
    outcomes = [run_arm(trial, arm) for arm in arms]
    assert outcomes[0].metrics == outcomes[1].metrics
    assert outcomes[0].cost == outcomes[1].cost


def test_learning_rate_time_is_that_of_the_schedule(trial, run_arm):
    trial = dataclasses.replace(trial, steps=40)
    arm = next(arm for arm in trial.arms() if arm.setting == "equal-steps")
    outcome = run_arm(trial, arm)
    warm, rest = 2, 38  # a twentieth of the steps, then half a cosine
    shares = [k / warm for k in range(warm)] + [(1 + math.cos(math.pi * k / rest)) / 2 for k in range(rest)]
    assert outcome.covariates["lr_time"] == pytest.approx(arm["learning_rate"] * math.fsum(shares))
    assert outcome.covariates["log_lr_time"] == pytest.approx(math.log2(outcome.covariates["lr_time"]))
    assert outcome.covariates["log_ratio"] == pytest.approx(math.log2(arm["learning_rate"] / arm["batch"]))
    assert outcome.cost.steps == 40


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = next(arm for arm in trial.arms() if arm.setting == NULL)
    first, again, other = (run_arm(trial, arm, seed=seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics
    assert first.metrics["score"] != other.metrics["score"]


def test_twins_have_other_rows_of_the_same_task(trial, run_arm):
    one = next(arm for arm in trial.arms() if arm.setting == NULL and arm["task"] == "pattern")
    other = one.with_options(task="pattern-twin")
    assert run_arm(trial, one).metrics != run_arm(trial, other).metrics


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm, tmp_path):
    trial = LearningRateBatchTrial(model=llama_folder, **SMALL)
    trial.check()
    arm = arm_of(trial, next(iter(trial.arms())).name, GIVEN)
    outcome = run_arm(trial, arm, keep_model=True)
    assert set(outcome.metrics) == {"score", "greedy", "validation_score"}
    assert (model_folder(tmp_path) / "config.json").is_file()


def test_the_differences_on_the_page_follow_from_the_numbers_beside_them():
    page = (Path(__file__).parents[2] / "docs" / "techniques" / "smoltulu.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    names = next(line for line in lines if "GSM8K" in line)[2:]
    rows = {line[0]: dict(zip(names, map(float, line[2:]))) for line in lines if line[0].startswith(("Smol", "1130"))}
    high, low, public = rows["SmolTulu 1130"], rows["SmolTulu 1207"], rows["SmolLM2 1.7B Instruct"]
    assert rows["1130 minus 1207"] == pytest.approx({name: high[name] - low[name] for name in names})
    abstract = {
        "IFEval": high["IFEval"],
        "GSM8K": high["GSM8K"],
        "ARC": low["ARC"],
    }  # what it reports over the public model
    gains = {name: value - public[name] for name, value in abstract.items()}
    assert gains == pytest.approx({"IFEval": 11.0, "GSM8K": 3.4, "ARC": 5.4})


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, logits_to_keep, use_cache):
        return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})


def test_an_answer_is_right_when_every_token_of_it_is_the_most_probable():
    labels = torch.tensor([[-100, -100, 2, 1], [-100, -100, 3, 1], [-100, -100, 0, 1]])
    chosen = torch.tensor([[0, 2, 1, 0], [0, 2, 1, 0], [0, 0, 3, 0]])  # both right, first wrong, second wrong
    logits = torch.nn.functional.one_hot(chosen, 4) * torch.log(torch.tensor(9.0))  # 9 : 1 : 1 : 1
    greedy, sampled = answered(Fixed(logits), {"input_ids": labels, "labels": labels})
    assert greedy == pytest.approx(1 / 3)
    assert sampled == pytest.approx((81 + 9 + 9) / 144 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 6}, "--batch must be a multiple of 4"),
        ({"factor": 1.0}, "--factor must be above 1"),
        ({"steps": 3}, "--steps 3 leaves no step"),
        ({"width": 15}, "--width 15 must be a multiple of --heads 2"),
        ({"learning_rate": 0.0}, "--learning-rate must be > 0"),
        ({"digits": 1}, "expected digits >= 2"),
        ({"pretraining": 0}, "--pretraining must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **change).check()
