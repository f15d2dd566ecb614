from __future__ import annotations

import pytest

from trialist.engine.api import check_evidence_name, check_workers, split_settings
from trialist.engine.contract import Arm, Endpoint
from trialist.engine.plan import check_arms, check_choice, in_blocks, prepare, replaced_endpoint
from trialist.engine.registry import load_trial, trial_paths, unknown
from trialist.engine.tuning import Tuned


def prepared(**settings):
    options, fields = split_settings(settings)
    return prepare("coins", fields, options)


def test_a_trial_of_another_package_is_known_by_its_entry_point(coins):
    assert trial_paths()["coins"] == "trialist_coins:CoinsTrial"


def test_an_unknown_trial_suggests_the_nearest(coins):
    with pytest.raises(ValueError, match=r"no trial 'coin'\. Did you mean 'coins'"):
        load_trial("coin")


def test_a_name_with_nothing_near_lists_what_there_is():
    assert unknown("asset", "zzz", ["a", "b"], "see list") == "no asset 'zzz'. There is a, b; see list."


def test_an_unknown_option_suggests_the_nearest(coins):
    with pytest.raises(ValueError, match="no option 'throw'; did you mean 'throws'"):
        prepared(throw=3)


def test_an_unknown_preset_lists_those_there_are(coins):
    with pytest.raises(ValueError, match="no preset 'huge'; it has demo, tiny"):
        prepared(preset="huge")


def test_inputs_come_from_the_preset_and_then_from_the_user(coins):
    assert prepared(preset="demo").trial.throws == 50
    assert prepared(preset="demo", throws=7).trial.throws == 7
    assert prepared(preset="demo", throws=7).changed == ("throws",)
    assert prepared(preset="demo", throws=50).changed == ()


def test_seeds_default_to_the_presets_and_to_six_for_own_data(coins, tmp_path):
    file = tmp_path / "coin.txt"
    file.write_text("0.4")
    assert len(prepared(preset="demo").seeds) == 3
    assert len(prepared(preset="demo", data=str(file)).seeds) == 6
    assert prepared(seeds=4, seed_start=10).seeds == (10, 11, 12, 13)


def test_a_missing_file_is_said_before_anything_is_stored(coins, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepared(data=str(tmp_path / "none.txt"))


def test_an_unknown_arm_is_refused(coins):
    with pytest.raises(ValueError, match="no arm 'heavy'; it has fair, old, weighted"):
        prepared(arms=("heavy",))


def test_blocks_hold_every_arm_of_a_seed_next_to_each_other(coins):
    plan = prepared(preset="demo")
    runs = in_blocks(plan, plan.arms, plan.seeds)
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6 + [2] * 6
    assert {(run.arm, run.setting) for run in runs[:6]} == {(arm.name, arm.setting) for arm in plan.arms}
    assert [run.arm for run in runs[:6]] != [run.arm for run in runs[6:12]] or [run.arm for run in runs[6:12]] != [
        run.arm for run in runs[12:]
    ]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([Arm("a", "control"), Arm("a", "control"), Arm("b", "treatment")], "declared twice"),
        ([Arm("a", "control"), Arm("b", "control")], "needs one treatment"),
        ([Arm("b", "treatment")], "at least one control"),
        ([Arm("a", "control", null=True), Arm("b", "treatment")], "null for some arms"),
        ([Arm("a", "control", null=True), Arm("b", "treatment", null=True)], "every setting is null"),
        ([Arm("a", "factor"), Arm("b", "factor")], "need `effect`"),
        ([Arm("a", "control", tune={"x": (1, 2, 3)}), Arm("b", "treatment")], "every arm gets 2 tries"),
        ([Arm("a", "control"), Arm("b", "treatment", tuned_as="a")], "tuned as 'a', so it has no `tune`"),
        (
            [Arm("a", "control", tune={"x": (1, 2)}), Arm("b", "treatment", tune={"x": (1, 2)}, tuned_as="a")],
            "tuned as 'a', so it has no `tune`",
        ),
    ],
)
def test_arms_that_cannot_give_a_verdict_are_refused(coins, arms, message):
    with pytest.raises(ValueError, match=message):
        check_arms("coins", load_trial("coins")(), arms)


def test_an_arm_that_is_tuned_as_another_takes_the_values_chosen_for_that_one_in_every_setting():
    arms = [
        Arm("a", "control", options={"x": 0}, tune={"x": (1, 2)}),
        Arm("b", "treatment", options={"x": 0}, tuned_as="a"),
        Arm("b", "treatment", "null", null=True, options={"x": 0}, tuned_as="a"),
    ]
    assert [arm["x"] for arm in Tuned({"a": {"x": 2}}).apply(arms)] == [2, 2, 2]
    assert [arm["x"] for arm in Tuned().apply(arms)] == [0, 0, 0]


def test_leaving_out_the_arm_that_another_is_tuned_as_is_refused():
    arms = [Arm("a", "control"), Arm("b", "treatment", tuned_as="c")]
    with pytest.raises(ValueError, match="--arms leaves b without c, whose tuned values it takes"):
        check_choice("coins", arms)


def test_a_replaced_endpoint_needs_a_margin_and_a_direction(coins):
    trial = load_trial("coins")()
    with pytest.raises(ValueError, match="--margin"):
        split_settings({"endpoint": "tails"})
    with pytest.raises(ValueError, match="which direction"):
        replaced_endpoint(trial, split_settings({"endpoint": "tails", "margin": 1.0})[0])
    lower = split_settings({"endpoint": "tails:lower", "margin": 1.0})[0]
    assert replaced_endpoint(trial, lower) == Endpoint("tails", better="lower", margin=1.0)
    known = split_settings({"endpoint": "longest_streak", "margin": 2.0})[0]
    assert replaced_endpoint(trial, known) == Endpoint("longest_streak", unit="throws", better="higher", margin=2.0)


def test_evidence_of_changed_inputs_needs_a_name_of_its_own(coins):
    assert check_evidence_name(prepared(save_evidence="", preset="demo")) == "demo"
    with pytest.raises(ValueError, match="throws differ from preset"):
        check_evidence_name(prepared(save_evidence="", throws=3))
    assert check_evidence_name(prepared(save_evidence="few", throws=3)) == "few"


def test_a_time_that_decides_needs_one_worker(coins, monkeypatch):
    plan = prepared(workers=2, endpoint="step_time:lower", margin=1.0)
    check_workers(plan)
    timed = prepared(workers=2, endpoint="seconds:lower", margin=1.0)
    monkeypatch.setattr(type(timed), "timed", True)
    with pytest.raises(ValueError, match="--workers must be 1"):
        check_workers(timed)


@pytest.mark.parametrize("looks", ["", "3,3", "5,3", "2,4", "a"])
def test_looks_that_do_not_rise_from_three_are_refused(looks):
    with pytest.raises(ValueError, match="--looks"):
        split_settings({"looks": looks})[0].look_points()
