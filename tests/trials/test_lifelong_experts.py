from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.engine.contract import Outcome
from trialist.models import load_model
from trialist.trials.lifelong_experts import LifelongExpertsTrial, when_learned

SMALL = {"layers": 2, "width": 16, "heads": 2, "experts": 64, "grown": 100, "expert_heads": 2, "top_k": 3, "key_dim": 8,
         "old_facts": 60, "new_facts": 30, "keys": 12, "classes": 3, "batch": 32, "base_steps": 20, "steps": 8}  # fmt: skip
MAIN, NULL = "new facts", "old facts again"


@pytest.fixture
def trial() -> LifelongExpertsTrial:
    return LifelongExpertsTrial(**SMALL)


def test_all_arms_start_from_one_base_and_spend_the_same_tokens(trial, run_arm, tmp_path) -> None:
    outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == MAIN]
    assert len(outcomes) == 4
    assert len({outcome.cost.tokens for outcome in outcomes}) == 1
    assert len({outcome.notes[0].split("was ")[1].split(" ")[0] for outcome in outcomes}) == 1  # recall before
    assert len(list((tmp_path / "stages").glob("*/*/model"))) + len(list((tmp_path / "stages").glob("*/model"))) == 1
    for outcome in outcomes:
        assert set(outcome.metrics) - {"kept"} == {"old_recall", "new_recall"}
        assert ("kept" in outcome.metrics) is ("kept" not in outcome.undefined)


def test_old_facts_are_counted_where_the_new_ones_are_known() -> None:
    assert when_learned([1.0, 0.8, 0.4, 0.2], [0.0, 0.5, 0.7, 1.0], 0.6) == pytest.approx(0.6)
    assert when_learned([1.0, 0.8], [0.0, 0.5], 0.5) == 0.8
    assert when_learned([1.0, 0.8], [0.3, 0.5], 0.2) == 1.0
    assert when_learned([1.0, 0.8], [0.0, 0.5], 0.6) is None


def test_new_facts_that_are_not_learned_leave_the_endpoint_undefined(trial, run_arm) -> None:
    arm = arm_of(trial, "fine-tune", MAIN)
    outcome = run_arm(dataclasses.replace(trial, learned=0.999, steps=1), arm)
    assert "below --learned 0.999" in outcome.undefined["kept"]
    eager = run_arm(dataclasses.replace(trial, learned=1e-9), arm)
    assert 0 <= eager.metrics["kept"] <= 1


def trained(trial, name: str, tmp_path) -> tuple[dict, dict]:
    """Weights and buffers of the base, grown as the arm grows it, and after the arm's training."""
    arm = arm_of(trial, name, MAIN)
    context = Context(0, tmp_path / name, tmp_path / "stages", keep_model=True)
    trial.run(arm, 0, context)
    (folder,) = [path for path in (tmp_path / "stages").rglob("model") if (path / "config.json").exists()]
    base = load_model(str(folder))
    trial.prepare(base, arm, context.stream("init"))
    return base.state_dict(), load_model(str(context.model_folder)).state_dict()


def test_the_treatment_changes_new_experts_and_new_sub_keys_and_nothing_else(trial, tmp_path) -> None:
    before, after = trained(trial, "freeze-and-grow", tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.ffn.{table}.1" for table in ("down", "up", "keys")}


@pytest.mark.parametrize("name", ["fine-tune", "fine-tune-grown", "experts-only"])
def test_the_controls_change_what_their_names_say(trial, tmp_path, name: str) -> None:
    before, after = trained(trial, name, tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    generations = ("0",) if name == "fine-tune" else ("0", "1")
    experts = {f"model.layers.1.ffn.{table}.{g}" for table in ("down", "up", "keys") for g in generations}
    assert experts <= changed
    assert ("model.embed_tokens.weight" in changed) is (name != "experts-only")
    assert (changed == experts) is (name == "experts-only")


def test_learning_the_old_facts_again_is_the_null_setting(trial, run_arm) -> None:
    arms = [arm for arm in trial.arms() if arm.null]
    assert {arm.name for arm in arms} == {"fine-tune", "freeze-and-grow"}
    for arm in arms:
        metrics = run_arm(trial, arm).metrics
        assert metrics["kept"] == metrics["old_recall"]


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm) -> None:
    arm = arm_of(trial, "freeze-and-grow", MAIN)
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_another_base_is_trained_where_its_inputs_change_and_only_then(trial, run_arm, tmp_path) -> None:
    arm = arm_of(trial, "fine-tune", MAIN)
    run_arm(trial, arm)
    run_arm(dataclasses.replace(trial, steps=4, grown=144), arm)
    bases = lambda: sum((path / "config.json").exists() for path in (tmp_path / "stages").rglob("model"))  # noqa: E731
    assert bases() == 1
    run_arm(dataclasses.replace(trial, base_steps=10), arm)
    assert bases() == 2


GIVEN = {**SMALL, "layer": 0, "base_learning_rate": 1e-2}


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm, tmp_path) -> None:
    """Its base knows the facts with the experts in the layer that was named, whose growth is recorded for loading."""
    trial = LifelongExpertsTrial(model=llama_folder, **GIVEN)
    trial.check()
    arms = [arm for arm in trial.arms() if arm.setting == MAIN]
    outcomes = [run_arm(trial, arm, keep_model=True) for arm in arms]
    assert len({outcome.cost.tokens for outcome in outcomes}) == 1
    (base,) = [path for path in (tmp_path / "stages").rglob("model") if (path / "config.json").exists()]
    assert load_model(str(base)).config.swapped_ffn["layers"] == [0]
    assert load_model(str(base)).model.layers[0].mlp.num_experts == 64
    kept = load_model(str(next(tmp_path.glob("*freeze-and-grow*/model"))))
    assert kept.model.layers[0].mlp.num_experts == 100


def test_the_treatment_of_a_given_model_leaves_all_that_was_there(llama_folder, tmp_path) -> None:
    trial = LifelongExpertsTrial(model=llama_folder, **GIVEN)
    before, after = trained(trial, "freeze-and-grow", tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.0.mlp.{table}.1" for table in ("down", "up", "keys")}


def test_rates_of_a_given_model_are_gentler_unless_they_are_set(llama_folder, monkeypatch, tmp_path) -> None:
    rates = []
    monkeypatch.setattr(
        LifelongExpertsTrial,
        "train_on",
        lambda *given, learning_rate, **named: rates.append(learning_rate) or (Outcome(), {}),
    )
    for fields in ({}, {"model": llama_folder}, {"model": llama_folder, "base_learning_rate": 0.02}):
        trial = LifelongExpertsTrial(**{**SMALL, **fields})
        trial.build_base(Context(0, tmp_path, tmp_path), tmp_path / str(len(rates)))
    assert rates == [5e-3, 3e-4, 0.02]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"old_facts": 140}, "12 keys make only 144 pairs"),
        ({"grown": 64}, "--grown 64 must be more than --experts 64"),
        ({"grown": 101}, "perfect square"),
        ({"top_k": 1}, "softmax"),
        ({"width": 15}, "must be a multiple"),
        ({"classes": 1}, "--classes must be at least 2"),
        ({"learned": 1.0}, "--learned must be between 0 and 1"),
    ],
)
def test_inputs_that_cannot_work_are_named(trial, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **change).check()
