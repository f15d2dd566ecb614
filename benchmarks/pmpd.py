"""Progressive precision: a step of decoding by bits, what of it the output layer takes, texts under a schedule against one
precision and against dense weights, and what the schedules themselves cost.

The weights, drawn at random, are larger than last-level caches, so that they come from memory as they do in larger models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.timer import Limit, Result, Row, compare, threads
from trialist.decoding import LearnedSchedule, ProgressivePrecision, StaticSchedule, generate
from trialist.decoding.precision.schedules import PromptPass
from trialist.kernels.nested import instructions, pack_planes
from trialist.models import NestedQuantConfig, nested_bytes, set_precision
from trialist.models.nested.layer import PrecisionDial
from trialist.models.nested.precision import nested_layers
from trialist.models.nested.quantizer import like, mark_quantized
from trialist.training.precision_schedule import PrecisionClassifier
from trialist.weights.nested.quantize import chosen_layers

SIZES = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
BITS = (2, 3, 4)
PROMPT, NEW = 64, 32
REPEATS = 20


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        return [*_steps(), *_texts(), *_overheads()]


def dense(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).eval()


def nested() -> LlamaForCausalLM:
    """Codes and tables drawn at random: what they are changes no time. Everything else is dense float16."""
    model, config = dense(torch.float16), NestedQuantConfig(seed_bits=BITS[0], parent_bits=BITS[-1], sensitivity="none")
    layers, _ = chosen_layers(model, config)
    dial, generator = PrecisionDial(config.bits, BITS[-1]), torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        built = like(layer, config, dial)
        shape = built.out_features, built.in_features
        built.qweight = pack_planes(
            torch.randint(0, 1 << BITS[-1], shape, generator=generator, dtype=torch.uint8), BITS[-1]
        )
        for bits in BITS:
            built._buffers[f"lut{bits}"] = (torch.randn(shape[0], 1 << bits, generator=generator) * 0.02).half()
        model.set_submodule(name, built)
    config.nested_modules = list(layers)
    mark_quantized(model, config)
    return model


def prompt() -> Tensor:
    return torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def _steps() -> list[Row]:
    """One token behind a prompt, whose cache grows by a token a call."""
    models = {"dense float16": dense(torch.float16), "dense bfloat16": dense(torch.bfloat16), "nested": nested()}
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        cache = DynamicCache(config=model.config)
        if name == "nested":
            set_precision(model, BITS[-1])
        model(prompt(), past_key_values=cache, logits_to_keep=1)
        for bits in BITS if name == "nested" else (None,):
            label = name if bits is None else f"a step at {bits} bits"
            calls[label] = functools.partial(_step, model, cache, bits)
    head, state = models["nested"].lm_head, torch.randn(1, 1, SIZES["hidden_size"]).half()
    calls["the dense float16 output layer"] = functools.partial(head, state)
    work = f"one token behind {PROMPT}, 8 layers of width 1024, 32,000 tokens, B=1, 1 thread, {instructions()}"
    fewest = nested_bytes(models["nested"], BITS[0])
    least = fewest.codes + fewest.tables + head.weight.nbytes
    weights = sum(layer.in_features * layer.out_features for layer in nested_layers(models["nested"]).values())
    result = compare(calls, work=work, repeats=REPEATS, limit=Limit(flops=2.0 * weights, bytes=float(least)))
    found = []
    for bits in BITS:
        name = f"a step at {bits} bits"
        found += [result.row(name, peer) for peer in ("dense float16", "dense bfloat16")]
        found.append(_share(result, "the dense float16 output layer", name))
    found += [result.row("a step at 3 bits", "a step at 4 bits"), result.row("a step at 2 bits", "a step at 3 bits")]
    return found


def _share(result: Result, part: str, whole: str) -> Row:
    ratio, low, high = result.ratio(part, whole)
    return Row(
        what=f"{part}: share of {whole}",
        work=result.work,
        measured=f"{result.median(part) * 1e3:.3g} ms",
        against=f"{whole}: {result.median(whole) * 1e3:.3g} ms",
        ratio=f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
    )


def _step(model: Any, cache: DynamicCache, bits: int | None) -> None:
    if bits is not None:
        set_precision(model, bits)
    model(torch.tensor([[5]]), past_key_values=cache)


def _texts() -> list[Row]:
    """Whole texts: half of the steps at 3 bits and half at 2, or 4, 3 and 2 for a third each; prompts are read at 4."""
    models = {"dense float16": dense(torch.float16), "dense bfloat16": dense(torch.bfloat16)}
    subject = nested()
    from trialist.decoding import parse_schedule

    schedules: dict[str, Any] = {
        "3 bits, then 2": StaticSchedule(3, 2, NEW // 2),
        "4 bits, then 3, then 2": parse_schedule(f"4@0,3@{NEW // 3},2@{2 * NEW // 3}"),
        "4 bits throughout": StaticSchedule(4, 4, 0),
        "3 bits throughout": StaticSchedule(3, 3, 0),
        "2 bits throughout": StaticSchedule(2, 2, 0),
    }
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(_text, model, ()) for name, model in models.items()
    }
    for name, schedule in schedules.items():
        calls[name] = functools.partial(_text, subject, (ProgressivePrecision(schedule, BITS[-1]),))
    work = f"{NEW} tokens behind {PROMPT}, 8 layers of width 1024, 32,000 tokens, B=1, 1 thread, {instructions()}"
    set_precision(subject, BITS[-1])
    result = compare(calls, work=work, repeats=REPEATS)
    found = []
    for name in ("3 bits, then 2", "4 bits, then 3, then 2"):
        found += [result.row(name, peer) for peer in calls if peer not in ("3 bits, then 2", "4 bits, then 3, then 2")]
    return found


def _text(model: Any, options: tuple[Any, ...]) -> object:
    return generate(model, options, prompt(), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


def _overheads() -> list[Row]:
    """The option at one precision against the model at that precision, and a learned schedule against a step."""
    model = nested()
    set_precision(model, 3)
    H, D = SIZES["num_key_value_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    learned = LearnedSchedule(PrecisionClassifier(H, D, 4).eval(), 3, 2, (0, NEW // 3, 2 * NEW // 3, NEW))
    cache, stepped = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for filled in (cache, stepped):
        model(prompt(), past_key_values=filled, logits_to_keep=1)
    read = PromptPass((PROMPT,), torch.ones(1, PROMPT), cache)
    other = ProgressivePrecision(StaticSchedule(3, 3, 0), BITS[-1])  # the prompt at 4 bits keeps it from being neutral
    calls: dict[str, Callable[[], object]] = {
        "a text under a schedule of 3 bits": functools.partial(_text, model, (other,)),
        "plain generation at 3 bits": functools.partial(_text, model, ()),
        "a learned schedule reads a prompt": functools.partial(learned.start, read),
        "a step at 3 bits": functools.partial(_step, model, stepped, 3),
    }
    work = f"{NEW} tokens behind {PROMPT}, or one; 8 layers of width 1024, B=1, 1 thread, {instructions()}"
    result = compare(calls, work=work, repeats=REPEATS)
    return [
        result.row("a text under a schedule of 3 bits", "plain generation at 3 bits", at_most=1.1),
        result.row("a learned schedule reads a prompt", "a step at 3 bits", at_most=1.0),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
