"""Tiny models of awkward sizes whose weights are large enough that an error in attention shows in the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trialist.models import (
    EvictingCacheLayer,
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    enable_eviction,
    enable_selective_attention,
    initialize_,
    swap_ffn,
)
from trialist.models.swaps import SwappedPEER

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


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> None:
    """What earlier tests compiled counts towards the limit of recompilations of the blocks' code."""
    if request.node.get_closest_marker("slow"):
        torch._dynamo.reset()


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


EVICTING = ["decoder", "swapped llama", "h2o", "recency"]


@pytest.fixture
def evicting(decoder, family) -> Callable[[str], Any]:  # type: ignore[no-untyped-def]
    """Models of two layers that can evict, and keep everything still."""

    def build(kind: str) -> Any:
        if kind == "decoder":
            return decoder("selective_attention", "selective_attention")
        if kind == "swapped llama":
            return enable_selective_attention(family("llama"))
        return enable_eviction(family("llama"), kind, **({"sinks": 1} if kind == "recency" else {}))

    return build


EXPERTS = {"num_experts": 49, "num_heads": 3, "top_k": 4, "key_dim": 6}
"""Settings of PEER for tiny models"""


@pytest.fixture
def swapped(family) -> Callable[..., Any]:
    """A model of a family with PEER in some layers, whose running statistics are those after some training."""

    def build(name: str = "llama", layers: Sequence[int] = (1,), **settings: Any) -> Any:
        model = family(name)
        torch.manual_seed(3)
        swap_ffn(model, layers, "peer", **{**EXPERTS, **settings})
        for layer in swapped_layers(model):
            layer.query_norm.running_mean.normal_()
        return model.eval()

    return build


def swapped_layers(model: torch.nn.Module) -> list[SwappedPEER]:
    return [module for module in model.modules() if isinstance(module, SwappedPEER)]


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Token ids (3, 11) and their mask; the second row has four tokens of padding on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def tokens(N: int = 5, T: int = 24) -> Tensor:
    """Token ids (N, T)."""
    return torch.randint(3, VOCABULARY, (N, T), generator=torch.Generator().manual_seed(1))


def states(B: int = 2, H: int = 4, G: int = 2, T: int = 13, D: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random query (B, H, T, D), key and value (B, G, T, D) in float64, large enough that a wrong mask shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, G, T, D), (B, G, T, D)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes)
    return q, k, v


def brought(layer: EvictingCacheLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values after a layer was given new ones, as an attention that minds what was evicted gives them."""
    layer.expect()
    return layer.update(key, value)


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


def assert_left(layer: Any, key: Tensor, visible: Tensor, ends: list[list[list[int]]]) -> None:
    """After eviction `layer` holds, row by row and head by head, the tokens `ends` of those that the last query sees."""
    layer._drop()
    for row, groups in enumerate(ends):
        for group in range(layer.columns.shape[1]):
            columns = layer.columns[row, group].long()
            assert [j for j in columns.tolist() if visible[row, -1, j]] == groups[group]
            assert torch.equal(layer.keys[row, group], key[row, group, columns])
