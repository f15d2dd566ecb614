"""The recipe `preference`: what it learns, leaves behind, continues and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer
from trialist.training import progress
from trialist.training.preference import PreferenceTraining


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(llama: Any, tmp_path: Path) -> Path:
    """A saved tiny Llama with the byte tokenizer, and pairs of which the chosen answers say yes."""
    llama(vocab_size=259, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{'is it ' * (i % 4)}{i}? ", "chosen": "yes" if i % 3 else "yes, yes", "rejected": "no"}
        for i in range(30)
    ]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(folder: Path, output: str = "out", **options: Any) -> PreferenceTraining:
    given = {
        "steps": 4,
        "batch": 3,
        "accumulate": 1,
        "learning_rate": 3e-3,
        "checkpoint_every": 2,
        "log_every": 1,
        "device": "cpu",
    }
    return PreferenceTraining(
        str(folder / "model"), str(folder / "prefs.jsonl"), str(folder / output), **{**given, **options}
    )


def run(folder: Path, output: str = "out", **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    return recipe(folder, output, **options)(said.append), said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_what_is_preferred_and_leaves_a_model_that_generates(folder: Path) -> None:
    result, said = run(folder, objective="d2po", steps=25, learning_rate=1e-2, checkpoint_every=30, validation=0.2)
    assert (result["validation accuracy before"], result["validation accuracy after"]) == (0.5, 1.0)
    assert result["validation loss before"] == pytest.approx(0.6931, abs=1e-4)
    assert result["validation loss after"] < 0.4
    model, tokenizer = (kind.from_pretrained(folder / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("is it 4? ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt["input_ids"].shape[1] + 3
    assert [path.name for path in (folder / "out").iterdir() if path.is_dir()] == []
    assert any(line.startswith("step 25/25") and "validation accuracy" in line for line in said)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "dpo-norm"}, {"objective": "simpo"}, {"objective": "sampo"}, {"objective": "r-dpo", "alpha": 0.01},
        {"objective": "ld-dpo", "alpha": 0.5}, {"objective": "d2po", "half_life": 5.0, "reference_free": True},
    ],
    ids=lambda options: options["objective"],
)  # fmt: skip
def test_every_method_trains(folder: Path, options: dict[str, Any]) -> None:
    result, _ = run(folder, steps=15, learning_rate=1e-2, checkpoint_every=30, validation=0.2, **options)
    assert result["validation loss after"] < result["validation loss before"]


def test_sharing_the_prompt_changes_the_weights_by_rounding_only(folder: Path) -> None:
    run(folder, "one", validation=0.0)
    run(folder, "two", validation=0.0, share_prompt=False)
    one, two, start = (weights(folder / name) for name in ("one", "two", "model"))
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 0.01 * moved


def test_gamma_one_trains_as_dpo_to_the_bit(folder: Path) -> None:
    run(folder, "decayed", objective="d2po", gamma=1.0, validation=0.0)
    run(folder, "plain", objective="dpo", validation=0.0)
    assert_same_bits(weights(folder / "decayed"), weights(folder / "plain"))
    texts = [
        AutoModelForCausalLM.from_pretrained(folder / name).generate(torch.tensor([[73, 115]]), max_new_tokens=20)
        for name in ("decayed", "plain")
    ]
    assert torch.equal(*texts)


def test_a_half_life_is_the_gamma_that_it_stands_for(folder: Path) -> None:
    run(folder, "life", objective="d2po", half_life=1.0, steps=2, validation=0.0)
    run(folder, "gamma", objective="d2po", gamma=0.5, steps=2, validation=0.0)
    run(folder, "default", objective="d2po", steps=2, validation=0.0)
    life, gamma, default = (weights(folder / name) for name in ("life", "gamma", "default"))
    assert_same_bits(life, gamma)
    assert not all(torch.equal(life[name], default[name]) for name in life)


@pytest.mark.parametrize(
    ("prompt", "answers", "words"),
    [(40, ("yes", "no"), "a prompt is computed once for both answers: once takes 0.57 of"),
     (2, ("y" * 60, "n" * 50), "a prompt is computed for each answer: once takes 1.")],
    ids=["long prompts", "long answers"],
)  # fmt: skip
def test_prompts_are_shared_where_that_takes_fewer_operations(
    folder: Path, prompt: int, answers: tuple[str, str], words: str
) -> None:
    rows = [{"prompt": f"{i}".rjust(prompt), "chosen": answers[0], "rejected": answers[1]} for i in range(12)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, said = run(folder, steps=1, validation=0.0)
    assert next(line for line in said if line.startswith("a prompt is computed")).startswith(words)


def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "whole", objective="d2po")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    on_log = progress.Lines.on_log
    monkeypatch.setattr(progress.Lines, "on_step_end", Stop.on_step_end, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "broken", objective="d2po")
    monkeypatch.setattr(progress.Lines, "on_step_end", TrainerCallback.on_step_end)
    assert progress.Lines.on_log is on_log
    _, said = run(folder, "broken", objective="d2po")
    assert "goes on from step 2" in said
    assert_same_bits(weights(folder / "whole"), weights(folder / "broken"))


def test_an_adapter_alone_is_saved_on_demand(folder: Path) -> None:
    from peft import PeftModel

    run(folder, lora=2, save="adapter")
    assert not list((folder / "out").glob("model*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = PeftModel.from_pretrained(base, folder / "out")
    assert adapted.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2).shape[0] == 1


def test_adapters_train_in_bfloat16_with_checkpointed_activations_and_are_merged(folder: Path) -> None:
    result, _ = run(
        folder, objective="d2po", lora=4, dtype="bfloat16", gradient_checkpointing=True, steps=20, learning_rate=2e-2,
        validation=0.2,
    )  # fmt: skip
    assert result["validation loss before"] == pytest.approx(0.6931, abs=5e-3)  # the reference is in bfloat16, too
    assert result["validation loss after"] < 0.6
    merged, start = weights(folder / "out"), weights(folder / "model")
    assert merged.keys() == start.keys()
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    moved = [name for name in merged if not torch.equal(merged[name], start[name].bfloat16())]
    assert len(moved) == 2 * 7  # every linear layer of the two blocks, and nothing else


def test_another_run_of_other_settings_in_the_folder_is_refused(folder: Path) -> None:
    run(folder)
    with pytest.raises(ValueError, match="objective: 'dpo' there, 'd2po' now"):
        run(folder, objective="d2po")


def test_another_method_does_not_score_the_reference_again(folder: Path) -> None:
    _, first = run(folder)
    _, second = run(folder, "other", objective="d2po", gamma=0.9)
    scored = [any("the reference scores" in line for line in said) for said in (first, second)]
    assert scored == [True, False]


def test_a_reference_of_its_own_is_measured_from(folder: Path, llama: Any) -> None:
    other = llama(seed=3, vocab_size=259, max_position_embeddings=128)
    other.save_pretrained(folder / "reference")
    byte_tokenizer().save_pretrained(folder / "reference")
    own, _ = run(folder, validation=0.2)
    result, _ = run(folder, "from-other", reference=str(folder / "reference"), validation=0.2)
    assert own["validation loss before"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(result["validation loss before"] - 0.6931) > 1e-3


def test_a_reference_without_all_the_tokens_is_refused(folder: Path, llama: Any) -> None:
    llama(vocab_size=200).save_pretrained(folder / "reference")
    byte_tokenizer().save_pretrained(folder / "reference")
    with pytest.raises(ValueError, match="gives token 257, beyond the reference's vocabulary of 200"):
        run(folder, reference=str(folder / "reference"))
    assert not (folder / "out").exists()


def test_a_reference_with_another_tokenizer_is_refused(folder: Path, llama: Any) -> None:
    tokenizer = bpe_tokenizer(["is it yes or no"] * 9, 270, cache=False)
    llama(vocab_size=270).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    with pytest.raises(ValueError, match=r"another tokenizer than .* tokens, the first 'Ā': 0 here, "):
        run(folder, reference=str(folder / "reference"))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"save": "adapter"}, "--save adapter needs --lora"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"validation": 1.0}, "--validation is a share"),
        ({"objective": "simpo", "reference": "x"}, "--reference is not used"),
    ],
)
def test_options_that_contradict_each_other_are_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(folder, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "d2po", "gamma": 1.5}, r"gamma must be in \(0, 1\]"),
        ({"gamma": 0.9}, "gamma, half_life and exponent_start belong to d2po; method dpo has none"),
        ({"objective": "d2po", "gamma": 0.9, "half_life": 3.0}, "give one of them"),
        ({"objective": "ld-dpo"}, "method ld-dpo needs alpha"),
        ({"length": 999}, "--length 999 is longer than .* takes, 128"),
        ({"columns": "chosen=best"}, "expected the column 'best'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    folder: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(folder, **options)
    assert not (folder / "out").exists()


def test_a_prompt_longer_than_the_context_is_named_or_left_out(folder: Path) -> None:
    with (folder / "prefs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "x" * 200, "chosen": "yes", "rejected": "no"}) + "\n")
    with pytest.raises(ValueError, match=r"prefs.jsonl row 31: its prompt has 200 tokens and the model takes 128"):
        run(folder)
    _, said = run(folder, drop_long=True, steps=1)
    assert any("in 1 of 31 rows prompts fill 128 tokens: left out" in line for line in said)
