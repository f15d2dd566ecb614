"""Small inputs for trials: a text that a tiny decoder learns from, a tiny Llama with a tokenizer, and one way to run an arm."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Outcome, Trial


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> str:
    """Sentences of a few words, in documents that differ."""
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "co", "di", "fu") for b in ("ra", "lo", "mi", "nu")]
    documents = [". ".join(" ".join(generator.choices(words, k=7)) for _ in range(60)) for _ in range(60)]
    file = tmp_path_factory.mktemp("text") / "own.txt"
    file.write_text("\n\n".join(documents))
    return str(file)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> str:
    """A Hugging Face model folder that this project did not make: a tiny random Llama with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trialist.data.tokenizers import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_arm(tmp_path) -> Callable[..., Outcome]:
    def run(trial: Trial, arm: Arm, seed: int = 0, **context) -> Outcome:
        folder = tmp_path / f"{arm.setting}-{arm.name}-{seed}-{len(list(tmp_path.iterdir()))}"
        return trial.run(arm, seed, Context(seed, folder, tmp_path / "stages", **context))

    return run


def arm_of(trial: Trial, name: str, setting: str) -> Arm:
    return next(arm for arm in trial.arms() if (arm.name, arm.setting) == (name, setting))


def model_folder(tmp_path: Path) -> Path:
    return next(tmp_path.glob("*/model"))
