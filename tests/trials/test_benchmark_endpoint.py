"""A benchmark of the trained model as the endpoint of a trial."""

from __future__ import annotations

import json

import pytest

from tests.trials.conftest import arm_of
from trialist.engine.options import RunOptions
from trialist.engine.plan import prepare
from trialist.evaluation.blimp import sentence_logprobs

SMALL = dict(layers=1, width=16, heads=2, length=64, batch=2, steps=4, test_bytes=512)


@pytest.fixture
def pairs(tmp_path):
    """Two sentences a pair that differ in one character."""
    file = tmp_path / "island.jsonl"
    rows = [{"sentence_good": f"bara colo {at}", "sentence_bad": f"bara xolo {at}", "UID": "island"} for at in range(6)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def settle(name: str, endpoint: str, fields: dict):
    return prepare(name, fields, RunOptions(endpoint=endpoint, margin=0.02, seeds=3))


def test_the_runs_model_is_measured_item_by_item_and_the_margin_is_the_users(text_file, pairs, run_arm, monkeypatch):
    prepared = settle("selective-attention", f"blimp:{pairs}", {"data": text_file, **SMALL})
    assert (prepared.endpoint.name, prepared.endpoint.better, prepared.endpoint.margin) == (
        "blimp accuracy",
        "higher",
        0.02,
    )
    assert prepared.trial.replicates_over() == "seed x item"
    handed = []
    import trialist.evaluation.blimp as module

    def remember(model, tokenizer, sentences, **named):
        handed.append((model, tokenizer, sentences))
        return sentence_logprobs(model, tokenizer, sentences, **named)

    monkeypatch.setattr(module, "sentence_logprobs", remember)
    outcome = run_arm(prepared.trial, arm_of(prepared.trial, "selective", "text"))
    ((model, tokenizer, sentences),) = handed
    nats, _ = sentence_logprobs(model, tokenizer, sentences)
    expected = [float(good > bad) for good, bad in zip(nats[::2], nats[1::2])]
    assert outcome.items["blimp accuracy"].scores == tuple(expected)
    assert outcome.metrics["blimp accuracy"] == pytest.approx(sum(expected) / 6)
    assert "bits_per_byte" in outcome.metrics
    assert prepared.source != prepare("selective-attention", {"data": text_file, **SMALL}, RunOptions()).source


def test_the_content_of_the_benchmark_is_part_of_a_runs_identity(text_file, pairs):
    def identity() -> str:
        prepared = settle("selective-attention", f"blimp:{pairs}", {"data": text_file, **SMALL})
        return prepared.planned(prepared.arms[0], 0).identity

    before = identity()
    assert identity() == before
    pairs.write_text(pairs.read_text().replace("xolo", "yolo"))
    assert identity() != before


def test_tuning_runs_are_not_measured_on_it(text_file, pairs, run_arm):
    prepared = settle("selective-attention", f"blimp:{pairs}", {"data": text_file, **SMALL})
    outcome = run_arm(prepared.trial, arm_of(prepared.trial, "standard", "text"), seed=1001)
    assert set(outcome.metrics) == {"bits_per_byte", "validation_bits_per_byte"}


def test_a_benchmark_longer_than_the_context_is_refused_before_any_training(text_file, pairs):
    with pytest.raises(ValueError, match=r"takes 12 tokens with this tokenizer, and the model's context is 8"):
        settle("selective-attention", f"blimp:{pairs}", {"data": text_file, **SMALL, "length": 8})


def test_a_given_model_hands_over_its_own_tokenizer(llama_folder, pairs, run_arm):
    fields = {"model": llama_folder, "fewest": 1, "most": 3, "batch": 2, "steps": 2, "test_items": 2}
    prepared = settle("selective-recall", f"blimp:{pairs}", fields)
    outcome = run_arm(prepared.trial, arm_of(prepared.trial, "standard", "assignment"))
    assert len(outcome.items["blimp accuracy"].ids) == 6


def test_a_trial_without_a_text_model_refuses_in_words(coins, pairs):
    with pytest.raises(
        ValueError, match=r"the runs of this trial hand over no model .* it takes heads, longest_streak"
    ):
        settle("coins", "lm-eval:hellaswag", {})
    with pytest.raises(ValueError, match="reads symbols and has no tokenizer for text"):
        settle("selective-recall", f"blimp:{pairs}", {})
    with pytest.raises(ValueError, match="Did you mean 'hellaswag'"):
        settle("selective-attention", "lm-eval:hellaswga", {})
    with pytest.raises(ValueError, match="--margin"):
        RunOptions(endpoint="lm-eval:hellaswag")
    with pytest.raises(ValueError, match="--benchmark-limit limits a benchmark"):
        prepare("selective-attention", {"benchmark_limit": 3}, RunOptions())
