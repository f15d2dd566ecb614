"""Tiny models of awkward sizes whose weights are large enough that an error in attention shows in the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_

VOCABULARY = 37
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sharpen(model: torch.nn.Module, factor: float = 12.0) -> None:
    """Initial weights give almost uniform attention; larger ones make every mask and penalty matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


@pytest.fixture
def decoder() -> Callable[..., ModularDecoderForCausalLM]:
    def build(*layer_types: str, seed: int = 0, **changes: Any) -> ModularDecoderForCausalLM:
        names = list(layer_types) or ["full_attention", "selective_attention"]
        config = ModularDecoderConfig(**{**SIZES, "layer_types": names, "num_hidden_layers": len(names), **changes})
        model = ModularDecoderForCausalLM(config)
        initialize_(model, seed)
        sharpen(model)
        return model.eval()

    return build


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=6, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "gptneox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=64,
    ),
}


@pytest.fixture
def family() -> Callable[..., Any]:
    def build(name: str, implementation: str = "sdpa", **changes: Any) -> Any:
        config = FAMILIES[name]()
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        sharpen(model)
        return model.eval()

    return build


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Token ids (3, 11) and their mask; the second row has four tokens of padding on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask
