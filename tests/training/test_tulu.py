from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("trl", reason="the extra `trl` is not installed")

from tests.training.conftest import tiny_llama
from trialist.data.tokenizers import byte_tokenizer
from trialist.training import progress
from trialist.training.tulu import SETTINGS, STAGES, Tulu

CHATML = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict:
    """A tiny Llama, and a few rows for each stage."""
    folder = tmp_path_factory.mktemp("tulu")
    llama = tiny_llama(vocab_size=259, max_position_embeddings=96)
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = CHATML
    llama.config.eos_token_id = llama.generation_config.eos_token_id = tokenizer.eos_token_id
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    taught = [{"prompt": f"{n}+{n}", "completion": str(2 * n)} for n in range(12)]
    preferred = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(12)]
    asked = [{"question": f"{n}+1", "answer": f"#### {n + 1}"} for n in range(6)]
    return {
        "model": str(folder / "model"),
        "sft_data": write(folder / "sft.jsonl", taught),
        "preference_data": write(folder / "preferences.jsonl", preferred),
        "rlvr_data": write(folder / "rlvr.jsonl", asked),
        "rlvr_columns": "prompt=question",
        "steps": 2,
        "batch": 6,
        "group": 3,
        "answer_length": 5,
        "validation": 0.0,
        "checkpoint_every": 1,
        "device": "cpu",
    }


def tulu(given, output, **options) -> Tulu:
    return Tulu(**{**given, "output": str(output), **options})


def run(given, output, **options):
    said: list[str] = []
    return tulu(given, output, **options)(said.append), said


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_ratios_are_those_of_the_published_tables():
    """Learning rate over batch of both papers, recomputed from the two."""

    def ratios(stage, scale):
        return {name: getattr(settings, stage).ratio * scale for name, settings in SETTINGS.items()}

    published = {"tulu3": 0.039, "tulu3-70b": 0.016, "smoltulu-1130": 11.25, "smoltulu-1207": 0.097}
    assert ratios("sft", 1e6) == pytest.approx(published, abs=5e-4)
    published = {"tulu3": 0.039, "tulu3-70b": 0.016, "smoltulu-1130": 0.667, "smoltulu-1207": 0.156}
    assert ratios("preference", 1e7) == pytest.approx(published, abs=5e-4)
    rewards = ratios("reward", 1e7)
    assert (rewards["smoltulu-1130"], rewards["smoltulu-1207"]) == pytest.approx((100, 0.938), abs=5e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_batch_keeps_the_ratio(name):
    for stage in STAGES:
        used = getattr(SETTINGS[name], stage)
        other = used.with_batch(3)
        assert other.batch == 3
        assert other.ratio == pytest.approx(used.ratio)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rows_of_a_step_are_those_of_the_settings_over_all_ranks(given, tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for name, settings in SETTINGS.items():
        chain = tulu(given, tmp_path, settings=name, batch=None, group=8, micro_batch=5)
        for stage in STAGES:
            made, used = chain.recipe(stage), getattr(settings, stage)
            assert made.batch * made.accumulate * ranks == used.batch
            assert made.batch <= 5
            assert made.learning_rate == used.learning_rate


def test_each_stage_starts_from_the_stage_before_it_in_the_chain(given, tmp_path):
    def starts(stages):
        chain = tulu(given, tmp_path, stages=stages)
        return [chain.start(name).removeprefix(f"{tmp_path}/") for name in stages.split(",")]

    model = given["model"]
    assert starts("sft,preference,reward,rlvr") == [model, "sft", "sft", "preference"]
    assert starts("sft,rlvr") == [model, "sft"]
    assert starts("preference,reward") == [model, model]
    assert starts("reward,rlvr") == [model, model]


def test_length_normalised_dpo_with_equal_lengths_is_dpo_with_beta_over_the_length(given, tmp_path):
    from trialist.objectives.preference import preference_loss

    made = tulu(given, tmp_path).recipe("preference")
    assert (made.objective, made.beta) == ("dpo-norm", 5.0)
    length, generator = 4, torch.Generator().manual_seed(0)
    values = [-3 * torch.rand(3, length, generator=generator, dtype=torch.float64) for _ in range(4)]
    masks = [torch.ones(3, length, dtype=torch.bool)] * 2
    normalised = preference_loss(values[0], values[1], *masks, *values[2:], method="dpo-norm", beta=5.0)[0]
    plain = preference_loss(values[0], values[1], *masks, *values[2:], method="dpo", beta=5.0 / length)[0]
    torch.testing.assert_close(normalised, plain, rtol=1e-12, atol=0.0)


def test_four_stages_leave_four_models_and_are_not_run_again(given, tmp_path):
    found, said = run(given, tmp_path / "out")
    for number, stage in enumerate(STAGES, start=1):
        assert any(line.startswith(f"stage {number} of 4: {stage}, from") for line in said)
        assert found[f"{stage}: steps"] == 2
        assert not (tmp_path / "out" / stage / "checkpoint").exists()
    for stage in ("sft", "preference", "rlvr"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / stage)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "reward")
    assert reward.config.num_labels == 1
    before, after = weights(given["model"]), weights(tmp_path / "out" / "sft")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again, told = run(given, tmp_path / "out")
    assert again == found
    assert sum("holds the finished model" in line for line in told) == 4
    assert not any(line.startswith("step") for line in told)


@pytest.mark.parametrize("killed_in", ["sft", "rlvr"])
def test_a_chain_that_was_killed_goes_on_to_the_bit(given, tmp_path, monkeypatch, killed_in):
    stages = "sft,rlvr"

    def interrupted():
        seen: list[str] = []

        def kill(self, args, state, control, **kwargs):
            if killed_in in args.output_dir and state.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(progress.Lines, "on_pre_optimizer_step", kill, raising=False)
        tulu(given, tmp_path / "killed", stages=stages)(seen.append)

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / killed_in / "checkpoint" / "checkpoint-1").is_dir()
    _, said = run(given, tmp_path / "killed", stages=stages)
    assert "goes on from step 1" in said
    assert any("holds the finished model" in line for line in said) == (killed_in == "rlvr")
    run(given, tmp_path / "whole", stages=stages)
    for stage in ("sft", "rlvr"):
        a, b = weights(tmp_path / "killed" / stage), weights(tmp_path / "whole" / stage)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_settings_in_the_same_folder_are_refused(given, tmp_path):
    run(given, tmp_path / "out", stages="sft")
    with pytest.raises(ValueError, match=r"holds a finished model of other settings \(.*learning_rate"):
        run(given, tmp_path / "out", stages="sft", settings="smoltulu-1130")


def test_the_reward_model_can_have_a_say_in_the_last_stage(given, tmp_path):
    made = tulu(given, tmp_path, reward_weight=0.5).recipe("rlvr")
    assert made.reward_model == str(tmp_path / "reward")
    with pytest.raises(ValueError, match="--stages must have reward and rlvr"):
        tulu(given, tmp_path, reward_weight=0.5, stages="sft,rlvr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": "sft,dpo"}, "no stage 'dpo'; there are sft, preference, reward, rlvr"),
        ({"stages": "rlvr,sft"}, "name each stage once, in the order sft, preference, reward, rlvr"),
        ({"stages": "sft,sft"}, "name each stage once"),
        ({"stages": ","}, "--stages is empty"),
        ({"sft_data": None}, "stage sft without data: give --sft-data ROWS"),
        (
            {"preference_data": None},
            "stages preference, reward without data: give --preference-data ROWS, --reward-data ROWS",
        ),
        ({"micro_batch": 0}, "--micro-batch must be at least 1, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(given, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        tulu(given, tmp_path, **change)


def test_what_the_last_stage_cannot_read_is_said_before_the_first_begins(given, tmp_path):
    broken = write(tmp_path / "broken.jsonl", [{"question": "?", "answer": "none"}])
    with pytest.raises(ValueError, match="row 1: no number in 'answer'"):
        run(given, tmp_path / "out", rlvr_data=broken)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        run(given, tmp_path / "out", rlvr_data=str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="a step has 4 answers"):
        run(given, tmp_path / "out", batch=4)
    assert not (tmp_path / "out").exists()


def test_the_logarithm_of_the_ratio_is_that_of_time_minus_that_of_examples():
    """At equal epochs the ratio is learning-rate time up to a constant: the two cannot be told apart there."""
    examples, epochs = 939_343, 2
    for settings in SETTINGS.values():
        used = settings.sft
        steps = examples * epochs / used.batch
        assert used.learning_rate * steps == pytest.approx(used.ratio * examples * epochs)
        assert math.log(used.ratio) == pytest.approx(
            math.log(used.learning_rate * steps) - math.log(used.batch * steps)
        )
