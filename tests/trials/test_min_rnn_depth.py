from __future__ import annotations

import dataclasses

import pytest

from tests.trials.conftest import arm_of
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, count_parameters
from trialist.trials.min_rnn_depth import MinRNNDepthTrial

SMALL = {"width": 16, "length": 12, "values": 2, "bits": 6, "batch": 8, "steps": 6, "test_items": 16}


@pytest.fixture
def trial():
    trial = MinRNNDepthTrial(**SMALL)
    trial.check()
    return trial


def test_all_arms_of_a_setting_spend_the_same_tokens_on_answers_that_can_be_right(trial, run_arm):
    for setting in ("selective-copying", "parity"):
        outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == setting]
        assert len({outcome.cost.tokens for outcome in outcomes}) == 1
        for outcome in outcomes:
            assert set(outcome.metrics) == {"accuracy", "validation_loss"}
            assert 0 <= outcome.metrics["accuracy"] <= 1


@pytest.mark.parametrize("mixer", ["min_gru", "min_lstm"])
def test_every_control_has_the_parameters_it_claims(mixer):
    trial = MinRNNDepthTrial(mixer=mixer)
    counts = {}
    for arm in trial.arms():
        fields = trial.architecture(arm["layers"], arm["mixer"], arm["times"])
        assert fields["layer_types"] == [arm["mixer"]] * arm["layers"]
        built = ModularDecoderForCausalLM(ModularDecoderConfig(tie_word_embeddings=False, **fields))
        counts[arm.setting, arm.name] = count_parameters(built)
    deep = counts["selective-copying", "deep"]
    for (_, name), count in counts.items():
        times = 2 if name == "one-layer-double" else 1
        assert times * deep <= count <= 1.01 * times * deep


def test_parity_is_the_null_setting_and_is_asked_in_the_second_half_only(trial):
    assert {arm.setting for arm in trial.arms() if arm.null} == {"parity"}
    assert arm_of(trial, "gru", "parity").role == "reference"


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = arm_of(trial, "deep", "selective-copying")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 1}, "--layers 1 must be at least 2"),
        ({"values": 13}, "--values 13 do not fit into --length 12"),
        ({"mixer": "gru"}, "one of min_gru, min_lstm"),
        ({"expansion": 0.0}, "--expansion 0.0 must be above 0"),
        ({"steps": 0}, "--steps must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()
