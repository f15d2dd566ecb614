"""Nested weights against dense ones and 4-bit integers: the product of one token by bits and by tokens, and tokens a second.

Weights are drawn anew for each call from copies that together are larger than the last-level cache, so that they come from memory
as they do while a model decodes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.nested import instructions, nested_linear, pack_planes
from trialist.models import NestedQuantConfig, load_model, nested_bytes, set_precision
from trialist.weights.nested import quantize_nested

N, K = 8192, 2048
SPREAD = 320 * 2**20
"""Bytes of the copies of a weight; more than the last-level caches of present servers, or as much as memory allows"""
NESTED = (2, 3, 4, 5, 6, 8)
REPEATS = 20
NEW = 24
"""Tokens that a model generates in a round"""


def rows() -> list[Row]:
    with threads(1), torch.no_grad():
        found = [*_products(1), *_products(4), *_products(8)]
        found += _generation()
    return found


def last_level_bytes() -> int:
    """Bytes of the largest cache that Linux tells of; 0 where it tells none."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)


def rotated(make: Callable[[], Any], size: int, call: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """`call` on one copy after another, so many that they exceed the caches."""
    copies = [make() for _ in range(-(-max(SPREAD, int(1.2 * last_level_bytes())) // size))]
    turn: Iterator[Any] = itertools.cycle(copies)
    return lambda: call(next(turn))


def _products(M: int) -> list[Row]:
    """Dense products in three types, 4-bit integers in groups, and nested codes of 2 to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.functional.linear
    dense = torch.randn(N, K, generator=generator) / K**0.5
    x = torch.randn(M, K, generator=generator)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, dtype in (("torch fp16", torch.float16), ("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        typed = x.to(dtype)
        make = functools.partial(_copy, dense.to(dtype))
        calls[name] = rotated(make, N * K * dtype.itemsize, functools.partial(linear, typed))
    packed = _int4(dense)
    if packed is not None:
        weight, scales = packed
        typed = x.bfloat16()
        calls["torch int4pack, groups of 128"] = rotated(
            functools.partial(_copy, weight),
            N * K // 2,
            lambda copied: torch.ops.aten._weight_int4pack_mm_for_cpu(typed, copied, 128, scales),
        )
    for bits in NESTED:
        codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
        planes, table = pack_planes(codes, bits), torch.randn(N, 1 << bits, generator=generator).half()
        calls[f"nested, {bits} bits"] = rotated(
            functools.partial(_copy, planes), planes.nbytes, functools.partial(_nested, x, table)
        )
    work = f"{N} x {K} weights, M={M}, 1 thread, {instructions()}, weights from memory"
    result = compare(calls, work=work, repeats=REPEATS)
    found = []
    for bits in NESTED:
        name = f"nested, {bits} bits"
        targets = {"torch fp16": 0.5, "torch bf16": 0.25} if (M, bits) == (1, 3) else {}
        limited = dataclasses.replace(
            result, limit=Limit(flops=2 * N * K * M, bytes=N * K * bits / 8 + 2 * N * (1 << bits))
        )
        for peer in calls:
            if not peer.startswith("nested"):
                found.append(limited.row(name, peer, at_most=targets.get(peer)))
    return found


def _copy(x: Tensor) -> Tensor:
    return x.clone()


def _nested(x: Tensor, table: Tensor, planes: Tensor) -> Tensor:
    return nested_linear(x, planes, table, backend="c")


def _int4(dense: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes and scales of torch's own 4-bit product; None in versions without it."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    codes = torch.randint(0, 16, dense.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.randn(K // 128, N, 2, generator=torch.Generator().manual_seed(2)).bfloat16()


def _generation() -> list[Row]:
    """A given model that generates, dense in three types and nested, its output layer dense or nested too."""
    prompt = torch.randint(3, 1000, (1, 16), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name in ("float16", "bfloat16", "float32"):
        found[f"dense {name}"] = load_model("smollm2-135m-instruct", dtype=name)
    for head in (False, True):
        model = load_model("smollm2-135m-instruct", dtype="float16")
        settings: dict[str, Any] = {"modules_to_not_convert": []} if head else {}
        quantize_nested(model, NestedQuantConfig(sensitivity="none", seed_init="kmeans++", **settings))
        found["nested, nested output layer" if head else "nested, dense float16 output layer"] = model
    calls: dict[str, Callable[[], object]] = {}
    for name, model in found.items():
        for bits in (2, 3, 4) if name.startswith("nested") else (None,):
            label = name if bits is None else name.replace("nested,", f"nested {bits} bits,")
            calls[label] = functools.partial(_generate, model, prompt, bits)
    work = f"{NEW} tokens behind a prompt of 16, smollm2-135m-instruct, 1 thread, {instructions()}"
    result = compare(calls, work=work, repeats=REPEATS)
    rows = []
    for name in calls:
        if name.startswith("nested"):
            rows += [result.row(name, f"dense {dtype}") for dtype in ("float16", "bfloat16", "float32")]
            stored = nested_bytes(found[next(key for key in found if key.split(", ")[1:] == name.split(", ")[1:])])
            speed = f"{NEW / result.median(name):.1f} tokens/s, {stored.total / 2**20:.0f} MiB"
            rows[-1] = dataclasses.replace(rows[-1], measured=f"{rows[-1].measured}, {speed}")
    return rows


def _generate(model: Any, prompt: Tensor, bits: int | None) -> object:
    if bits is not None:
        set_precision(model, bits)
    return model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    for row in rows():
        print(row)
