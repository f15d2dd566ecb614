from __future__ import annotations

import dataclasses

import pytest

from tests.trials.conftest import arm_of, model_folder
from trialist.trials._pruning import times_fewer_bytes
from trialist.trials._text import load_rows
from trialist.trials._text_trial import training_rows
from trialist.trials.context_pruning import ContextPruningTrial

SMALL = {
    "layers": 2, "width": 16, "heads": 2, "length": 160, "batch": 2, "steps": 3, "test_bytes": 600, "calibration_rows": 2,
    "sinks": 1, "step": 40,
}  # fmt: skip


@pytest.fixture
def trial(text_file):
    return ContextPruningTrial(data=text_file, **SMALL)


def shares_of(outcome):
    return [share for share, _ in outcome.curves["bits_per_byte_by_share_of_bytes"]]


def test_all_arms_spend_the_same_tokens_and_are_read_at_the_same_bytes(trial, run_arm):
    arms = [arm for arm in trial.arms() if arm.setting == "text"]
    outcomes = {arm.name: run_arm(trial, arm) for arm in arms}
    assert {outcome.cost.tokens for outcome in outcomes.values()} == {outcomes["recency"].cost.tokens}
    names = {"bits_per_byte_of_pruned", "bits_lost_by_pruning", "bits_per_byte_of_full", "times_fewer_bytes"}
    for name, outcome in outcomes.items():
        assert set(outcome.metrics) | set(outcome.undefined) == names
        assert set(outcome.undefined) <= {"times_fewer_bytes"}
        assert 0 < outcome.metrics["bits_per_byte_of_pruned"] < 12
        if name != "full-cache":
            shares = shares_of(outcome)
            assert shares == pytest.approx([0.0295, 0.06, 0.12, 0.21, 1.0], rel=0.1)
            assert shares[0] <= 1 / 32
            assert shares[-2] >= 1 / 5
            assert outcome.curves["bits_per_byte_by_share_of_bytes"][-1] == (
                1.0,
                outcome.metrics["bits_per_byte_of_full"],
            )
    of_full = {name: outcome.metrics["bits_per_byte_of_full"] for name, outcome in outcomes.items()}
    assert of_full["recency"] == of_full["heavy-hitters"] == of_full["full-cache"]
    assert of_full["selective"] == of_full["selective-recency"] == of_full["selective-heavy-hitters"]
    assert len({of_full["recency"], of_full["selective"], of_full["selective-free"]}) == 3
    pruned = [outcome.metrics["bits_per_byte_of_pruned"] for outcome in outcomes.values()]
    assert len(set(pruned)) == len(pruned)
    assert outcomes["full-cache"].metrics["bits_per_byte_of_pruned"] == of_full["recency"]
    for name in ("recency", "heavy-hitters", "selective", "selective-free"):  # all are held against one mark
        assert (
            outcomes[name].notes[-1] == f"standard attention with a full cache: {of_full['recency']:.4f} bits per byte"
        )


def test_arms_of_one_model_share_it_and_the_standard_model_that_sets_the_mark(trial, run_arm, tmp_path):
    for names, models in (
        (("recency", "heavy-hitters", "full-cache"), 1),
        (("selective", "selective-recency", "selective-heavy-hitters"), 2),
        (("selective-free",), 3),
    ):
        for name in names:
            run_arm(trial, arm_of(trial, name, "text"))
        assert len(list((tmp_path / "stages").glob("model-*"))) == models


def test_the_learning_rate_is_chosen_once_for_each_trained_model(trial):
    from trialist.engine.tuning import Tuned

    rates = {"recency": 0.1, "selective": 0.2, "selective-free": 0.3}
    arms = list(trial.arms())
    assert {arm.name for arm in arms if arm.tune} == set(rates)
    tuned = Tuned({name: {"learning_rate": rate} for name, rate in rates.items()}).apply(arms)
    models = {(arm["attention"], arm["price"]) for arm in tuned}
    assert len(models) == 3
    for model in models:
        assert len({arm["learning_rate"] for arm in tuned if (arm["attention"], arm["price"]) == model}) == 1


@pytest.mark.parametrize(
    ("points", "mark", "times"),
    [
        ([(0, 1.0), (-2, 2.0)], 1.5, 2.0),  # halfway between all bytes and a quarter of them, on a logarithmic scale
        ([(0, 1.0), (-1, 1.0), (-3, 2.0)], 1.0, 2.0),  # half of the bytes are as good as all
        ([(0, 1.1), (-1, 1.0), (-3, 2.0)], 1.0, 2.0),  # and here better
        ([(0, 1.0), (-1, 2.0), (-2, 1.8)], 1.0, 1.0),
    ],
)
def test_bytes_at_equal_quality_are_read_off_the_curve(points, mark, times):
    assert times_fewer_bytes(points, mark).value == pytest.approx(times)


@pytest.mark.parametrize(
    ("mark", "words"),
    [(0.9, "0.9000 is not reached: the best of the curve is 1.0000"), (2.5, "8.0 times fewer, reach 2.5000 already")],
)
def test_bytes_at_a_quality_beyond_the_curve_are_undefined_with_the_reason(mark, words):
    reading = times_fewer_bytes([(0, 1.0), (-1, 1.5), (-3, 2.0)], mark)
    assert reading.value is None
    assert words in reading.reason


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    import shutil

    arm = arm_of(trial, "selective", "text")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    assert run_arm(trial, arm).metrics == first.metrics
    assert run_arm(trial, arm, 1).metrics != first.metrics


def test_budgets_are_found_on_training_text_that_no_model_is_trained_on(trial, tmp_path):
    from trialist.engine.context import Context

    folder = trial.text.stage(Context(0, tmp_path, tmp_path / "stages"), False)
    every, trained_on = load_rows(folder, "train")[0], training_rows(folder, trial.held_out)
    assert trial.held_out == 2
    assert len(every) >= 3 * 2 + 2
    assert (trained_on.tokens == every.tokens[:-2]).all()
    with pytest.raises(ValueError, match=f"{len(every)} of them are held out"):
        training_rows(folder, len(every))


def test_runs_that_tune_read_validation_text_with_everything_in_the_cache(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "recency", "text"), seed=trial.tuning.seeds[0])
    assert set(outcome.metrics) == {"validation_bits_per_byte"}
    assert "bits_per_byte_by_share_of_bytes" not in outcome.curves


def test_the_null_setting_has_shuffled_text_and_no_references(trial):
    null = [arm for arm in trial.arms() if arm.setting == "shuffled"]
    assert {arm.role for arm in null} == {"control", "treatment"}
    deciding = {arm.name for arm in trial.arms() if arm.setting == "text" and arm.role != "reference"}
    assert {arm.name for arm in null} == deciding
    assert all(arm.null and arm.tune is None for arm in null)


def test_a_given_model_goes_through_the_same_path(text_file, llama_folder, run_arm, tmp_path):
    from trialist.data.tokenizers import load_tokenizer
    from trialist.models import get_budgets, load_model

    model = load_model(llama_folder)
    model.config.max_position_embeddings = 160
    model.save_pretrained(tmp_path / "longer")
    load_tokenizer(llama_folder).save_pretrained(tmp_path / "longer")
    small = {name: value for name, value in SMALL.items() if name not in ("layers", "width", "heads")}
    trial = ContextPruningTrial(model=str(tmp_path / "longer"), data=text_file, lora=2, **small)
    trial.check()
    outcome = run_arm(trial, arm_of(trial, "selective", "text"), keep_model=True)
    run_arm(trial, arm_of(trial, "recency", "text"))
    budgets = get_budgets(load_model(str(model_folder(tmp_path))))
    assert f"budgets {budgets}" in [note for note in outcome.notes if "of all bytes" in note][-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sinks": 9}, "--sinks 9: the smallest budget is 3 tokens of --length 160"),
        ({"price": -1.0}, "--price -1.0"),
        ({"recent_share": 2.0}, "--recent-share 2.0"),
        ({"calibration_rows": 0}, "--calibration-rows must be at least 1"),
        ({"width": 30, "heads": 4}, "--width 30 must be an even multiple of --heads 4"),
        ({"data": "none.txt"}, "none.txt"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_runs(trial, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        dataclasses.replace(trial, **changes).check()


def test_text_that_is_too_little_to_hold_rows_out_is_refused_with_the_numbers(trial, run_arm):
    short = dataclasses.replace(trial, calibration_rows=5_000)
    with pytest.raises(ValueError, match="5000 of them are held out"):
        run_arm(short, arm_of(short, "recency", "text"))
