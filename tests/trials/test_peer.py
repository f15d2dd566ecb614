from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.models import PEER, count_parameters, flops_per_token
from trialist.trials import _pace
from trialist.trials._facts import dense_width, recall
from trialist.trials.peer import PEERTrial

SMALL = {"layers": 2, "width": 16, "heads": 2, "experts": 64, "expert_heads": 2, "top_k": 3, "key_dim": 8,
         "facts": 90, "keys": 12, "classes": 3, "batch": 32, "steps": 12}  # fmt: skip


@pytest.fixture
def trial() -> PEERTrial:
    return PEERTrial(**SMALL)


def test_every_control_spends_the_flops_of_the_treatment_and_hardly_more(trial, run_arm) -> None:
    for setting in ("facts", "rule"):
        arms = [arm for arm in trial.arms() if arm.setting == setting]
        outcomes = {arm.name: run_arm(trial, arm) for arm in arms}
        treated = outcomes["peer"].cost.flops
        for arm in arms:
            metrics = outcomes[arm.name].metrics
            assert set(metrics) == {"recall", "loss", "usage", "unevenness"}
            if arm["ffn"] == "peer":
                assert 0 < metrics["usage"] <= 1
                assert metrics["unevenness"] > 0
                assert f"unevenness {metrics['unevenness']:.2f} nats" in outcomes[arm.name].notes[0]
            else:  # every neuron of a dense layer has weight 1
                assert (metrics["usage"], metrics["unevenness"]) == (1, 0)
            if arm.role == "control":
                assert treated <= outcomes[arm.name].cost.flops < 1.03 * treated
            # curves lie over what is held equal
            assert outcomes[arm.name].curves["recall"][-1][0] == pytest.approx(outcomes[arm.name].cost.flops)
        if setting == "facts":
            assert outcomes["large"].cost.flops > 1.3 * treated
            assert set(outcomes) == {"swiglu", "gelu", "peer", "large", "longer", "more-experts", "no-query-norm"}


def test_the_reference_has_the_parameters_of_the_treatment(trial, tmp_path) -> None:
    context = Context(0, tmp_path, tmp_path)
    treated = count_parameters(trial.build(arm_of(trial, "peer", "facts"), context, "cpu"))
    large = count_parameters(trial.build(arm_of(trial, "large", "facts"), context, "cpu"))
    assert treated <= large <= 1.05 * treated


def test_references_with_experts_differ_from_the_treatment_in_what_they_are_named_after(trial, tmp_path) -> None:
    context = Context(0, tmp_path, tmp_path)
    layers = {
        name: trial.build(arm_of(trial, name, "facts"), context, "cpu").model.layers[1].ffn
        for name in ("peer", "more-experts", "no-query-norm")
    }
    settings = {name: layer.settings for name, layer in layers.items()}
    assert settings["more-experts"] == {**settings["peer"], "num_experts": 256}
    assert settings["no-query-norm"] == {**settings["peer"], "query_norm": "none"}
    for name in ("more-experts", "no-query-norm"):
        assert arm_of(trial, name, "facts").tuned_as == "peer"


def test_the_reference_of_equal_seconds_makes_as_many_steps_as_fit_by_a_pace_measured_once(
    trial, run_arm, monkeypatch
) -> None:
    calls = []

    def step_seconds(models, batch, dtype):
        calls.append([any(isinstance(module, PEER) for module in model.modules()) for model in models])
        return [0.3, 0.2]

    monkeypatch.setattr(_pace, "step_seconds", step_seconds)
    arm = arm_of(trial, "longer", "facts")
    outcomes = [run_arm(trial, arm, seed) for seed in (0, 1)]
    assert calls == [[True, False]]
    for outcome in outcomes:
        assert outcome.cost.steps == 18
        assert "18 steps in the time of 12 of peer" in outcome.notes[0]
    assert arm.tuned_as == "swiglu"


def test_the_pace_is_that_of_the_models(trial, tmp_path) -> None:
    context = Context(0, tmp_path, tmp_path)
    models = [trial.build(arm_of(trial, "swiglu", "facts"), context, "cpu") for _ in range(2)]
    models[0].get_input_embeddings().register_forward_pre_hook(lambda *given: time.sleep(0.03))
    batch = {"input_ids": torch.tensor([[1, 14, 25], [2, 15, 26]])}
    slow, quick = _pace.step_seconds(models, {**batch, "labels": batch["input_ids"]}, "float32")
    assert slow > 0.03 > quick > 0


def test_dense_width_is_the_least_that_reaches_the_quantity(trial, tmp_path) -> None:
    model = trial.build(arm_of(trial, "peer", "facts"), Context(0, tmp_path, tmp_path), "cpu")
    for kind in ("swiglu", "gelu"):
        built = {}
        for less in (0, 1):
            width = dense_width(kind, model, lambda m: flops_per_token(m, 3)) - less
            fields = {**model.config.to_dict(), "ffn_types": [kind] * 2, "intermediate_size": width}
            built[less] = flops_per_token(type(model)(type(model.config)(**fields)), 3)
        assert built[1] < flops_per_token(model, 3) <= built[0]


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm) -> None:
    arm = arm_of(trial, "peer", "facts")
    assert run_arm(trial, arm).metrics == run_arm(trial, arm).metrics


def test_all_arms_of_a_seed_learn_the_same_facts_in_the_same_order_from_common_weights(trial, tmp_path) -> None:
    context = Context(3, tmp_path, tmp_path)
    states = [trial.build(arm_of(trial, name, "facts"), context, "cpu").state_dict() for name in ("swiglu", "peer")]
    common = [name for name in states[0] if "ffn." not in name]
    assert len(common) > 10
    assert all(torch.equal(states[0][name], states[1][name]) for name in common)


def test_every_arm_is_tuned_with_six_tries(trial) -> None:
    for arm in trial.arms():
        if not arm.null and arm.tuned_as is None:
            tries = 1
            for values in arm.tune.values():
                tries *= len(values)
            assert tries == trial.tuning.tries == 6


def test_recall_counts_the_values_that_are_the_most_probable_token() -> None:
    class Echo(torch.nn.Module):
        """Says the sum of the two keys."""

        def forward(self, input_ids, logits_to_keep, use_cache):
            said = input_ids[:, 0] + input_ids[:, 1]
            logits = 50.0 * torch.nn.functional.one_hot(said, 20).float()[:, None].expand(-1, logits_to_keep, -1)
            return type("Output", (), {"logits": logits})

    facts = torch.tensor([[0, 1, 1], [1, 2, 3], [2, 2, 5]])
    measured = recall(Echo(), facts, torch.arange(20), "cpu")
    assert measured["recall"] == pytest.approx(2 / 3)
    assert measured["loss"] == pytest.approx(50 / 3, rel=1e-4)


def test_a_given_model_goes_through_the_same_path(llama_folder, run_arm) -> None:
    trial = PEERTrial(model=llama_folder, **{**SMALL, "experts": 16, "expert_heads": 1, "top_k": 2, "key_dim": 4})
    trial.check()
    assert {arm.name for arm in trial.arms()} == {"dense", "peer"}
    outcomes = [run_arm(trial, arm) for arm in trial.arms() if arm.setting == "facts"]
    assert outcomes[0].cost.flops >= outcomes[1].cost.flops > 0
    assert outcomes[0].metrics["usage"] == 1 >= outcomes[1].metrics["usage"] > 0


def test_an_arm_with_a_swapped_layer_differs_from_the_given_model_in_that_layer_alone(llama_folder, tmp_path) -> None:
    trial = PEERTrial(
        model=llama_folder, layer=0, **{**SMALL, "experts": 16, "expert_heads": 1, "top_k": 2, "key_dim": 4}
    )
    context = Context(0, tmp_path, tmp_path)
    dense, peer = (trial.build(arm_of(trial, name, "facts"), context, "cpu") for name in ("dense", "peer"))
    assert isinstance(peer.model.layers[0].mlp, PEER)
    assert type(peer.model.layers[1].mlp) is type(dense.model.layers[0].mlp)


def test_more_flops_than_the_given_layer_are_refused(llama_folder, run_arm) -> None:
    trial = PEERTrial(model=llama_folder, **{**SMALL, "expert_heads": 8})
    with pytest.raises(ValueError, match="more FLOPs than the feed-forward of layer 1"):
        run_arm(trial, arm_of(trial, "peer", "facts"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"facts": 145}, "12 keys make only 144 pairs"),
        ({"classes": 1}, "--classes must be at least 2"),
        ({"width": 15}, "must be a multiple of --heads"),
        ({"experts": 65}, "perfect square"),
        ({"steps": 0}, "--steps must be at least 1"),
    ],
)
def test_inputs_that_cannot_work_are_named(trial, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(trial, **change).check()
