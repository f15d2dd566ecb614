from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.data.fact_world import FactWorld
from trialist.trials._fact_models import answers
from trialist.trials.param_delta import ParamDeltaTrial

SMALL = {
    "layers": 1, "width": 16, "heads": 2, "old": 12, "new": 12, "names": 6, "length": 24, "batch": 4, "steps": 6, "continued": 2,
    "sft_steps": 10,
}  # fmt: skip


@pytest.fixture
def trial():
    return ParamDeltaTrial(**SMALL)


def test_every_arm_is_measured_and_param_delta_spends_nothing(trial, run_arm):
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "near"}
    names = {endpoint.name for endpoint in trial.claim.endpoints} | {trial.tuning.metric.name}
    for name, outcome in outcomes.items():
        assert set(outcome.metrics) | set(outcome.undefined) == names
        assert outcome.cost.steps == {"direct": 10, "direct-short": 1}.get(name, 0)
    assert outcomes["param-delta"].cost.tokens == 0
    assert outcomes["direct"].cost.tokens > outcomes["direct-short"].cost.tokens > 0
    assert len({outcome.metrics["lineage_cosine"] for outcome in outcomes.values()}) == 1
    assert outcomes["alpha-tuned"].metrics == outcomes["param-delta"].metrics  # its factor is 1 until it is tuned


def test_what_carried_over_is_measured_where_direct_fine_tuning_is_paid_for(trial, run_arm, monkeypatch):
    direct = arm_of(trial, "direct", "near")
    few = run_arm(trial, direct)
    assert "nothing to take a share of" in few.undefined["carried_over"]
    monkeypatch.setattr("trialist.trials.param_delta.LEAST_DIRECT", 0.0)
    summed, taught = run_arm(trial, arm_of(trial, "param-delta", "near")), run_arm(trial, direct)
    share = summed.metrics["new_facts"] / taught.metrics["new_facts"]
    assert taught.metrics["carried_over"] == pytest.approx(share)
    assert "carried_over" in summed.undefined


def test_fine_tuning_and_the_factor_are_tuned_with_equal_tries_and_the_treatment_is_not(trial, llama_folder):
    for inputs in (trial, ParamDeltaTrial(model=llama_folder, **SMALL)):
        points = {
            arm.name: math.prod(map(len, arm.tune.values()))
            for arm in inputs.arms()
            if arm.tune and arm.setting == "near"
        }
        assert points == dict.fromkeys(("direct-short", "alpha-tuned", "direct"), inputs.tuning.tries)


def test_knobs_reach_the_run(trial, run_arm):
    direct = arm_of(trial, "direct", "near")
    losses = {
        run_arm(trial, direct.with_options(**change)).metrics["statement_loss"]
        for change in ({}, {"learning_rate": 3e-3}, {"warmup": 0.5})
    }
    assert len(losses) == 3


def test_a_rate_that_diverges_is_an_outcome_and_not_a_failure(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "direct-short", "near").with_options(share=1.0, learning_rate=1e30))
    assert outcome.diverged is not None
    assert outcome.metrics == {}


def test_questions_that_tune_are_not_those_that_decide(trial):
    world = FactWorld(0, old=trial.old, new=trial.new, names=trial.names)
    assert not set(world.part("new-validation")) & set(world.part("new-test"))


def test_the_lineage_check_refuses_the_foreign_base_and_it_is_recorded(trial, run_arm):
    near, foreign = (run_arm(trial, arm_of(trial, "param-delta", setting)) for setting in ("near", "foreign"))
    assert near.notes == ()
    assert foreign.notes == (
        "param-delta in setting foreign: the lineage check refuses these models and was overridden",
    )
    assert near.metrics["lineage_cosine"] > 0.9 > 0.5 > foreign.metrics["lineage_cosine"]


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = arm_of(trial, "param-delta", "near")
    first, again, other = run_arm(trial, arm), run_arm(trial, arm), run_arm(trial, arm, seed=1)
    assert first.metrics == again.metrics
    assert first.metrics["statement_loss"] != other.metrics["statement_loss"]


def test_farther_settings_continue_longer(trial, run_arm):
    cosines = [
        run_arm(trial, arm_of(trial, "base-new", setting)).metrics["lineage_cosine"]
        for setting in ("near", "middle", "far")
    ]
    assert cosines[0] > cosines[1] > cosines[2]


class Fixed(torch.nn.Module):
    """Says the given logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, logits_to_keep, use_cache):
        return type("Output", (), {"logits": self.logits[:, -logits_to_keep:]})


def test_an_answer_is_right_when_value_and_end_are_the_most_probable_tokens():
    labels = torch.tensor([[-100, -100, 2, 1], [-100, -100, 3, 1], [-100, -100, 0, 1]])
    # what is said before the last two tokens: both right, value wrong, end wrong; every choice has the odds 9 : 1 : 1 : 1
    chosen = torch.tensor([[2, 1, 0], [2, 1, 0], [0, 3, 0]])
    logits = torch.nn.functional.one_hot(chosen, 4) * torch.log(torch.tensor(9.0))
    right, probability = answers(Fixed(logits), {"input_ids": labels, "labels": labels})
    assert right == pytest.approx(1 / 3)
    assert probability == pytest.approx((81 + 9 + 9) / 144 / 3)


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm):
    trial = ParamDeltaTrial(model=llama_folder, **SMALL)
    trial.check()
    assert trial.remarks()
    assert run_arm(trial, arm_of(trial, "param-delta", "near")).metrics["lineage_cosine"] > 0.9
    assert run_arm(trial, arm_of(trial, "param-delta", "foreign")).metrics["lineage_cosine"] < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": 4}, "--names 4 makes 16 entities, fewer than the 24"),
        ({"length": 7}, "--length must be at least 8"),
        ({"old": 3}, "--old and --new must be at least 4"),
        ({"width": 15}, "--width 15 must be a multiple of --heads 2"),
        ({"sft_steps": 0}, "--sft-steps must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **change).check()
