from __future__ import annotations

import math

import pytest
import torch

from tests.trials.conftest import arm_of
from trialist.engine.contract import Arm, Outcome
from trialist.models import load_model
from trialist.trials._compact import Caches, Passages, Reading
from trialist.trials.think import KEEPS, RANGE, ThinKTrial, read

SMALL = {
    "layers": 1, "width": 32, "heads": 2, "key_value_heads": 1, "length": 112, "following": 8, "batch": 4, "steps": 3,
    "test_bytes": 4096, "recall_layers": 1, "recall_width": 32, "recall_heads": 2, "recall_steps": 4, "recall_batch": 4,
    "pairs": 40, "asked": 3, "test_items": 6,
}  # fmt: skip


@pytest.fixture
def trial(text_file):
    return ThinKTrial(data=text_file, **SMALL)


@pytest.mark.parametrize("setting", ["text", "recall"])
def test_all_arms_are_read_over_the_same_bytes_and_items_from_one_model(trial, run_arm, tmp_path, setting):
    arms = [arm for arm in trial.arms() if arm.setting == setting]
    outcomes = {arm.name: run_arm(trial, arm) for arm in arms}
    assert len(list((tmp_path / "stages").glob("model-*"))) == 1
    treatment = outcomes["think"]
    items = treatment.items["nats_added_by_pruning"]
    assert len(items.ids) == 6
    for name, outcome in outcomes.items():
        assert outcome.items["nats_added_by_pruning"].ids == items.ids
        assert outcome.metrics["nats_of_full"] == pytest.approx(treatment.metrics["nats_of_full"])
        if name == "full-cache":
            assert outcome.metrics["nats_added_by_pruning"] == 0.0
            continue
        shares = [share for share, _ in outcome.curves["nats_added_by_share_of_bytes"]]
        assert len(shares) == len(KEEPS)
        assert shares[0] < RANGE[0]
        assert shares[-1] > RANGE[1]
        assert outcome.cost.bytes >= treatment.cost.bytes * (1 - trial.budget.tolerance)
        assert outcome.cost.bytes <= treatment.cost.bytes * 1.1
        assert all(math.isfinite(score) for score in outcome.items["nats_added_by_pruning"].scores)


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm, tmp_path):
    import shutil

    arm = arm_of(trial, "think", "recall")
    first = run_arm(trial, arm)
    shutil.rmtree(tmp_path / "stages")
    again = run_arm(trial, arm)
    assert again.metrics == pytest.approx(first.metrics)
    assert run_arm(trial, arm, seed=1).metrics != first.metrics


def test_the_null_setting_has_all_controls_and_a_model_of_its_own(trial, run_arm):
    null = {arm.name for arm in trial.arms() if arm.null}
    assert null == {arm.name for arm in trial.arms() if arm.setting == "recall" and arm.role != "reference"}
    outcome = run_arm(trial, arm_of(trial, "think", "chance"))
    assert abs(outcome.metrics["nats_added_by_pruning"]) < 0.2


def test_a_given_model_is_read_as_it_is(text_file, run_arm, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.data.tokenizers import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    folder = tmp_path / "given"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    trial = ThinKTrial(
        model=str(folder), data=text_file, length=112, following=8, pairs=5, asked=2, test_items=3, batch=2
    )
    trial.check()
    assert trial.replicates_over() == "item"
    assert {arm.setting for arm in trial.arms()} == {"text", "recall"}
    assert any("null setting is left out" in remark for remark in trial.remarks())
    for setting in ("text", "recall"):
        for name in ("think", "snapkv"):
            outcome = run_arm(trial, arm_of(trial, name, setting))
            assert len(outcome.items["nats_added_by_pruning"].ids) == 3
            assert outcome.cost.tokens is None
    load_model(str(folder))  # what was read is unchanged on disk


def passages() -> Passages:
    tokens = torch.randint(3, 250, (2, 70), generator=torch.Generator().manual_seed(0))
    return Passages(tokens[:, :60], tokens[:, 60:], tokens[:, 60:], ("a", "b"), ("x", "x"))


def test_a_whole_cache_scores_as_one_forward_pass(llama_folder):
    model = load_model(llama_folder)
    model.config.max_position_embeddings = 128
    batch = passages()
    reading = Caches(model, 4, 8).read(batch, {})
    ids = torch.cat([batch.prompt, batch.following], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, 59:-1].log_softmax(-1)
    expected = -logits.gather(-1, batch.following[..., None])[..., 0].mean(-1)
    assert reading.nats == pytest.approx(expected.tolist(), abs=1e-4)
    assert reading.share == pytest.approx(1.0)


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "recency"])
def test_tokens_are_as_many_as_the_bytes_hold_and_not_one_more(llama_folder, policy):
    model = load_model(llama_folder)
    caches, batch = Caches(model, 4, 8), passages()
    arm = Arm("tokens", "control", options={"channels": "", "recover": "none", "policy": policy})
    whole = caches.bytes_of(batch, {})
    for share in (0.68, 0.9):
        budget = caches.budget_for(share * whole, arm, 1.0, batch)
        assert caches.bytes_of(batch, caches.parts(arm, 1.0, budget)) >= share * whole
        assert caches.bytes_of(batch, caches.parts(arm, 1.0, budget - 1)) < share * whole


def test_the_endpoint_is_the_mean_height_of_the_curve_of_each_item():
    batch = passages()
    full = Reading((1.0, 2.0), (0.5, 0.25), 100.0, 1.0)
    curve = [
        Reading((1.0 + x, 2.0 + 3 * x), (0.5, 0.25), 100 * share, share)
        for share in (0.6, 0.7, 0.8, 0.95)
        for x in (-math.log2(share),)
    ]
    outcome = read(Outcome(), [batch], [full], [curve])
    middle = -(math.log2(RANGE[0]) + math.log2(RANGE[1])) / 2  # of a straight line
    assert outcome.items["nats_added_by_pruning"].scores == pytest.approx((middle, 3 * middle))
    assert outcome.items["nats_added_by_pruning"].clusters == ("x", "x")
    assert outcome.metrics["nats_of_full"] == 1.5
    assert outcome.cost.bytes == pytest.approx(100 * (0.6 + 0.7 + 0.8 + 0.95) / 4)
    short = read(Outcome(), [batch], [full], [curve[1:]])
    assert "covers" in short.undefined["nats_added_by_pruning"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recent": -1}, "--recent -1"),
        ({"length": 60}, "--length 60 leaves prompts of 52 tokens"),
        ({"pairs": 60}, "--pairs 60: at most 48"),
        ({"asked": 41}, "--asked 41"),
        ({"key_value_heads": 3}, "--heads 2 must be a multiple"),
        ({"window": 0}, "--window must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_named(text_file, options, words):
    with pytest.raises(ValueError, match=words):
        ThinKTrial(data=text_file, **{**SMALL, **options}).check()


def test_no_benchmark_can_replace_the_endpoint(trial):
    with pytest.raises(ValueError, match="hand over no model"):
        trial.with_benchmark("lm-eval:hellaswag")
