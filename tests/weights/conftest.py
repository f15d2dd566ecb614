"""Families of tiny models: a base, what post-training made of it, and a new base that was continued from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trialist.data.tokenizers import byte_tokenizer

SIZES = {
    "vocab_size": 259, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip
DELTA, SHIFT = 1e-3, 3e-3

Family = dict[str, str]


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=12, n_layer=2, n_head=3, n_positions=32))


def perturbed(model: Any, scale: float, seed: int) -> Any:
    """Every weight changed, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def save_family(folder: Path, build: Callable[[], Any], dtype: torch.dtype = torch.float32, **saving: Any) -> Family:
    members = {
        "base": build(),
        "post": perturbed(build(), DELTA, 1),
        "new": perturbed(build(), SHIFT, 2),
        "other": perturbed(build(), DELTA, 3),
    }
    for name, model in members.items():
        model.to(dtype).save_pretrained(folder / name, **saving)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in members}


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Family:
    """Folders `base`, `post`, `new` and `other`, a second post-trained model. Read only."""
    return save_family(tmp_path_factory.mktemp("family"), lambda: llama(tie_word_embeddings=False))


@pytest.fixture(scope="session")
def half_family(tmp_path_factory) -> Family:
    """The same in bfloat16, embeddings tied."""
    return save_family(tmp_path_factory.mktemp("half"), lambda: llama(tie_word_embeddings=True), torch.bfloat16)


@pytest.fixture
def own(family, tmp_path) -> Family:
    """A copy of the family that a test may change."""
    return {name: shutil.copytree(folder, tmp_path / "own" / name).as_posix() for name, folder in family.items()}


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def exact(folder: str | Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in tensors(folder).items()}


def rewrite(folder: str | Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Changes the weights of an unsharded folder."""
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def configure(folder: str | Path, file: str = "config.json", **settings: Any) -> None:
    path = Path(folder) / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **settings}))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Stretches that no tensor of the family is a multiple of."""
    for module in ("streaming", "low_rank"):
        monkeypatch.setattr(f"trialist.weights.{module}.BLOCK", 101)
