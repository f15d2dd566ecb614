from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.trials.conftest import arm_of, model_folder
from trialist.engine.identity import inputs_by_content
from trialist.trials._text import Text, load_rows
from trialist.trials.selective_attention import SelectiveAttentionTrial

SMALL = {"layers": 2, "width": 16, "heads": 2, "length": 33, "batch": 3, "steps": 4, "test_bytes": 2_000}


@pytest.fixture
def trial(text_file):
    return SelectiveAttentionTrial(data=text_file, **SMALL)


def test_all_arms_spend_the_same_tokens_and_give_both_metrics(trial, run_arm):
    outcomes = [run_arm(trial, arm) for arm in trial.arms()]
    assert {outcome.cost.tokens for outcome in outcomes} == {outcomes[0].cost.tokens}
    assert 4 * 3 * 33 - 33 < outcomes[0].cost.tokens <= 4 * 3 * 33  # rows are full but for the last one
    for outcome in outcomes:
        assert set(outcome.metrics) == {"bits_per_byte", "validation_bits_per_byte"}
        assert 0 < outcome.metrics["bits_per_byte"] < 12
        assert outcome.curves["bits_per_byte"][-1] == (outcome.cost.tokens, outcome.metrics["bits_per_byte"])


def test_a_run_is_a_pure_function_of_its_seed(trial, run_arm):
    arm = arm_of(trial, "selective", "text")
    first, again, other = (run_arm(trial, arm, seed) for seed in (0, 0, 1))
    assert first.metrics == again.metrics
    assert first.metrics != other.metrics


def test_arms_start_from_the_same_weights_and_more_heads_cost_more(trial, run_arm, tmp_path):
    import torch

    from trialist.engine.context import Context
    from trialist.trials._language_model import arm_model

    shape = {"vocab_size": 259, "layers": 2, "width": 16, "heads": 2, "length": 33, "device": "cpu", "lora": 0}
    standard, selective = (
        arm_model(arm_of(trial, name, "text"), Context(0, tmp_path, tmp_path), "decoder", **shape).state_dict()
        for name in ("standard", "selective")
    )
    assert standard.keys() == selective.keys()
    assert all(torch.equal(standard[name], selective[name]) for name in standard)
    costs = {
        name: run_arm(trial, arm_of(trial, name, "text")).cost for name in ("standard", "selective", "double-heads")
    }
    assert costs["double-heads"].flops > costs["standard"].flops == costs["selective"].flops


def test_the_null_setting_holds_the_same_bytes_in_another_order(trial, tmp_path):
    from trialist.engine.context import Context

    context = Context(0, tmp_path, tmp_path / "stages")
    (plain, size), (shuffled, size_shuffled) = (
        load_rows(trial.text.stage(context, shuffled), "test") for shuffled in (False, True)
    )
    assert size == size_shuffled == plain.scored == shuffled.scored
    counts = [np.bincount(rows.tokens[rows.positions > 0], minlength=259) for rows in (plain, shuffled)]
    assert (counts[0] == counts[1]).all()
    assert (plain.tokens != shuffled.tokens).any()
    assert len(context.used_stages) == 2


def test_training_and_test_text_do_not_overlap(trial):
    splits = trial.text.splits()
    assert not set(splits.train.texts) & set(splits.test.texts)


def test_a_given_model_goes_through_the_same_path_and_loses_the_arm_it_cannot_have(
    text_file, llama_folder, run_arm, tmp_path
):
    trial = SelectiveAttentionTrial(model=llama_folder, data=text_file, **{**SMALL, "lora": 2})
    trial.check()
    assert {arm.name for arm in trial.arms()} == {"standard", "selective"}
    assert "twice the heads is left out" in trial.remarks()[-1]
    selective = run_arm(trial, arm_of(trial, "selective", "text"), keep_model=True)
    standard = run_arm(trial, arm_of(trial, "standard", "text"))
    assert selective.cost.tokens == standard.cost.tokens
    assert selective.metrics != standard.metrics

    from trialist.models.loading import load_model
    from trialist.models.selective_attention.swap import is_selective

    assert is_selective(load_model(str(model_folder(tmp_path))))


def test_another_file_of_the_same_content_is_the_same_input(trial, text_file, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    assert inputs_by_content(trial) == inputs_by_content(dataclasses.replace(trial, data=str(copy)))


def test_a_bpe_tokenizer_is_scored_per_byte_as_well(trial, run_arm):
    bpe = dataclasses.replace(trial, tokenizer="bpe-300")
    outcome = run_arm(bpe, arm_of(bpe, "standard", "text"))
    assert 0 < outcome.metrics["bits_per_byte"] < 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "none.txt"}, "none.txt"),
        ({"width": 30, "heads": 4}, "--width 30 must be an even multiple of --heads 4"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"lora": 4}, "--lora adapts a given model"),
        ({"tokenizer": "bpe-many"}, "bpe-4096"),
        ({"model": "nowhere/"}, "nowhere"),
    ],
)
def test_inputs_that_cannot_work_are_refused_before_anything_runs(trial, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        dataclasses.replace(trial, **changes).check()


def test_a_sequence_longer_than_the_model_takes_is_refused(text_file, llama_folder):
    with pytest.raises(ValueError, match=r"sequences of 65 tokens are longer than .* takes \(64\)"):
        SelectiveAttentionTrial(model=llama_folder, data=text_file, **{**SMALL, "length": 65}).check()


def test_a_model_folder_without_tokenizer_is_refused(text_file, llama_folder, tmp_path):
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(llama_folder, folder, ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(ValueError, match="no tokenizer"):
        SelectiveAttentionTrial(model=str(folder), data=text_file, **SMALL).check()


def test_text_that_is_too_little_for_its_steps_is_noted(trial, run_arm):
    long = dataclasses.replace(trial, steps=1200, max_examples=30, batch=8, length=9, layers=1)
    outcome = run_arm(dataclasses.replace(long, steps=1200 // 4), arm_of(long, "standard", "text"))
    assert outcome.notes == () or "times" in outcome.notes[0]


def test_documents_are_taken_in_one_order_whatever_the_seed(text_file, tmp_path):
    text = Text(text_file, "bytes", None, "", None, 33, 400, 500)
    assert text.digest() == Text(text_file, "bytes", None, "", None, 65, 400, 500).digest()
