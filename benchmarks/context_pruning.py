"""Decoding with a budget of tokens against a cache of everything: time of a step, and memory of the cache. What a budget costs
while a prompt is read, and what the price on memory costs in training."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.eviction import available, evict
from trialist.models import cache_bytes, enable_eviction, enable_selective_attention
from trialist.objectives import CrossEntropy, MemoryLoss

SIZES = {
    "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
PAST, BUDGET, BATCH, PROMPT = 4096, 256, 4, 1024
REPEATS = 20


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        return [*_decoding(), *_reading(), *_playing(), *_training()]


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


def _reading() -> list[Row]:
    """A prompt: evictions are played through beside the attention, and the keys are dropped."""
    plain = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    models = {
        "selective attention, budget": enable_selective_attention(copy.deepcopy(plain), budgets=BUDGET),
        "selective attention, everything": enable_selective_attention(copy.deepcopy(plain)),
        "recency, budget": enable_eviction(copy.deepcopy(plain), "recency", BUDGET),
        "heavy hitters, budget": enable_eviction(copy.deepcopy(plain), "h2o", BUDGET),
        "heavy hitters beside selective attention, budget": enable_eviction(
            enable_selective_attention(copy.deepcopy(plain)), "h2o", BUDGET
        ),
        "standard attention, everything": plain,
    }
    calls = {f"a prompt, {name}": functools.partial(_read, model, ids) for name, model in models.items()}
    work = f"a prompt of {PROMPT} tokens into an empty cache, budget {BUDGET}, B=1, 6 layers of width 576, float32, 1 thread"
    flops = 2 * PROMPT * sum(parameter.numel() for parameter in plain.model.layers.parameters())
    flops += 4 * SIZES["num_hidden_layers"] * SIZES["hidden_size"] * PROMPT**2 / 2
    result = compare(calls, work=work, repeats=REPEATS, limit=Limit(flops=flops, bytes=0.0))
    selective, standard = "a prompt, selective attention, everything", "a prompt, standard attention, everything"
    return [
        result.row("a prompt, selective attention, budget", selective, at_most=1.5),
        result.row("a prompt, heavy hitters beside selective attention, budget", selective, at_most=3.0),
        result.row("a prompt, recency, budget", standard, at_most=1.5),
        result.row("a prompt, heavy hitters, budget", standard, at_most=3.0),
    ]


def _read(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)


def _training() -> list[Row]:
    """Forward and backward pass of the objective with the price on memory against the one without."""
    model = enable_selective_attention(LlamaForCausalLM(LlamaConfig(**SIZES))).train()
    B, T = 1, 512
    batch = {"input_ids": torch.randint(SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(0))}
    names = {"training with MemoryLoss": MemoryLoss(), "training with CrossEntropy": CrossEntropy()}
    calls = {name: functools.partial(_train, model, objective, batch) for name, objective in names.items()}
    work = f"forward and backward, B={B} T={T}, selective attention, 6 layers of width 576, float32, 1 thread"
    flops = 6 * B * T * sum(parameter.numel() for parameter in model.model.layers.parameters())
    result = compare(calls, work=work, repeats=REPEATS, limit=Limit(flops=flops, bytes=0.0))
    return [result.row(*names, at_most=1.1)]


def _train(model: LlamaForCausalLM, objective: CrossEntropy | MemoryLoss, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    with torch.enable_grad():
        objective(model, batch)[0].backward()


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
