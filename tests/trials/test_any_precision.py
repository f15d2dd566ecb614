from __future__ import annotations

import dataclasses

import pytest

from trialist.trials.any_precision import AnyPrecisionTrial

from .conftest import arm_of

SMALL = {
    "layers": 1,
    "width": 32,
    "heads": 2,
    "length": 48,
    "steps": 3,
    "batch": 4,
    "calibration_rows": 3,
    "test_bytes": 2048,
}


@pytest.fixture
def trial(text_file):
    trial = AnyPrecisionTrial(data=text_file, **SMALL)
    trial.check()
    return trial


@pytest.fixture
def outcomes(trial, run_arm):
    return {arm.name: run_arm(trial, arm) for arm in trial.arms()}


def test_every_arm_reads_weights_of_the_same_bytes_and_nested_ones_save_them_together(outcomes):
    deciding = ("separate", "round-to-nearest", "nested")
    bits = {name: outcomes[name].cost.bits for name in deciding}
    assert bits["separate"] == bits["nested"] == bits["round-to-nearest"]
    planes = {name: outcomes[name].cost.bytes for name in deciding}
    assert planes["separate"] == planes["round-to-nearest"]
    assert planes["nested"] < 0.7 * planes["separate"]


def test_arms_score_the_same_items_and_agree_where_they_are_the_same(outcomes):
    assert len({outcome.items["nats_per_token"].ids for outcome in outcomes.values()}) == 1
    lowest = {name: outcome.metrics["nats_at_lowest"] for name, outcome in outcomes.items()}
    assert lowest["separate"] == pytest.approx(lowest["nested"], abs=1e-6)  # the seed is built for itself
    assert lowest["nested-unweighted"] != lowest["nested"]
    assert outcomes["full"].metrics["nats_added"] == pytest.approx(0.0, abs=1e-12)
    for outcome in outcomes.values():
        points = outcome.curves["nats_per_token_by_bits"]
        assert [bits for bits, _ in points] == [2, 3, 4]
        assert outcome.metrics["nats_per_token"] == pytest.approx((points[1][1] + points[2][1]) / 2)
        assert outcome.metrics["nats_at_highest"] == pytest.approx(points[2][1])


def test_arms_share_the_model_and_its_sensitivities(outcomes, tmp_path):
    for kind in ("model", "sensitivity"):
        assert len([entry for entry in (tmp_path / "stages").glob(f"{kind}-*") if entry.is_dir()]) == 1


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    import shutil

    arm = arm_of(trial, "nested", "text")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    assert run_arm(trial, arm).items == first.items
    assert run_arm(trial, arm, 1).items != first.items


def test_a_given_model_and_a_calibration_text_of_its_own_go_through_the_same_path(
    text_file, llama_folder, run_arm, tmp_path
):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"line {n} of another text altogether" for n in range(80)))
    small = {**SMALL, "length": 48}
    trial = AnyPrecisionTrial(model=llama_folder, data=text_file, calibration=str(other), bits="3-4", **small)
    trial.check()
    assert trial.replicates_over() == "item"
    assert "calibration" in trial.digests()
    outcome = run_arm(trial, arm_of(trial, "nested", "text"))
    rounded = run_arm(trial, arm_of(trial, "round-to-nearest", "text"))
    assert [bits for bits, _ in outcome.curves["nats_per_token_by_bits"]] == [3, 4]
    assert outcome.cost.bits == rounded.cost.bits
    assert len(set(outcome.items["nats_per_token"].clusters)) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": "4"}, "--bits '4': give the lowest and a higher precision"),
        ({"bits": "2-9"}, "--bits '2-9'"),
        ({"calibration_rows": 0}, "--calibration-rows must be at least 1"),
        ({"calibration": "none.txt"}, "none.txt"),
        ({"data": "none.txt"}, "none.txt"),
        ({"width": 30, "heads": 4}, "--width 30 must be an even multiple of --heads 4"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_runs(trial, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        dataclasses.replace(trial, **changes).check()
