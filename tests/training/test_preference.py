"""The recipe `preference`: what it learns, leaves behind, continues and refuses; the reference's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trialist.data.preferences import PreferencePair
from trialist.data.tokenizers import bpe_tokenizer, byte_tokenizer
from trialist.objectives.preference_rows import preference_row
from trialist.training import progress, reference_logprobs
from trialist.training.preference import PreferenceTraining
from trialist.training.preference_reference import reference_file, tokenizer_difference


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
        ({"gamma": 0.9}, "--gamma, --half-life and --exponent-start belong to d2po"),
        ({"objective": "d2po", "gamma": 0.9, "half_life": 3.0}, "give one of them"),
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


# the reference's log-probabilities

ROWS = [
    preference_row(PreferencePair([3, 4], [5, 6, 7], [8], 0)),
    preference_row(PreferencePair([9], [10], [11, 12, 13, 14], 1)),
    preference_row(PreferencePair([9, 8, 7], [10, 2], [11, 2], 2)),
]


def test_kept_values_are_those_computed_and_stand_at_the_answers_tokens(llama: Any, tmp_path: Path) -> None:
    model = llama()
    found = reference_logprobs(model, ROWS, digest="a", batch=2, folder=tmp_path, say=lambda _: None)

    def never() -> Any:
        raise AssertionError("scored again")

    kept = reference_logprobs(never, ROWS, digest="a", batch=1, folder=tmp_path)
    for row, values, again in zip(ROWS, found, kept, strict=True):
        assert np.array_equal(values, again)
        assert np.array_equal(values != 0, row["segments"] > 1)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[9, 11, 12, 13, 14]])).logits[0].log_softmax(-1)
    np.testing.assert_allclose(found[1][2:], [log_p[t, 11 + t] for t in range(4)], atol=1e-5)


def test_another_reference_another_computation_and_other_tokens_are_kept_apart(tmp_path: Path) -> None:
    changed = [{**ROWS[0], "input_ids": ROWS[0]["input_ids"] + 1}, *ROWS[1:]]
    cut = [{name: values[:-1] for name, values in ROWS[0].items()}, *ROWS[1:]]
    names = {
        reference_file(rows, digest, dtype, tmp_path)
        for rows, digest, dtype in (
            (ROWS, "a", None), (ROWS, "b", None), (ROWS, "a", torch.bfloat16), (changed, "a", None), (cut, "a", None),
        )
    }  # fmt: skip
    assert len(names) == 5


def test_a_damaged_file_is_made_again(llama: Any, tmp_path: Path) -> None:
    reference_logprobs(llama(), ROWS, digest="a", folder=tmp_path)
    path = reference_file(ROWS, "a", None, tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    again = reference_logprobs(llama(), ROWS, digest="a", folder=tmp_path)
    assert again[0].any()
    assert path.stat().st_size > 20


def test_a_reference_that_gives_no_numbers_is_named_with_the_row(llama: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[14] = torch.nan  # a token of row 1 alone, which predicts nothing more...
        model.get_input_embeddings().weight[13] = torch.nan  # ... and one that does
    with pytest.raises(ValueError, match="row 1: the reference's log-probabilities are not numbers"):
        reference_logprobs(model, ROWS, batch=1)


def test_tokenizers_differ_by_vocabulary_or_by_how_they_cut() -> None:
    first = bpe_tokenizer(["aab aab abb"] * 9, 262, cache=False)
    assert tokenizer_difference(first, first, ["aab"]) is None
    assert "tokens, the first" in str(tokenizer_difference(first, byte_tokenizer(), ["aab"]))
