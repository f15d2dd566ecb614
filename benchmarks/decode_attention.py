"""Decoding with packed attention against the standard attention of transformers: one token behind contexts of several lengths, in
two shapes of model, float32 and bfloat16. The attention of a layer alone, and the whole model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.timer import Limit, Row, compare, threads
from trialist.models import enable_packed_attention
from trialist.models.attention_interface import PACKED

LENGTHS = (1024, 4096, 16_384)
REPEATS = 20
COMMON = {"vocab_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 32_768}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, 9 heads on 3 of width 64": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    ),
    "qwen2, 14 heads on 2 of width 64": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
    ),
}


def rows() -> list[Row]:
    found = []
    with threads(1), torch.no_grad():
        for family, build in FAMILIES.items():
            torch.manual_seed(0)
            model = build().eval()
            for dtype in (torch.float32, torch.bfloat16):
                for length in LENGTHS:
                    found += _layer(family, model, dtype, length)
                found += _model(family, copy.deepcopy(model).to(dtype), dtype, LENGTHS[1])
    return found


def _layer(family: str, model: PreTrainedModel, dtype: torch.dtype, length: int) -> list[Row]:
    """The attention functions of one layer, on the same keys and values."""
    config = model.config
    H, G = config.num_attention_heads, config.num_key_value_heads
    D = config.hidden_size // H
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = H // G, True  # type: ignore[assignment]
    query, key, value = (torch.randn(1, n, T, D).to(dtype) for n, T in ((H, 1), (G, length), (G, length)))
    calls = {
        name: functools.partial(ALL_ATTENTION_FUNCTIONS[which], module, query, key, value, None, scaling=D**-0.5)
        for name, which in (("packed attention", PACKED), ("transformers sdpa", "sdpa"))
    }
    _must_agree(calls["packed attention"]()[0], calls["transformers sdpa"]()[0], dtype)
    limit = Limit(flops=4 * H * length * D, bytes=key.nbytes + value.nbytes)
    work = f"attention of one decoded token, {length} before it, {family}, {_name(dtype)}, B=1, 1 thread"
    return [compare(calls, work, REPEATS, limit).row("packed attention", "transformers sdpa", at_most=1.05)]


def _model(family: str, model: PreTrainedModel, dtype: torch.dtype, length: int) -> list[Row]:
    """A whole decoding step; the cache grows by a few percent meanwhile."""
    packed = enable_packed_attention(copy.deepcopy(model))
    calls = {}
    for name, one in (("a step with packed attention", packed), ("a step with sdpa", model)):
        calls[name] = functools.partial(_step, one, filled(one, length, dtype), torch.zeros(1, 1, dtype=torch.long))
    weights = sum(p.numel() for p in model.parameters())
    size = torch.finfo(dtype).bits // 8
    cached = 4 * length * 2 * model.config.num_key_value_heads * 64 * size
    limit = Limit(flops=2 * weights, bytes=weights * size + cached)
    work = f"one decoded token, {length} before it, 4 layers, {family}, {_name(dtype)}, B=1, 1 thread"
    return [compare(calls, work, REPEATS, limit).row("a step with packed attention", "a step with sdpa", at_most=1.05)]


def filled(model: PreTrainedModel, length: int, dtype: torch.dtype) -> DynamicCache:
    """A cache of random keys and values: what they are does not matter to the time."""
    cache, config = DynamicCache(config=model.config), model.config
    D = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(1, config.num_key_value_heads, length, D).to(dtype) for _ in range(2)), layer)
    return cache


def _step(model: PreTrainedModel, cache: DynamicCache, token: torch.Tensor) -> Any:
    return model(token, past_key_values=cache)


def _must_agree(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
