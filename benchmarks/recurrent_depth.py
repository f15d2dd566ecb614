"""Recurrent depth: decoding with a cache, with fewer steps and with exits; memory of the slots; training with few gradients.

The model is small enough that what is measured is also what the cache and the loop cost around the matrix products. Exits are
timed on a model that has learnt something, for on random weights every token settles alike.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.timer import Limit, Row, compare, threads
from trialist.engine.context import Context
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, cache_bytes, initialize_
from trialist.trials._walk_readings import Decoding, decoded
from trialist.trials._walks import EVALUATION, VALIDATION
from trialist.trials.adaptive_exit import AS_WELL, AdaptiveExitTrial, accuracy

SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 704}
PRELUDE, CORE, CODA, STEPS = 1, 2, 1, 16
PAST, PROMPT, NEW = 512, 32, 24
BACKPROP = 4  # steps with gradient of the training row
WALKS = 64  # rows decoded together by the model that has learnt to walk
REPEATS = 20


def rows() -> list[Row]:
    with threads(1):
        found = _training()
        with torch.no_grad():
            parts = (
                _against_recomputing,
                _against_a_dictionary,
                _against_a_stack,
                _fewer_steps,
                _slots,
                _exits,
                _speculation,
            )
            return [*(row for part in parts for row in part()), *found]


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


class DictionaryLayer(DynamicLayer):
    """A cache layer as the official code has it: a dictionary of single tokens, stacked over the whole history at each use."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for key, value in zip(key_states.unbind(-2), value_states.unbind(-2), strict=True):
            self.entries[len(self.entries)] = key, value
        self.keys, self.values = (torch.stack(part, -2) for part in zip(*self.entries.values(), strict=True))
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        for _ in range(-tokens_to_remove):
            self.entries.popitem()
        super().crop(tokens_to_remove)


def one_token(model: ModularDecoderForCausalLM, cache: Cache | None = None, **options: Any) -> Callable[[], object]:
    """Decodes one token behind `PAST` cached ones, and takes it back."""
    cache, ids = DynamicCache() if cache is None else cache, tokens(PAST + 1)
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


def _against_a_dictionary() -> list[Row]:
    model = build("recurrent")
    cache = Cache(layers=[DictionaryLayer() for _ in range(model.config.num_hidden_layers)])
    peer = "dictionary of single tokens, as in the official code"
    result = compare(
        {"cached": one_token(model), peer: one_token(model, cache)},
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
    """The targets are the operations that are left, and a tenth of all for what does not shrink."""
    model = build("recurrent")
    full, always = f"{STEPS} steps", {"exit_threshold": float("inf"), "min_steps": 4}
    calls: Mapping[str, Callable[[], object]] = {
        full: one_token(model),
        "4 steps": one_token(model, num_steps=4),
        "2 slots": one_token(model, kv_slots=2),
        "exit after 4 steps, latent_diff": one_token(model, exit_criterion="latent_diff", **always),
        "exit after 4 steps, kl": one_token(model, exit_criterion="kl", **always),
    }
    result = compare(calls, f"one token after {PAST}, 1 thread", repeats=REPEATS)
    coda = sum(p.numel() for name, p in model.named_parameters() if ".coda." in name or name.startswith("lm_head"))
    looks = 4 * (2 * coda + 4 * CODA * PAST * SIZES["hidden_size"])
    whole, few = (limit(model, steps).flops for steps in (STEPS, 4))
    left = {
        "4 steps": few,
        "2 slots": whole,
        "exit after 4 steps, latent_diff": few,
        "exit after 4 steps, kl": few + looks,
    }
    return [result.row(name, full, at_most=round(flops / whole + 0.1, 2)) for name, flops in left.items()]


def _slots() -> list[Row]:
    """The targets are the layers of keys and values that are left, and a hundredth for what the cache notes of each token."""
    model, ids = build("recurrent"), tokens(PAST)
    held = {}
    for slots in (1, 2, 4, None):
        cache = DynamicCache()
        model(ids, past_key_values=cache, kv_slots=slots)
        held[slots] = cache_bytes(cache)
    every = held.pop(None)
    return [
        Row(
            what=f"memory of the cache, {slots} slot{'s' * (slots != 1)}",
            work=f"{PAST} tokens, {STEPS} steps of {CORE} layers of width {SIZES['hidden_size']}, float32",
            measured=f"{size / 2**20:.2f} MiB",
            against=f"one slot for every step: {every / 2**20:.2f} MiB",
            ratio=f"{size / every:.3f}",
            target=f"at most {(share := 1.01 * (PRELUDE + CODA + CORE * slots) / (PRELUDE + CODA + CORE * STEPS)):.3f}",
            met=size <= share * every,
        )
        for slots, size in held.items()
        if slots is not None
    ]


def _exits() -> list[Row]:
    """Exits against all steps, and against the fewest steps for all tokens that answer as well."""
    trial = AdaptiveExitTrial(nodes=6, hops=6, recurrence=6, steps=500, device="cpu")
    walker = trial.walker(next(trial.arms()))
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        context = Context(0, Path(folder), Path(folder))
        model = walker.train(context, trial.longest)[0].eval()
    items, held_out = (walker.items(context, seed, WALKS, trial.longest) for seed in (EVALUATION, VALIDATION))
    symbols = walker.symbols(model, context)
    options: dict[str, dict[str, Any]] = {
        "exit, latent_diff": {"num_steps": trial.most, "exit_criterion": "latent_diff"},
        "all steps": {"num_steps": trial.most},
    }
    wanted = accuracy(decoded(model, held_out, symbols, **options["exit, latent_diff"]), held_out) - AS_WELL
    options["fewest steps that answer as well"] = {"num_steps": trial.fewest(model, held_out, symbols, wanted)}

    def described(name: str, decoding: Decoding) -> str:
        return f"{name} ({decoding.taken.float().mean():.2f} steps, accuracy {accuracy(decoding, items):.3f})"

    calls = {
        described(name, decoded(model, items, symbols, **given)): functools.partial(
            decoded, model, items, symbols, **given
        )
        for name, given in options.items()
    }
    result = compare(calls, f"{WALKS} walks of {trial.longest} hops token by token, 1 thread", repeats=REPEATS)
    exits, *peers = calls
    return [result.row(exits, peer, at_most=1.0) for peer in peers]


def _training() -> list[Row]:
    """A step without gradient costs a third of one with it."""
    model = build("recurrent").train()
    ids = torch.randint(SIZES["vocab_size"], (4, 128), generator=torch.Generator().manual_seed(1))

    def call(without: int, with_gradient: int) -> None:
        model.zero_grad()
        model(ids, labels=ids, num_steps=(without, with_gradient)).loss.backward()

    name, peer = f"{STEPS} steps, gradient through {BACKPROP}", f"{STEPS} steps, gradient through all"
    result = compare(
        {name: lambda: call(STEPS - BACKPROP, BACKPROP), peer: lambda: call(0, STEPS)},
        "forward + backward, B=4 T=128, 1 thread",
        repeats=REPEATS,
    )
    core = CORE * (STEPS - BACKPROP + 3 * BACKPROP), 3 * CORE * STEPS
    outside = 3 * (PRELUDE + CODA)
    return [result.row(name, peer, at_most=round((outside + core[0]) / (outside + core[1]) + 0.1, 2))]


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
    return [result.row("self-speculation, draft of 2 steps", "plain greedy", at_most=1.0)]
