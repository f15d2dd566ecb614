"""Recipes on a model of recurrent depth: one depth for all that is compared, and the same run after an interruption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from trialist.data.tokenizers import byte_tokenizer
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_
from trialist.models.recurrent_depth import loop
from trialist.models.recurrent_depth.steps import depth_of
from trialist.training import progress
from trialist.training.preference import PreferenceTraining
from trialist.training.sft import SupervisedFineTuning


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved recurrent decoder that draws its number of steps anew for each pass, and pairs of answers."""
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "model")
    rows = [
        {"prompt": f"{'is it ' * (i % 4)}{i}? ", "chosen": "yes" if i % 3 else "yes, yes", "rejected": "no"}
        for i in range(20)
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def save(folder: Path, **settings: Any) -> None:
    config = ModularDecoderConfig(
        vocab_size=259, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, depth="recurrent", initializer_range=0.2,
        recurrent={"mean_recurrence": 5, "backprop_depth": 2, "recurrence_sigma": 1.0, **settings},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def run(kind: Any, folder: Path, data: str, output: str = "out", **options: Any) -> list[str]:
    said: list[str] = []
    given = {"steps": 4, "batch": 3, "accumulate": 2, "learning_rate": 3e-3, "checkpoint_every": 2, "log_every": 1,
             "device": "cpu", "validation": 0.0}  # fmt: skip
    kind(str(folder / "model"), str(folder / data), str(folder / output), **{**given, **options})(said.append)
    return said


class Logs:
    """The losses that a run logs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.losses: list[float] = []
        original = progress.Lines.on_log

        def on_log(lines: Any, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> Any:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])
            return original(lines, args, state, control, logs=logs, **objects)

        monkeypatch.setattr(progress.Lines, "on_log", on_log)


@pytest.mark.parametrize("settings", [{}, {"exit_criterion": "kl", "exit_threshold": 1.0}], ids=["plain", "exits"])
@pytest.mark.parametrize("lora", [0, 2])
def test_the_first_loss_of_dpo_is_log_2(folder: Path, monkeypatch, settings: dict, lora: int) -> None:
    save(folder / "model", **settings)
    logs = Logs(monkeypatch)
    run(PreferenceTraining, folder, "prefs.jsonl", steps=3, lora=lora)
    assert logs.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logs.losses[2] != pytest.approx(math.log(2), abs=1e-5)  # the learning rate rises from 0


@pytest.mark.parametrize("kind", ["dropout", "experts"])
def test_the_first_loss_of_dpo_is_log_2_for_models_whose_training_passes_differ(folder, monkeypatch, kind) -> None:
    shutil.rmtree(folder / "model")
    if kind == "dropout":
        GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=24, n_layer=2, n_head=2, n_positions=128)).save_pretrained(
            folder / "model"
        )
    else:
        sizes = {"vocab_size": 259, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = ModularDecoderConfig(
            **sizes, ffn_types=["swiglu", "peer"], peer={"num_experts": 49, "num_heads": 2, "top_k": 3}
        )
        model = ModularDecoderForCausalLM(config)
        initialize_(model, 0)
        model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    logs = Logs(monkeypatch)
    run(PreferenceTraining, folder, "prefs.jsonl", steps=3)
    assert logs.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logs.losses[2] != pytest.approx(math.log(2), abs=1e-5)


def drawn_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of every draw of a number of steps."""
    draws: list[int] = []
    original = loop.sample_recurrence

    def sample(seed: int, index: int, *rest: Any) -> int:
        draws.append(index)
        return original(seed, index, *rest)

    monkeypatch.setattr(loop, "sample_recurrence", sample)
    return draws


def test_all_micro_batches_of_a_step_of_fine_tuning_draw_by_the_step(folder: Path, monkeypatch) -> None:
    draws = drawn_steps(monkeypatch)
    run(SupervisedFineTuning, folder, "rows.jsonl", steps=3, packing=False)
    assert sorted(set(draws)) == [0, 1, 2]
    assert draws == sorted(draws)


@pytest.mark.parametrize("lora", [0, 2], ids=["all weights", "adapters"])
def test_an_interrupted_fine_tuning_goes_on_to_the_same_bits(folder: Path, monkeypatch, lora: int) -> None:
    """The checkpoint of an adapter holds no buffer of the model."""
    options = {"lora": lora, "save": "adapter" if lora else "merged", "packing": False}
    run(SupervisedFineTuning, folder, "rows.jsonl", "whole", **options)

    def stop(self: Any, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Lines, "on_step_end", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(SupervisedFineTuning, folder, "rows.jsonl", "broken", **options)
    assert "goes on from step 2" in run(SupervisedFineTuning, folder, "rows.jsonl", "broken", **options)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, again = (load_file(folder / run_ / name) for run_ in ("whole", "broken"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_answers_are_sampled_and_scored_at_one_depth(folder: Path, monkeypatch) -> None:
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    from trialist.training.rlvr import VerifiableRewards

    draws, depths = drawn_steps(monkeypatch), []
    plan = loop.RecurrentDepth._plan

    def watched(self: Any, *arguments: Any) -> Any:
        settings, split, index = plan(self, *arguments)
        depths.append((sum(split), settings.exit_criterion))
        return settings, split, index

    monkeypatch.setattr(loop.RecurrentDepth, "_plan", watched)
    save(folder / "model", exit_criterion="latent_diff", exit_threshold=1.0)
    VerifiableRewards(
        model=str(folder / "model"), data="arithmetic", output=str(folder / "out"), max_examples=4, steps=2, group=2, batch=4,
        answer_length=4, beta=0.1, unfinished=-1.0, learning_rate=1e-2, checkpoint_every=5, device="cpu",
    )(lambda text: None)  # fmt: skip
    assert draws == []
    assert set(depths) == {(5, None)}


def test_after_a_recipe_the_model_draws_again(folder: Path) -> None:
    from trialist.models.loading import load_model

    run(PreferenceTraining, folder, "prefs.jsonl", steps=2)
    depth = depth_of(load_model(str(folder / "out")))
    assert depth.scoring is None
    assert not depth.by_step
