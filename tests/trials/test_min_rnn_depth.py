from __future__ import annotations

import dataclasses

import pytest

from tests.trials.conftest import arm_of
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, count_parameters
from trialist.trials.min_rnn_depth import MinRNNDepthTrial, remark_on_parity

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


def test_two_layers_and_two_layers_of_attention_are_shown_and_tuned_like_the_arms_that_decide(trial):
    arms = {arm.name: arm for arm in trial.arms() if arm.setting == "selective-copying"}
    assert {name for name, arm in arms.items() if arm.role == "reference"} == {"two-layers", "attention", "gru"}
    assert {tuple(arm.tune["learning_rate"]) for arm in arms.values()} == {(3e-3, 6e-3, 1.2e-2)}
    shallow = dataclasses.replace(trial, layers=2)
    assert "two-layers" not in {arm.name for arm in shallow.arms()}  # that is `deep`


def test_a_negative_control_that_does_not_hold_is_remarked_on(trial, run_arm):
    deep, gru = (arm_of(trial, name, "parity") for name in ("deep", "gru"))
    assert "0.97 of parity" in remark_on_parity(deep, 0.97)
    assert "0.71 of it" in remark_on_parity(gru, 0.71)
    assert remark_on_parity(deep, 0.52) is None
    assert remark_on_parity(gru, 0.99) is None
    (note,) = run_arm(trial, gru).notes
    assert note.startswith("the negative control says little")


def test_the_preset_of_the_paper_starts_and_learns_as_the_paper_does():
    trial = MinRNNDepthTrial(
        **{k: v for k, v in MinRNNDepthTrial.presets["paper"].items() if k not in ("seeds", "about")}
    )
    fields = trial.architecture(3, "min_gru", 1.0)
    assert fields["vocab_size"] == 16
    assert "gate_bias_init" not in fields["min_rnn"]
    assert {arm["learning_rate"] for arm in trial.arms()} == {3e-4}


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
        ({"symbols": 1}, "--symbols 1 must be at least 2"),
        ({"steps": 0}, "--steps must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **changes).check()
