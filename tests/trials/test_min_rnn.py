from __future__ import annotations

import dataclasses

import pytest

from tests.trials.conftest import arm_of, model_folder
from trialist.engine.context import Context
from trialist.engine.plan import TIME_UNITS
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, count_parameters
from trialist.trials import min_rnn
from trialist.trials.min_rnn import MinRNNTrial, step_seconds

SMALL = {"layers": 1, "width": 32, "heads": 2, "length": 48, "batch": 2, "steps": 6, "test_bytes": 2000}


@pytest.fixture
def trial(text_file):
    trial = MinRNNTrial(data=text_file, **SMALL)
    trial.check()
    return trial


def test_all_arms_spend_the_same_tokens_and_report_quality_and_time(trial, run_arm):
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "text"}
    assert set(outcomes) == {"attention", "attention-conv", "gru", "min-gru", "min-gru-no-conv", "min-lstm"}
    assert len({outcome.cost.tokens for outcome in outcomes.values()}) == 1
    for outcome in outcomes.values():
        assert 0 < outcome.metrics["bits_per_byte"] < 9
        assert outcome.cost.seconds > 0
        assert outcome.metrics["long_step_seconds"] > 0
    assert len({outcome.metrics["bits_per_byte"] for outcome in outcomes.values()}) == 6


def test_at_equal_seconds_an_arm_takes_the_steps_that_attention_has_time_for(trial, run_arm, monkeypatch):
    taken = {"full_attention": 0.3, "gru": 0.9, "min_gru": 0.2, "conv_attention": 0.1}
    monkeypatch.setattr(
        min_rnn, "step_seconds", lambda models, *_: [taken[model.config.layer_types[0]] for model in models]
    )
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "equal-seconds"}
    steps = {name: outcome.cost.steps for name, outcome in outcomes.items()}
    for outcome in outcomes.values():
        assert outcome.curves["bits_per_byte"][-1][0] == pytest.approx(outcome.cost.seconds)
    assert trial.steps == 6
    assert steps == {
        "attention": 6,
        "gru": 2,
        "min-gru": 9,
        "attention-conv": 12,
    }  # not 18: there is text for twice the steps
    assert trial.budget.unit_of("equal-seconds") == "seconds"
    assert trial.budget.unit_of("text") == "tokens"


def test_steps_that_were_counted_stay_when_a_run_goes_on(trial, tmp_path, monkeypatch):
    arm, context = arm_of(trial, "min-gru", "equal-seconds"), Context(0, tmp_path / "run", tmp_path / "stages")
    model = trial.new_model("min_gru", 4, context, 259)
    counted = []
    for seconds in (0.2, 0.1):
        monkeypatch.setattr(min_rnn, "step_seconds", lambda models, *_, ours=seconds: [0.2, ours])
        counted.append(trial.affordable_steps(model, arm, context))
    assert counted == [6, 6]


def test_every_arm_of_the_text_is_tuned_alike_also_those_that_never_decide(trial):
    assert {arm.tune is not None for arm in trial.arms() if arm.setting == "text"} == {True}


@pytest.mark.parametrize("width", [64, 128, 192])
def test_no_arm_has_fewer_parameters_than_the_treatment_nor_many_more(width):
    trial = MinRNNTrial(width=width)
    counts = {}
    for arm in trial.arms():
        fields = trial.architecture(arm["mixer"], arm["taps"], 259)
        counts[arm.name] = count_parameters(
            ModularDecoderForCausalLM(ModularDecoderConfig(tie_word_embeddings=False, **fields))
        )
    for count in counts.values():
        assert counts["min-gru"] <= count <= 1.01 * counts["min-gru"]


def test_quality_is_a_pure_function_of_the_seed(trial, run_arm):
    arm = arm_of(trial, "min-gru", "text")
    first, second, other = run_arm(trial, arm), run_arm(trial, arm), run_arm(trial, arm, seed=1)
    for name in ("bits_per_byte", "validation_bits_per_byte"):
        assert first.metrics[name] == second.metrics[name] != other.metrics[name]


def test_the_kept_model_is_a_decoder_of_minimal_rnns(trial, run_arm, tmp_path):
    run_arm(trial, arm_of(trial, "min-gru", "text"), keep_model=True)
    loaded = ModularDecoderForCausalLM.from_pretrained(model_folder(tmp_path))
    assert loaded.config.layer_types == ["min_gru"]


def test_timing_a_step_leaves_no_gradient_and_no_change_behind(trial):
    model = ModularDecoderForCausalLM(ModularDecoderConfig(**trial.architecture("min_gru", 4, 259)))
    before = [parameter.clone() for parameter in model.parameters()]
    assert min(step_seconds([model, model], 1, 64, "bfloat16")) > 0
    assert all(
        parameter.grad is None and (parameter == old).all() for parameter, old in zip(model.parameters(), before)
    )


def test_time_decides_so_runs_go_one_at_a_time(trial):
    timed = {endpoint.name for endpoint in trial.claim.endpoints if endpoint.unit in TIME_UNITS}
    assert trial.claim.kind == "non-inferiority"
    assert trial.claim.saving.name in timed


def test_widths_that_heads_cannot_share_are_refused(trial):
    with pytest.raises(ValueError, match="--width 36 must be an even multiple of --heads 4"):
        dataclasses.replace(trial, width=36, heads=4).check()
