"""`trialist apply quantize`: a folder that opens at several precisions, what is told, what is refused."""

from __future__ import annotations

import random

import pytest
import torch

from trialist.cli.main import main
from trialist.data.tokenizers import byte_tokenizer
from trialist.models import available_bits, load_model, nested_bytes


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("\n\n".join(" ".join(chance.choices(("bara", "lomi", "ucas", "fä"), k=30)) for _ in range(60)))
    return str(path)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, llama, text):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, dict[str, str], str]:
        """Exit code, result by label, and what was said on the way."""
        given = ["--model", llama, "--data", text, "--tokens", "200", "--check-tokens", "100", "--device", "cpu"]
        try:
            code = main(["apply", "quantize", *given, *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        pairs = (line.split("  ", 1) for line in captured.out.splitlines() if "  " in line)
        return code, {label: value.strip() for label, value in pairs}, " ".join(captured.err.split())

    return run


def test_the_folder_opens_at_every_precision_and_its_bytes_are_told(call, tmp_path):
    code, shown, said = call("--output", "small", "--bits", "2-3", "--nesting", "joint")
    assert code == 0
    model = load_model(str(tmp_path / "small"))
    assert available_bits(model) == (2, 3)
    assert model.config.quantization_config.nesting == "joint"
    stored = nested_bytes(model)
    assert shown["codes"] == f"{stored.codes / 2**20:,.1f} MiB"
    assert "bits per byte" in shown["dense"]
    assert all(
        "weighted error" in shown[f"{bits} bits"] and "bits per byte" in shown[f"{bits} bits"] for bits in (2, 3)
    )
    assert "MiB of memory" in said
    assert "sequences of 48 tokens" in said
    assert len(model.generate(torch.arange(5)[None], max_new_tokens=3)[0]) <= 8


def test_without_sensitivities_and_check_no_text_is_read(call, tmp_path):
    options = ("--sensitivity", "none", "--check-tokens", "0", "--data", "nowhere.txt", "--dtype", "bfloat16", "--head")
    code, shown, _ = call("--output", "small", "--bits", "4", *options)
    assert code == 0
    assert "dense" not in shown
    model = load_model(str(tmp_path / "small"), dtype="auto")
    assert available_bits(model) == (4,)
    assert model.dtype == torch.bfloat16
    assert "lm_head" in model.config.quantization_config.nested_modules


def test_layers_that_are_kept_are_told(call, tmp_path):
    code, shown, _ = call("--output", "small", "--sensitivity", "activation", "--keep", "layers.1.mlp.down_proj")
    assert code == 0
    assert "model.layers.1.mlp.down_proj, named in modules_to_not_convert" in shown["everything else"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", "4-2"), "--bits '4-2': give the lowest and the highest"),
        (("--bits", "2-16"), "--bits '2-16'"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--length", "99"), "--length 99 is longer than"),
        (("--keep", "nose"), "'nose', which is no linear layer"),
        (("--model", "nowhere/at/all"), "does not exist"),
        (("--check-tokens", "-1"), "--check-tokens must be at least 0"),
        (("--method", "other"), "other"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(call, tmp_path, arguments, words):
    code, _, said = call("--output", "small", *arguments)
    assert code == 2
    assert words in said
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_not_overwritten_and_a_nested_model_is_not_quantised_again(call, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    code, _, said = call("--output", "there")
    assert code == 2
    assert "give a new folder" in said
    fast = ("--sensitivity", "none", "--check-tokens", "0")
    assert call("--output", "small", *fast)[0] == 0
    code, _, said = call("--output", "again", "--model", "small", *fast)
    assert code == 2
    assert "quantised already" in said
    assert not (tmp_path / "again").exists()
