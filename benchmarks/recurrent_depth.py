"""Decoding with recurrent depth: cached against recomputing, against a stack of equal effective depth, and with fewer steps.

The model is small enough that what is measured is also what the cache and the loop cost around the matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.timer import Limit, Row, compare, threads
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_

SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 704}
PRELUDE, CORE, CODA, STEPS = 1, 2, 1, 16
PAST, PROMPT, NEW = 512, 32, 24
REPEATS = 20


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        return [*_against_recomputing(), *_against_a_stack(), *_fewer_steps(), *_speculation()]


def build(depth: str, **settings: Any) -> ModularDecoderForCausalLM:
    layers = PRELUDE + CORE + CODA if depth == "recurrent" else PRELUDE + CORE * STEPS + CODA
    recurrent = {
        "prelude_layers": PRELUDE,
        "core_layers": CORE,
        "coda_layers": CODA,
        "mean_recurrence": STEPS,
        **settings,
    }
    model = ModularDecoderForCausalLM(
        ModularDecoderConfig(
            **SIZES, num_hidden_layers=layers, depth=depth, norm_style="sandwich", max_position_embeddings=2048,
            recurrent=recurrent if depth == "recurrent" else None,
        )
    )  # fmt: skip
    initialize_(model, 0)
    return model.eval()


def tokens(count: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (1, count), generator=torch.Generator().manual_seed(1))


def one_token(model: ModularDecoderForCausalLM, **options: Any) -> Callable[[], object]:
    """Decodes one token behind `PAST` cached ones, and takes it back."""
    cache, ids = DynamicCache(), tokens(PAST + 1)
    model(ids[:, :PAST], past_key_values=cache, **options)

    def call() -> None:
        model(ids[:, PAST:], past_key_values=cache, **options)
        cache.crop(-1)

    return call


def limit(model: ModularDecoderForCausalLM, steps: float) -> Limit:
    """Every weight once, those of the core as often as they run; keys and values of the past once each."""
    config = model.config
    whole = sum(parameter.numel() for parameter in model.parameters())
    core = sum(p.numel() for name, p in model.named_parameters() if ".core." in name)
    layers = config.num_hidden_layers if core == 0 else PRELUDE + CODA + CORE * steps
    read = whole + core * (steps - 1)
    past = layers * 2 * PAST * config.hidden_size
    return Limit(flops=2 * (read + past), bytes=4 * (whole + past))  # the core fits into the processor's cache


def _against_recomputing() -> list[Row]:
    model, ids = build("recurrent"), tokens(PAST + 1)
    peer = "recomputing (use_cache=False)"
    result = compare(
        {"cached": one_token(model), peer: lambda: model(ids, use_cache=False, logits_to_keep=1)},
        f"one token after {PAST}, {PRELUDE}+{CORE}x{STEPS}+{CODA} layers of width {SIZES['hidden_size']}, 1 thread",
        repeats=REPEATS,
    )
    return [result.row("cached", peer, at_most=0.2)]


def _against_a_stack() -> list[Row]:
    recurrent, stack = build("recurrent"), build("stack")
    name, peer = "recurrent depth", "stack of as many distinct layers"
    result = compare(
        {name: one_token(recurrent), peer: one_token(stack)},
        f"one token after {PAST}, effective depth {PRELUDE + CORE * STEPS + CODA}, 1 thread",
        repeats=REPEATS,
        limit=limit(recurrent, STEPS),
    )
    return [result.row(name, peer, at_most=1.1)]


def _fewer_steps() -> list[Row]:
    model = build("recurrent")
    full = f"{STEPS} steps"
    calls: Mapping[str, Callable[[], object]] = {
        full: one_token(model),
        "4 steps": one_token(model, num_steps=4),
        "2 slots": one_token(model, kv_slots=2),
        "exit after 4 steps, latent_diff": one_token(
            model, exit_criterion="latent_diff", exit_threshold=float("inf"), min_steps=4
        ),
        "exit after 4 steps, kl": one_token(model, exit_criterion="kl", exit_threshold=float("inf"), min_steps=4),
    }
    result = compare(calls, f"one token after {PAST}, 1 thread", repeats=REPEATS)
    return [result.row(name, full) for name in calls if name != full]


def _speculation() -> list[Row]:
    """A model whose later steps change little, as those of a trained one: the draft is then often right."""
    model, ids = build("recurrent", state_init="zero"), tokens(PROMPT)
    core = model.model.layers.core
    core.adapter.weight[:, : SIZES["hidden_size"]].mul_(0.05)
    draft = model.with_steps(2)
    generate = functools.partial(
        model.generate, ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    result = compare(
        {"self-speculation, draft of 2 steps": lambda: generate(assistant_model=draft), "plain greedy": generate},
        f"{NEW} tokens after {PROMPT}, {STEPS} steps, states that settle at once, 1 thread",
        repeats=REPEATS,
    )
    return [result.row("self-speculation, draft of 2 steps", "plain greedy")]
