from __future__ import annotations

import collections
import dataclasses
import json
import math

import pytest

from tests.trials.conftest import arm_of
from trialist.engine.context import Context
from trialist.engine.contract import Cost, Outcome
from trialist.engine.records import RunRecord
from trialist.engine.verdict import decide
from trialist.trials._reward_arms import GroupBatches, rows_of
from trialist.trials._reward_data import generated
from trialist.trials._reward_models import new_reward_model
from trialist.trials.rrm import RRMTrial

SMALL = {"layers": 1, "width": 16, "pairs": 40, "forwards": 480, "batch": 24, "test_items": 20,
         "learning_rate": 3e-4}  # fmt: skip


@pytest.fixture
def trial():
    return RRMTrial(**SMALL)


def test_every_arm_spends_the_same_sequence_forwards_what_filtering_takes_included(trial, run_arm):
    trial.check()
    outcomes = {arm.name: run_arm(trial, arm) for arm in trial.arms() if arm.setting == "artefacts"}
    names = {endpoint.name for endpoint in trial.claim.endpoints} | {"validation_accuracy"}
    for outcome in outcomes.values():
        assert set(outcome.metrics) == names
        assert 480 - 2 * 24 < outcome.cost.sequence_forwards <= 480
        assert not outcome.items
    assert outcomes["plain"].cost.sequence_forwards == 480
    steps = {name: outcome.cost.steps for name, outcome in outcomes.items()}
    assert steps["plain"] == steps["unfiltered"] == steps["labels-off"] == 20 > steps["filter-only"] > steps["rrm"]
    assert "the filter kept" in outcomes["rrm"].notes[0]
    assert "have the wrong label" in outcomes["filter-only"].notes[0]


def test_a_run_is_a_pure_function_of_its_seed_and_arms_begin_alike(trial, run_arm):
    first, again, other = (run_arm(trial, arm_of(trial, "rrm", "artefacts"), seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics != {}
    assert first.curves != other.curves


def rows_for(trial, name, tmp_path, earlier=None):
    context = Context(0, tmp_path, tmp_path)
    task = trial.task()
    data = generated(task, context, pairs=trial.pairs, test_items=8, ids=range(task.vocabulary))
    rows, spent, told = rows_of(trial, arm_of(trial, name, "artefacts"), context, data, lambda: (earlier, 80))
    return rows, spent, told, data


@pytest.mark.parametrize("min_gap", [0.45, 0.5])
def test_the_filter_alone_keeps_the_annotated_pairs_that_are_wrong_or_unsure_and_no_other(tmp_path, min_gap):
    import torch

    trial = RRMTrial(**{**SMALL, "noise": 0.3, "min_gap": min_gap})
    earlier = new_reward_model(7, trial.task(), layers=1, width=16).eval()
    rows, spent, told, data = rows_for(trial, "filter-only", tmp_path, earlier)
    expected = []
    for number, row in enumerate(data.train):
        with torch.no_grad():
            rewards = [
                earlier(torch.tensor([[*map(int, f"{row['prompt']} {row[side]}".split())]])).logits.item()
                for side in ("chosen", "rejected")
            ]
        if 1 - 1 / (1 + math.exp(rewards[1] - rewards[0])) >= min_gap:
            expected.append(number)
    assert [row["source_index"] for row in rows] == expected
    assert 0 < len(expected) < 40
    assert {row["pair_type"] for row in rows} == {"original"}
    assert spent == 80 + 80
    wrong = sum(data.train[number]["mislabelled"] for number in expected) / len(expected)
    assert f"; {wrong:.0%} of them have the wrong label" in told[-1]


def test_without_labels_the_same_pairs_are_trained_on_and_those_that_were_annotated_are_ties(trial, tmp_path):
    labelled, off = (rows_for(trial, name, tmp_path)[0] for name in ("unfiltered", "labels-off"))
    assert len(labelled) == len(off) > 40
    for row, without in zip(labelled, off):
        original = row["pair_type"] == "original"
        assert without == {**row, "label_prob": 0.5 if original else row["label_prob"]}
    kinds = collections.Counter(row["pair_type"] for row in off)
    assert kinds["original"] == 40
    assert set(kinds) == {"original", "non_contextual", "neutral"}


def verdict(trial, accuracies, settings=("artefacts", "balanced")):
    """The verdict over four seeds; accuracies: (setting, arm) -> (crossed, clean)."""
    arms = [arm for arm in trial.arms() if arm.role != "reference" and arm.setting in settings]
    records = []
    for arm in arms:
        crossed, clean = accuracies[arm.setting, arm.name]
        for seed in range(4):
            jitter = 0.001 * ((seed * 7 + len(arm.name)) % 5)
            metrics = {endpoint.name: 0.5 for endpoint in trial.claim.endpoints}
            metrics |= {"crossed_accuracy": crossed + jitter, "clean_accuracy": clean + jitter}
            outcome = Outcome(metrics, cost=Cost(sequence_forwards=480))
            name = f"{arm.name}-{arm.setting}-{seed}"
            records.append(RunRecord(name, "rrm", arm.name, arm.setting, seed, "done", outcome, {"wall_seconds": 1.0}))
    return decide(trial, arms, records)


LEARNED = {
    **{("artefacts", name): (0.6, 0.85) for name in ("plain", "filter-only")},
    ("artefacts", "rrm"): (0.75, 0.85),
    **{("balanced", name): (0.8, 0.85) for name in ("plain", "filter-only", "rrm")},
}


def test_a_gain_where_artefacts_are_balanced_makes_the_trial_void(trial):
    assert verdict(trial, LEARNED).word == "supported"
    found = verdict(trial, {**LEARNED, ("balanced", "rrm"): (0.9, 0.85)})
    assert found.word == "void"
    assert [effect.null_word for effect in found.null_effects] == ["effect shown"] * 2


@pytest.mark.parametrize(("clean", "data", "word"), [(0.52, "generated", "void"), (0.57, "generated", "void"),
                                                     (0.52, "own", "void"), (0.57, "own", "supported")])  # fmt: skip
def test_where_the_controls_learned_nothing_from_the_labels_the_trial_is_void(trial, clean, data, word):
    if data == "own":
        trial = RRMTrial(model="llama", data="rows.jsonl")
    found = verdict(trial, {key: (crossed, clean) for key, (crossed, _) in LEARNED.items()})
    assert found.word == word
    if word == "void":
        assert "fails its sanity floor: mean clean accuracy" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "learned"), [(0.05, True), (0.5, False)])
def test_labels_thrown_by_a_coin_leave_the_control_below_the_floor(run_arm, noise, learned):
    trial = RRMTrial(pairs=600, forwards=9_600, test_items=100, noise=noise)
    outcome = run_arm(trial, arm_of(trial, "plain", "artefacts"))
    assert (outcome.metrics["clean_accuracy"] > trial.claim.guards[0].floor) is learned


def test_every_preset_leaves_two_thirds_of_its_budget_to_the_training_of_the_treatment():
    for options in RRMTrial.presets.values():
        trial = RRMTrial(**{name: value for name, value in options.items() if name not in ("seeds", "about")})
        assert 3 * (2 + 6) * trial.pairs <= trial.forwards


def test_a_batch_holds_whole_groups_and_the_plan_ends_before_the_budget_does():
    groups = [{"sequences": [[1]] * count} for count in (2, 6, 3, 4, 2, 5, 6)]
    batches = GroupBatches(groups, 10, 100, 0)
    plan = batches.plan()
    sizes = [sum(len(groups[index]["sequences"]) for index in batch) for batch in plan]
    assert max(sizes) <= 10
    assert 90 < sum(sizes) == batches.spent(plan) <= 100
    used = collections.Counter(index for batch in plan for index in batch)
    assert max(used.values()) - min(used[index] for index in range(7)) <= 1  # epoch after epoch
    with pytest.raises(ValueError, match="a prompt has 6"):
        GroupBatches(groups, 5, 100, 0).plan()


def test_an_arm_whose_filter_diverges_has_diverged(trial, run_arm):
    outcome = run_arm(trial, arm_of(trial, "rrm", "artefacts").with_options(learning_rate=30.0))
    assert outcome.diverged.startswith("the model to filter by: ")
    assert 0 < outcome.cost.sequence_forwards <= 80


ROWS = [
    {"prompt": f"question {n * n} of {n}? ", "chosen": f"answer {n}", "rejected": f"none{' at all' * (n % 2)} {n}"}
    for n in range(90)
]


def test_a_given_model_and_rows_of_ones_own_go_through_the_same_path(llama_folder, run_arm, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = {**SMALL, "forwards": 400, "length": 64}
    trial = RRMTrial(model=llama_folder, data=str(rows), phrase="Sure:", lora=2, **sizes)
    trial.check()
    outcome = run_arm(trial, arm_of(trial, "rrm", "artefacts"), keep_model=True)
    assert set(outcome.undefined) == {"relevance_accuracy", "best_of_16_quality", "best_of_16_artefacts"}
    names = {endpoint.name for endpoint in trial.claim.endpoints}
    assert names == set(outcome.metrics) - {"validation_accuracy"} | set(outcome.undefined)
    for name, items in outcome.items.items():
        assert sum(items.scores) / len(items.scores) == pytest.approx(outcome.metrics[name])
    assert set(outcome.items) == {"crossed_accuracy", "clean_accuracy"}
    assert trial.replicates_over() == "seed x item"
    assert any("pairs to train on" in note for note in outcome.notes)
    assert trial.remarks()
    other = RRMTrial(model=llama_folder, **SMALL)  # symbols, spread over its vocabulary
    other.check()
    assert run_arm(other, arm_of(other, "plain", "balanced")).cost.sequence_forwards == 480
    from transformers import AutoModelForSequenceClassification

    kept = next(tmp_path.glob("artefacts-rrm-*/model"))
    assert AutoModelForSequenceClassification.from_pretrained(kept).config.num_labels == 1


def test_a_given_model_is_trained_without_its_dropout(run_arm, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    from trialist.data.tokenizers import byte_tokenizer

    trained = []
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), share)
        folder = tmp_path / f"gpt2-{share}"
        config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=40, eos_token_id=257, **dropout)
        GPT2LMHeadModel(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        trial = RRMTrial(model=str(folder), **SMALL)
        outcome = run_arm(trial, arm_of(trial, "plain", "artefacts"), keep_model=True)
        assert outcome.diverged is None
        trained.append(load_file(next(tmp_path.glob("artefacts-plain-*/model/model.safetensors"))))
        next(tmp_path.glob("artefacts-plain-*")).rename(tmp_path / f"trained-{share}")
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": 0}, "--pairs must be at least 1"),
        ({"forwards": 300}, "--forwards 300 is too few for --pairs 40"),
        ({"batch": 25}, "--batch must be even and at least 6"),
        ({"width": 18}, "--width 18 must be a multiple of 4"),
        ({"noise": 1.5}, "--noise must be from 0 to 1, not 1.5"),
        ({"sample_fraction": 0.0}, "--sample-fraction must be above 0"),
        ({"data": "rows.jsonl"}, "the built-in model reads symbols"),
        ({"lora": 4}, "--lora adapts a given model"),
    ],
)
def test_inputs_that_cannot_work_are_refused(trial, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **change).check()
