"""Decoding from a cache with pruned keys: time of a step and bytes of the cache against everything whole, read by packed
attention (the honest baseline) and by the standard one; and kvpress, which sets the same channels to zero and stores them.

kvpress pins an older transformers than this project, so it runs in an environment of its own, in a process that waits for
orders: KVPRESS_PYTHON names that environment's interpreter; without it the row says so. Both prune the same model on the same
prompt, nothing recent left whole, and must keep the same channels; keys are compared before anything is timed.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.timer import Limit, Result, Row, compare, threads
from trialist.models import (
    CompactCache,
    KeyChannels,
    QuantizedValues,
    SnapKV,
    TokenBudget,
    cache_bytes,
    compact_attention,
    enable_packed_attention,
)

SIZES = {
    "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 32_768,
}  # fmt: skip
LENGTHS, REPEATS, KEEP, SHARED = (4096, 16_384), 20, 0.5, 2048
INTERPRETER = "KVPRESS_PYTHON"
WORKER = """
import json, sys, time
import torch
from kvpress import ThinKPress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

torch.set_num_threads(1)
torch.set_grad_enabled(False)
order = json.loads(sys.stdin.readline())
model = AutoModelForCausalLM.from_pretrained(order["model"]).eval()
ids = load_file(order["prompt"])["ids"]
press = ThinKPress(key_channel_compression_ratio=order["pruned"], window_size=order["window"])
cache = DynamicCache()
with press(model):
    model(ids, past_key_values=cache)
save_file({str(i): layer.keys.contiguous() for i, layer in enumerate(cache.layers)}, order["keys"])
print("ready", sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    model(ids[:, :1], past_key_values=cache)
    print(time.perf_counter() - start, flush=True)
"""


def rows() -> list[Row]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with threads(1), torch.no_grad():
        return [
            *(
                row
                for dtype in (torch.float32, torch.bfloat16)
                for length in LENGTHS
                for row in _decoding(model, dtype, length)
            ),
            *_pruning(model),
            *_kvpress(model),
        ]


def _decoding(plain: LlamaForCausalLM, dtype: torch.dtype, length: int) -> list[Row]:
    model = copy.deepcopy(plain).to(dtype)
    packed = enable_packed_attention(copy.deepcopy(model))
    ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0))
    keys = KeyChannels(keep=KEEP)
    parts: dict[str, dict[str, Any]] = {
        f"keys in {KEEP:.0%} of their channels": {"keys": keys},
        "and values in 8 bits": {"keys": keys, "values": QuantizedValues(bits=8)},
        "and a quarter of the tokens": {"keys": keys, "eviction": TokenBudget(length // 4, SnapKV())},
    }
    caches: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, chosen in parts.items():
        caches[name] = CompactCache(model, **chosen)
        with compact_attention(model):
            _read(model, caches[name], ids)
    for name, one in (("everything, packed attention", packed), ("everything, sdpa", model)):
        caches[name] = DynamicCache(config=model.config)
        _read(one, caches[name], ids)
        calls[name] = functools.partial(one, ids[:, :1], past_key_values=caches[name])
    compact = copy.deepcopy(model)
    scope = compact_attention(compact)
    scope.__enter__()  # for as long as the timer runs, as `generate` holds it for a whole text
    for name in parts:
        calls[name] = functools.partial(compact, ids[:, :1], past_key_values=caches[name])
    held = {name: cache_bytes(cache) for name, cache in caches.items()}
    size = torch.finfo(dtype).bits // 8
    weights = sum(p.numel() for p in plain.parameters())
    work = f"one decoded token, {length} before it, 4 layers of width 576, {str(dtype).removeprefix('torch.')}, B=1, 1 thread"
    first = next(iter(parts))
    result = compare(calls, work, REPEATS, Limit(flops=2 * weights, bytes=weights * size + held[first]))
    scope.__exit__(None, None, None)
    found = [result.row(name, "everything, packed attention", at_most=1.0) for name in parts]
    found.append(result.row(first, "everything, sdpa", at_most=1.0))
    whole = held["everything, packed attention"]
    for name in parts:
        found.append(
            Row(
                what=f"{name}: memory of the cache",
                work=work,
                measured=f"{held[name] / 2**20:.2f} MiB",
                against=f"everything: {whole / 2**20:.2f} MiB",
                ratio=f"{held[name] / whole:.3f}",
                target="at most 0.8",
                met=held[name] / whole <= 0.8,
            )
        )
    return found


def _read(model: LlamaForCausalLM, cache: Any, ids: torch.Tensor) -> None:
    model(ids, past_key_values=cache, logits_to_keep=1)


def _pruning(plain: LlamaForCausalLM) -> list[Row]:
    """What pruning adds to the reading of a prompt."""
    ids = torch.randint(512, (1, SHARED), generator=torch.Generator().manual_seed(0))

    def pruned() -> None:
        with compact_attention(plain):
            _read(plain, CompactCache(plain, keys=KeyChannels(keep=KEEP)), ids)

    calls = {
        "a prompt, keys pruned": pruned,
        "a prompt, everything": lambda: _read(plain, DynamicCache(config=plain.config), ids),
    }
    work = f"a prompt of {SHARED} tokens, 4 layers of width 576, float32, B=1, 1 thread"
    return [compare(calls, work, REPEATS).row("a prompt, keys pruned", "a prompt, everything", at_most=1.05)]


def _kvpress(plain: LlamaForCausalLM) -> list[Row]:
    what, work = (
        "keys pruned, decoding",
        f"one decoded token, {SHARED} before it, the same model, float32, B=1, 1 thread",
    )
    interpreter = os.environ.get(INTERPRETER)
    if interpreter is None:
        return [Row(what=what, work=work, measured="", against=f"kvpress: not measured, {INTERPRETER} is not set")]
    folder = Path(tempfile.mkdtemp(prefix="think-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ids = torch.randint(512, (1, SHARED), generator=torch.Generator().manual_seed(0))
    plain.save_pretrained(folder / "model")
    save_file({"ids": ids}, folder / "prompt.safetensors")
    process = subprocess.Popen(
        [interpreter, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    )
    atexit.register(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None
    order = {
        "model": str(folder / "model"), "prompt": str(folder / "prompt.safetensors"), "pruned": 1 - KEEP, "window": 32,
        "keys": str(folder / "keys.safetensors"),
    }  # fmt: skip
    print(json.dumps(order), file=process.stdin, flush=True)
    answer = process.stdout.readline().split()
    if answer[:1] != ["ready"]:
        raise RuntimeError(f"kvpress in {INTERPRETER} gave no answer; see its errors above")
    cache = CompactCache(plain, keys=KeyChannels(keep=KEEP, recent=0, obs_window=32))
    with compact_attention(plain):
        _read(plain, cache, ids)
        theirs = load_file(folder / "keys.safetensors")
        for index, layer in enumerate(cache.layers):
            torch.testing.assert_close(layer.dense_keys(), theirs[str(index)], atol=1e-4, rtol=1e-4)
        rounds: dict[str, list[float]] = {what: [], "kvpress": []}
        held = cache.nbytes()
        for _ in range(REPEATS + 2):
            start = time.perf_counter()
            plain(ids[:, :1], past_key_values=cache)
            rounds[what].append(time.perf_counter() - start)
            print("step", file=process.stdin, flush=True)
            rounds["kvpress"].append(float(process.stdout.readline()))
    process.kill()
    result = Result(work, {name: np.array(times[2:]) for name, times in rounds.items()})
    stored = int(answer[1])
    memory = Row(
        what="keys pruned: memory of the cache",
        work=work,
        measured=f"{held / 2**20:.2f} MiB",
        against=f"kvpress: {stored / 2**20:.2f} MiB",
        ratio=f"{held / stored:.3f}",
        target="at most 0.8; the same channels are kept",
        met=held / stored <= 0.8,
    )
    return [result.row(what, "kvpress", at_most=1.0), memory]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
