from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("trl", reason="the extra `trl` is not installed")

from tests.training.conftest import tiny_llama
from trialist.data import assets
from trialist.data.tokenizers import byte_tokenizer
from trialist.training import progress
from trialist.training.output import ModelOutput
from trialist.training.recipe import Work
from trialist.training.tulu import SETTINGS, STAGES, Tulu

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


RLVR = ("group=3", "answer_length=5")


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
        "rlvr_options": RLVR,
        "validation": 0.0,
        "checkpoint_every": 1,
        "device": "cpu",
    }


def tulu(given, output, **options) -> Tulu:
    made = {**given, "output": str(output), **options}
    if "rlvr" not in made.get("stages", "rlvr") and made["rlvr_options"] == RLVR:
        del made["rlvr_options"]
    return Tulu(**made)


def run(given, output, **options):
    said: list[str] = []
    return tulu(given, output, **options)(said.append), said


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def test_the_ratios_are_those_of_the_published_tables():
    """Learning rate over batch of both papers, recomputed from the two."""

    def ratios(stage, scale):
        return {name: settings[stage].ratio * scale for name, settings in SETTINGS.items()}

    published = {"tulu3": 0.039, "tulu3-70b": 0.016, "smoltulu-1130": 11.25, "smoltulu-1207": 0.097}
    assert ratios("sft", 1e6) == pytest.approx(published, abs=5e-4)
    published = {"tulu3": 0.039, "tulu3-70b": 0.016, "smoltulu-1130": 0.667, "smoltulu-1207": 0.156}
    assert ratios("preference", 1e7) == pytest.approx(published, abs=5e-4)
    rewards = ratios("reward", 1e7)
    assert (rewards["smoltulu-1130"], rewards["smoltulu-1207"]) == pytest.approx((100, 0.938), abs=5e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_batch_keeps_the_ratio(name):
    for stage in STAGES:
        used = SETTINGS[name][stage]
        other = used.with_batch(3)
        assert other.batch == 3
        assert other.ratio == pytest.approx(used.ratio)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rows_of_a_step_are_those_of_the_settings_over_all_ranks(given, tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for name, settings in SETTINGS.items():
        chain = tulu(given, tmp_path, settings=name, batch=None, rlvr_options=("group=8",), micro_batch=5)
        for stage in STAGES:
            made, used = chain.recipe(stage), settings[stage]
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


@pytest.mark.parametrize(
    ("stages", "killed_in"),
    [("sft,rlvr", "sft"), ("sft,rlvr", "rlvr"), ("sft,preference", "preference"), ("sft,reward", "reward")],
)
def test_a_chain_that_was_killed_goes_on_to_the_bit(given, tmp_path, monkeypatch, stages, killed_in):

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
    assert any("holds the finished model" in line for line in said) == (killed_in != "sft")
    run(given, tmp_path / "whole", stages=stages)
    for stage in stages.split(","):
        a, b = weights(tmp_path / "killed" / stage), weights(tmp_path / "whole" / stage)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_settings_in_the_same_folder_are_refused(given, tmp_path):
    run(given, tmp_path / "out", stages="sft")
    with pytest.raises(ValueError, match=r"holds a finished model of other settings \(.*learning_rate"):
        run(given, tmp_path / "out", stages="sft", settings="smoltulu-1130")


def test_the_reward_model_can_have_a_say_in_the_last_stage(given, tmp_path):
    options = {"rlvr_options": (*RLVR, "reward_weight=0.5"), "steps": 1}
    with pytest.raises(ValueError, match="--stages must have reward, or reward_model=FOLDER must name one"):
        tulu(given, tmp_path, stages="sft,rlvr", **options).recipe("rlvr")
    run(
        given,
        tmp_path / "out",
        stages="sft,reward,rlvr",
        lora=2,
        dtype="bfloat16",
        gradient_checkpointing=True,
        **options,
    )
    made = json.loads((tmp_path / "out" / "rlvr" / "training.json").read_text())["settings"]
    assert made["reward_model"] == str(tmp_path / "out" / "reward")
    assert made["reward_weight"] == 0.5
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "rlvr")


def test_a_stage_can_be_given_any_option_of_its_recipe(given, tmp_path):
    chain = tulu(
        given,
        tmp_path,
        sft_options=("batch=12", "ratio=1e-6", "drop_long=true", "train_on=last"),
        preference_options=("learning_rate=1e-4", "beta=2", "micro_batch=6", "validation=0.2"),
        reward_options=("donors=2", "include=neutral"),
        rlvr_options=(*RLVR, "temperature=0.7", "verifier=ifeval", "num-iterations=2", "checkpoint_every=none"),
    )
    made = {stage: chain.recipe(stage) for stage in STAGES}
    sft, preference = made["sft"], made["preference"]
    assert (sft.batch * sft.accumulate, sft.drop_long, sft.train_on) == (12, True, "last")
    assert sft.learning_rate == pytest.approx(12e-6)
    assert (preference.batch, preference.accumulate, preference.validation) == (6, 1, 0.2)
    assert (preference.learning_rate, preference.beta, preference.objective) == (1e-4, 2.0, "dpo-norm")
    assert (made["reward"].donors, made["reward"].include) == (2, ("neutral",))
    rlvr = made["rlvr"]
    assert (rlvr.temperature, rlvr.verifier, rlvr.num_iterations, rlvr.checkpoint_every) == (0.7, "ifeval", 2, None)
    assert made["reward"].learning_rate / 6 == pytest.approx(SETTINGS["tulu3"]["reward"].ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sft_options": ("batch",)}, "--sft-options batch: write NAME=VALUE"),
        ({"sft_options": ("beta=1",)}, "--sft-options beta=1: no option 'beta'; there are batch, .*drop_long, .*ratio"),
        ({"sft_options": ("output=x",)}, "no option 'output'"),
        ({"sft_options": ("batch=2", "batch=3")}, "--sft-options: batch is given twice"),
        ({"sft_options": ("batch=2.5",)}, "--sft-options batch=2.5: '2.5' is no whole number"),
        ({"sft_options": ("train_on=first",)}, "choose one of completions, last, all"),
        ({"sft_options": ("drop_long=1",)}, "write true or false"),
        ({"sft_options": ("ratio=1e-6", "learning_rate=1e-5")}, "give ratio or learning_rate, not both"),
        ({"preference_options": ("beta=-1",)}, "stage preference: .*beta"),
        ({"rlvr_options": ("group=1",)}, "stage rlvr: --rlvr-options group=... must be at least 2, not 1"),
        (
            {"rlvr_options": ("group=4",)},
            "6 answers are no whole groups of 4; pass --rlvr-options batch=... or group=...",
        ),
        ({"stages": "sft", "rlvr_options": ("group=2",)}, "--rlvr-options: --stages sft has no rlvr"),
    ],
)
def test_options_of_a_stage_that_cannot_work_are_refused_with_its_name(given, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(given, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_take_ten_times_the_rates_of_all_weights(given, tmp_path):
    for stage in STAGES:
        full, adapters = (tulu(given, tmp_path, lora=rank).recipe(stage).learning_rate for rank in (0, 2))
        assert adapters == pytest.approx(10 * full)
    assert tulu(given, tmp_path, lora=2, sft_options=("learning_rate=3e-5",)).recipe("sft").learning_rate == 3e-5


def test_all_stages_see_one_format_of_text(given, tmp_path):
    chain = tulu(given, tmp_path)
    texts = {}
    for stage in STAGES:
        made = dataclasses.replace(chain.recipe(stage), model=given["model"])
        tokenizer = made.tokenizer()
        found = made._examples(Work(tokenizer, *made.limits(), ModelOutput(tmp_path, {}), lambda text: None))[0]
        if stage == "sft":
            ids = found.rows[0]["input_ids"]
        elif stage == "preference":
            ids = [*found[0].prompt, *found[0].chosen]
        elif stage == "reward":
            ids = found[0]["sequences"][0]
        else:
            ids = tokenizer.apply_chat_template(found[0]["prompt"], add_generation_prompt=True)["input_ids"]
        texts[stage] = tokenizer.decode(ids)
    end = tokenizer.eos_token
    assert texts["sft"] == f"user:0+0{end}assistant:0{end}"
    assert texts["preference"] == f"user:0?{end}assistant:yes 0{end}"
    assert texts["reward"].startswith(f"user:0?{end}assistant:yes 0")
    assert texts["rlvr"] == f"user:0+1{end}assistant:"


def test_micro_batches_change_nothing_but_the_work(given, tmp_path):
    for size in (2, 6):
        run(given, tmp_path / str(size), stages="sft,preference,reward", micro_batch=size, settings="smoltulu-1130")
    for stage in ("sft", "preference", "reward"):
        a, b, before = (weights(folder) for folder in (tmp_path / "2" / stage, tmp_path / "6" / stage, given["model"]))
        assert max((a[name] - before[name]).abs().max() for name in before if name in a) > 1e-7
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6)


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
        ({"length": 0}, "--length must be at least 2, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(given, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        tulu(given, tmp_path, **change)


LATE = [{"question": f"{n}+1", "answer": str(n + 1)} for n in range(105)]
TAUGHT = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(12)]


@pytest.mark.parametrize(
    ("stage", "rows", "options", "message"),
    [
        ("rlvr", [*LATE, {"question": "?", "answer": "none"}], (), "stage rlvr: .* row 106: .* no number in 'none'"),
        ("rlvr", [*LATE, {"question": "?" * 95, "answer": "1"}], (),
         "stage rlvr: .* row 106: the prompt has .* lower --rlvr-options answer_length=..., raise --length, or leave such rows "
         "out with --rlvr-options drop_long=..."),
        ("rlvr", LATE, ("group=3", "answer_length=96"), "stage rlvr: --rlvr-options answer_length=... 96 leaves no room"),
        ("rlvr", LATE, ("group=3", "use_vllm=true"), "stage rlvr: --rlvr-options use_vllm=... needs an accelerator"),
        ("preference", [*TAUGHT, {"prompt": "x" * 120, "chosen": "a", "rejected": "b"}], (),
         "stage preference: .* row 13: its prompt has 136 tokens and the model takes 96"),
        ("reward", [*TAUGHT, {"prompt": "x", "chosen": "a", "rejected": "b", "label_prob": 2}], (), "stage reward: .* row 13"),
    ],
)  # fmt: skip
def test_what_would_end_a_later_stage_is_said_before_the_first_begins(given, tmp_path, stage, rows, options, message):
    change = {f"{stage}_data": write(tmp_path / "rows.jsonl", rows), "stages": f"sft,{stage}"}
    if options:
        change[f"{stage}_options"] = options
    with pytest.raises(ValueError, match=message):
        run(given, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_long_prompts_can_be_left_out_of_any_stage_of_a_chain(given, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [*TAUGHT, {"prompt": "x" * 120, "chosen": "a", "rejected": "b"}])
    found, _ = run(
        given, tmp_path / "out", stages="sft,preference", preference_data=rows, preference_options=("drop_long=true",)
    )
    assert found["preference: pairs"] == 12


def test_a_missing_file_or_library_is_said_before_the_first_stage_begins(given, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"stage rlvr: .*gone\.jsonl"):
        run(given, tmp_path / "out", rlvr_data=str(tmp_path / "gone.jsonl"))
    monkeypatch.setattr("trialist.training.tulu.find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(ImportError, match=r"stage reward needs trl: `pip install trialist\[trl\]`"):
        run(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_two_ranks_wait_for_the_model_of_a_stage_before_the_next_begins(given, tmp_path):
    """Rank 0 is slow to write; each rank writes what it said to RANK.json."""
    (tmp_path / "options.json").write_text(json.dumps({**given, "stages": "sft,preference", "rlvr_options": []}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIALIST_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.tulu_program", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"]["preference: steps"] == second["found"]["preference: steps"] == 2
    assert sum(line.startswith("stage ") for line in first["said"]) == 2
    assert second["said"] == []


@pytest.mark.slow
@pytest.mark.asset
def test_the_chain_runs_on_a_real_model(given, tmp_path):
    asset = "smollm2-135m-instruct"
    try:
        assets.path(asset)
    except FileNotFoundError:
        pytest.skip(f"{asset} was not fetched")
    found, _ = run(given, tmp_path / "out", model=asset, steps=1, batch=3, lora=2, length=96)
    assert [found[f"{stage}: steps"] for stage in STAGES] == [1] * 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "rlvr")


def test_the_logarithm_of_the_ratio_is_that_of_time_minus_that_of_examples():
    """At equal epochs the ratio is learning-rate time up to a constant: the two cannot be told apart there."""
    examples, epochs = 939_343, 2
    for settings in SETTINGS.values():
        used = settings["sft"]
        steps = examples * epochs / used.batch
        assert used.learning_rate * steps == pytest.approx(used.ratio * examples * epochs)
        assert math.log(used.ratio) == pytest.approx(
            math.log(used.learning_rate * steps) - math.log(used.batch * steps)
        )
