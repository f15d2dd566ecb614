"""Runs that diverge: what they leave behind can be gone on from, whatever the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState

from trialist.data.tokenizers import byte_tokenizer
from trialist.training.preference import PreferenceTraining
from trialist.training.progress import Divergence, require_finite
from trialist.training.sft import SupervisedFineTuning

RECIPES = {"sft": SupervisedFineTuning, "preference": PreferenceTraining}


@pytest.fixture
def folder(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    llama(vocab_size=259, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{n}? ", "completion": "yes", "chosen": "yes", "rejected": "no"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def diverging(folder: Path, recipe: str, **options: Any) -> Any:
    """No line of progress is due in these runs, so no loss is looked at on the way."""
    given = {"learning_rate": 1e30, "batch": 3, "accumulate": 1, "validation": 0.0, "log_every": 99, "device": "cpu"}
    return RECIPES[recipe](
        str(folder / "model"), str(folder / "rows.jsonl"), str(folder / "out"), **{**given, **options}
    )


@pytest.mark.parametrize("lora", [0, 2], ids=["all weights", "adapters"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_diverges_before_its_first_log_leaves_no_model(folder: Path, recipe: str, lora: int) -> None:
    with pytest.raises(
        ValueError, match=r"training has diverged: the weights .* are not finite at step 5; lower --learn"
    ):
        diverging(folder, recipe, steps=5, checkpoint_every=99, lora=lora)(lambda _: None)
    assert [path.name for path in (folder / "out").rglob("*") if path.is_file()] == ["settings.json"]


def test_checkpoints_hold_finite_weights_and_the_same_command_goes_on_from_them(folder: Path) -> None:
    run = diverging(folder, "sft", steps=24, checkpoint_every=1, warmup=0.1)
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(ValueError, match="training has diverged"):
            run(said.append)
    kept = list((folder / "out" / "checkpoint").glob("checkpoint-*"))
    assert kept
    assert f"goes on from step {max(int(path.name.split('-')[1]) for path in kept)}" in said
    for path in kept:
        assert all(weight.isfinite().all() for weight in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_something_logged_that_is_not_finite_ends_the_training(value: float) -> None:
    watch, state = Divergence({"loss": "loss", "kl": "KL"}), TrainerState(global_step=7)
    watch.on_log(None, state, TrainerControl(), logs={"loss": 1.0, "other": value})
    with pytest.raises(ValueError, match=f"training has diverged: KL is {value} at step 7"):
        watch.on_log(None, state, TrainerControl(), logs={"loss": 1.0, "kl": value})


def test_only_trained_weights_are_looked_at_and_only_before_a_save() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    model[0].weight.data[1, 2] = torch.nan
    model[0].requires_grad_(False)
    require_finite(model, 1)
    model[1].bias.data[4] = -torch.inf
    watch, control = Divergence(), TrainerControl()
    watch.on_step_end(None, TrainerState(global_step=3), control, model=model)
    control.should_save = True
    with pytest.raises(ValueError, match=r"the weights 1\.bias are not finite at step 3"):
        watch.on_step_end(None, TrainerState(global_step=3), control, model=model)
