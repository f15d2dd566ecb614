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
GREEDY = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
"""Options of `generate` that always give nine tokens"""


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


def states(B: int = 2, H: int = 4, G: int = 2, T: int = 13, D: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (B, H, T, D), key and value (B, G, T, D) in float64, large enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, G, T, D), (B, G, T, D)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes)
    return q, k, v


def layout(kind: str, B: int = 2, T: int = 13) -> Tensor:
    """What each query sees, (B, T, T) bool: `plain`, `left padding`, `right padding`, `a hole` or `packed`."""
    visible = torch.ones(T, T, dtype=torch.bool).tril().repeat(B, 1, 1)
    if kind == "left padding":
        visible[1, :, :5] = False
    elif kind == "right padding":
        visible[1, :, T - 3 :] = False
    elif kind == "a hole":
        visible[1, :, 4:6] = False
    elif kind == "packed":
        visible[0, 6:, :6] = False
        visible[1, 2:, :2] = False
        visible[1, 9:, :9] = False
    return visible
