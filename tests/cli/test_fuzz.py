"""Whatever is typed and whatever the files hold: a success or an error in words, nothing half-written, no hang."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.cli.fuzz import call, cut, damaged_file, damaged_model, furnish, good_files, option_set

MANY = 200
SETS = [(100, 1), pytest.param(2000, 2, marks=pytest.mark.slow)]
FILES = [(40, 3), pytest.param(400, 4, marks=pytest.mark.slow)]
MODELS = [(10, 5), pytest.param(100, 6, marks=pytest.mark.slow)]


@pytest.fixture
def here(coins, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRIALIST_HOME", str(folder / "home"))
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A small causal language model with its tokenizer, as `save_pretrained` leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.data.tokenizers import byte_tokenizer

    folder = tmp_path_factory.mktemp("whole")
    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def half_written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".unfinished", ".building"))]


def report(complaints: list[str], count: int) -> None:
    assert not complaints, f"{len(complaints)} of {count}:\n" + "\n\n".join(complaints[:20])


@pytest.mark.parametrize(("count", "seed"), SETS)
def test_random_options_end_in_success_or_words(here, monkeypatch, count, seed):
    cut(monkeypatch, figures=count > MANY)
    chance = random.Random(seed)
    furnish(here)
    complaints = []
    for number in range(count):
        arguments = option_set(chance)
        if complaint := call(arguments).complaint():
            complaints.append(f"{number}: {arguments}\n{complaint}")
        complaints += [f"{number}: {arguments} left {path}" for path in half_written(here)]
        if number % 50 == 49:
            shutil.rmtree(here / "home", ignore_errors=True)
    report(complaints, count)


@pytest.mark.parametrize(("count", "seed"), FILES)
def test_damaged_data_end_in_success_or_words(here, monkeypatch, count, seed):
    cut(monkeypatch, figures=False)
    chance = random.Random(seed)
    good = good_files(chance)
    complaints = []
    for number in range(count):
        folder = here / "case"
        folder.mkdir()
        path = damaged_file(chance, folder, good)
        arguments = ["run", "selective-attention", "--data", str(path), "--seeds", "1", "--steps", "2", "--batch", "1"]
        if complaint := call(arguments).complaint():
            complaints.append(f"{number}: {path.name}\n{complaint}")
        for columns in ("text", "prompt"):
            if complaint := loaded(path, columns):
                complaints.append(f"{number}: {path.name}, {columns}\n{complaint}")
        complaints += [f"{number}: {path.name} left {left}" for left in half_written(here)]
        shutil.rmtree(folder)
    report(complaints, count)


def loaded(path: Path, column: str) -> str | None:
    """What is wrong with the error that loading the file as rows gives; None for rows or words."""
    import traceback

    from trialist.data.corpora import load_rows

    try:
        load_rows(str(path), required=(column,))
    except (ValueError, OSError) as error:
        return None if str(error).strip() else f"{type(error).__name__} without words"
    except Exception:
        return traceback.format_exc()
    return None


@pytest.mark.parametrize(("count", "seed"), MODELS)
def test_damaged_models_end_in_success_or_words(here, saved_model, monkeypatch, count, seed):
    cut(monkeypatch, figures=False)
    chance = random.Random(seed)
    complaints = []
    (here / "text.txt").write_text("".join(f"Paragraph {n} is about the number {n * n}.\n\n" for n in range(300)))
    for number in range(count):
        folder = here / "case"
        folder.mkdir()
        model = damaged_model(chance, folder, saved_model)
        held = sorted(path.name for path in model.iterdir())
        common = ["--model", str(model), "--data", "text.txt", "--length", "16", "--seeds", "1", "--steps", "2"]
        if complaint := call(["run", "selective-attention", *common]).complaint():
            complaints.append(f"{number}: {held}\n{complaint}")
        if complaint := model_loaded(model):
            complaints.append(f"{number}: {held}, loading\n{complaint}")
        shutil.rmtree(folder)
    report(complaints, count)


def model_loaded(folder: Path) -> str | None:
    import traceback

    from trialist.models.loading import load_model

    try:
        load_model(str(folder))
    except (ValueError, OSError) as error:
        return None if str(error).strip() else f"{type(error).__name__} without words"
    except Exception:
        return traceback.format_exc()
    return None
