"""Decoding with a budget of tokens against a cache of everything: time of a step, and memory of the cache."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.eviction import available, evict
from trialist.models import cache_bytes, enable_eviction, enable_selective_attention

SIZES = {
    "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
PAST, BUDGET, BATCH = 4096, 256, 4
REPEATS = 20


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        return [*_decoding(), *_playing()]


def _decoding() -> list[Row]:
    """One token after another behind a context of PAST tokens; the caches of everything grow by a few percent meanwhile."""
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    models = {
        "selective attention, budget": enable_selective_attention(copy.deepcopy(plain), budgets=BUDGET),
        "selective attention, everything": enable_selective_attention(copy.deepcopy(plain)),
        "recency, budget": enable_eviction(copy.deepcopy(plain), "recency", BUDGET),
        "heavy hitters, budget": enable_eviction(copy.deepcopy(plain), "h2o", BUDGET),
        "standard attention, everything": plain,
    }
    ids = torch.randint(SIZES["vocab_size"], (BATCH, PAST + 1), generator=torch.Generator().manual_seed(0))
    caches, calls = {}, {}
    for name, model in models.items():
        caches[name] = DynamicCache(config=model.config)
        for start in range(0, PAST, 512):
            model(ids[:, start : start + 512], past_key_values=caches[name], logits_to_keep=1)
        calls[name] = functools.partial(_step, model, caches[name], ids[:, -1:])
    weights = 4 * sum(parameter.numel() for parameter in plain.model.layers.parameters())
    stored = {name: cache_bytes(cache) for name, cache in caches.items()}
    flops = 2 * BATCH * weights / 4
    work = f"one decoded token, {PAST} before it, budget {BUDGET}, B={BATCH}, 6 layers of width 576, float32, 1 thread"
    limit = Limit(flops=flops, bytes=weights + stored["selective attention, budget"])
    result = compare(calls, work=work, repeats=REPEATS, limit=limit)
    pruned = [name for name in models if name.endswith("budget")]
    found = [
        result.row("selective attention, budget", "selective attention, everything", at_most=0.5),
        *(result.row(name, "standard attention, everything", at_most=1.0) for name in pruned),
    ]
    full = stored["standard attention, everything"]
    for name in pruned:
        held = cache_bytes(caches[name])
        found.append(
            Row(
                what=f"{name}: memory of the cache",
                work=work,
                measured=f"{held / 2**20:.2f} MiB",
                against=f"standard attention, everything: {full / 2**20:.2f} MiB",
                ratio=f"{held / full:.3f}",
                limit=f"{BUDGET / PAST / (held / full):.0%}",
                target="at most 0.08",
                met=held / full <= 0.08,
            )
        )
    return found


def _step(model: LlamaForCausalLM, cache: DynamicCache, token: torch.Tensor) -> None:
    model(token, past_key_values=cache)


def _playing() -> list[Row]:
    """The evictions of a prompt, played through in C against PyTorch."""
    if not available():
        return []
    N, T = 4, 2048
    increments = torch.rand(N, T, T, generator=torch.Generator().manual_seed(0)).sub_(0.7).relu_()
    scores, alive = torch.zeros(N, T), torch.zeros(N, T, dtype=torch.bool)
    play = functools.partial(evict, scores, alive, queries=T, first=0, budget=BUDGET, increments=increments)
    names = {"evictions of a prompt, C": "c", "evictions of a prompt, PyTorch": "reference"}
    work = f"{N} rows of {T} tokens, budget {BUDGET}, 1 thread"
    limit = Limit(
        flops=0.0, bytes=4 * N * T * BUDGET + N * T * T
    )  # scores of what is alive are read, what is seen is written
    result = compare({name: functools.partial(play, backend=b) for name, b in names.items()}, work, limit=limit)
    return [result.row(*names, at_most=1.0)]
