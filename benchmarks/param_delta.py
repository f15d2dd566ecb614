"""ParamDelta against mergekit's task arithmetic and against a script with three state dicts: a real checkpoint in float32,
equal results, then time and peak memory.

The checkpoint is the asset smollm2-135m-instruct; post-trained model and new base are copies with all weights perturbed.
mergekit pins older packages than this project, so it runs in an environment of its own, in a process that waits for orders:
its imports are not timed. MERGEKIT_PYTHON names that environment's interpreter; without it the row says so. mergekit takes
every difference from the new base, so that its float32 sum is rounded otherwise; asked for float64 and rounded to float32 it
must be ours to the bit. Files are in the page cache of the system; ours also waits until the output is on the disk.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare
from trialist.models.loading import model_source
from trialist.weights import apply_param_delta

MODEL = "smollm2-135m-instruct"
DELTA, SHIFT = 5e-4, 4e-3
REPEATS = 20
INTERPRETER = "MERGEKIT_PYTHON"
PEER = "mergekit task_arithmetic"
SCRIPT = "script with three state dicts"
WORKER = """
import json, os, shutil, sys
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

for line in sys.stdin:
    order = json.loads(line)
    config = MergeConfiguration.model_validate(order["config"])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with open(os.devnull, "w") as nowhere:
        run_merge(config, order["output"], MergeOptions(quiet=True, write_model_card=False))
    print("done", resident("VmHWM") - before, flush=True)
"""


@functools.cache
def models() -> dict[str, str]:
    """Folders of base, post and new, in a temporary folder that goes when this process ends."""
    source = Path(model_source(MODEL))
    folder = Path(tempfile.mkdtemp(prefix="param-delta-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, scale in (("base", 0.0), ("post", DELTA), ("new", SHIFT)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        moved = {
            key: value + scale * torch.randn(value.shape, generator=generator) if scale else value
            for key, value in weights.items()
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    return {name: str(folder / name) for name in ("base", "post", "new")}


def ours(output: Path) -> None:
    found = models()
    apply_param_delta(found["new"], [(found["post"], found["base"], 1.0)], output)


def script(output: Path) -> None:
    """What one writes in five minutes: right for equal names, all three models in memory."""
    found = models()
    new, post, base = (load_file(Path(found[name]) / "model.safetensors") for name in ("new", "post", "base"))
    output.mkdir()
    save_file({name: new[name] + (post[name] - base[name]) for name in new}, output / "model.safetensors")


class Mergekit:
    """mergekit in its own process: orders in, `done` and its peak memory in megabytes out."""

    def __init__(self, interpreter: str) -> None:
        self.process = subprocess.Popen(
            [interpreter, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        atexit.register(self.process.kill)

    def __call__(self, output: Path, dtype: str = "float32") -> float:
        found = models()
        parts = [
            {"model": found["post"], "parameters": {"weight": 1.0}},
            {"model": found["base"], "parameters": {"weight": -1.0}},
        ]
        config: dict[str, Any] = {
            "merge_method": "task_arithmetic", "base_model": found["new"], "models": parts, "dtype": dtype,
            "parameters": {"normalize": False}, "out_dtype": "float32",
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"config": config, "output": str(output)}) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("done"):
                return float(line.split()[1])
        raise RuntimeError(
            f"mergekit ended with {self.process.wait()}; does {INTERPRETER} name an environment with mergekit?"
        )


def into_scratch(write: Callable[[Path], Any]) -> Callable[[], Any]:
    """The call with a new output folder, removed again."""

    def call() -> Any:
        with tempfile.TemporaryDirectory(dir=Path(models()["base"]).parent) as folder:
            return write(Path(folder) / "out")

    return call


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def check(peer: Mergekit | None) -> str:
    """Raises AssertionError unless the results are what they should be; says how near mergekit's float32 sum is."""
    with tempfile.TemporaryDirectory(dir=Path(models()["base"]).parent) as place:
        folder = Path(place)
        ours(folder / "ours")
        script(folder / "script")
        found = read(folder / "ours")
        simple = read(folder / "script")
        assert all(torch.equal(found[name], simple[name]) for name in found)
        del simple
        if peer is None:
            return ""
        peer(folder / "wide", dtype="float64")
        wide = read(folder / "wide")
        assert all(torch.equal(found[name], wide[name]) for name in found)
        del wide
        peer(folder / "narrow")
        total = equal = near = 0
        for name, theirs in read(folder / "narrow").items():
            mine = found[name]
            ulp = torch.nextafter(mine.abs(), torch.tensor(torch.inf)) - mine.abs()
            total += mine.numel()
            equal += int((mine == theirs).sum())
            near += int(((mine - theirs).abs() <= ulp).sum())
        return f"; its float32 sum: {equal / total:.2%} bit-equal, {near / total:.2%} within 1 ulp, its float64 sum all"


def rows() -> list[Row]:
    interpreter = os.environ.get(INTERPRETER)
    peer = Mergekit(interpreter) if interpreter else None
    agreement = check(peer)
    size = sum((Path(folder) / "model.safetensors").stat().st_size for folder in models().values()) // 3
    runs = {"param-delta": into_scratch(ours), SCRIPT: into_scratch(script)}
    if peer is not None:
        runs[PEER] = into_scratch(peer)
    result = compare(
        runs,
        work=f"{MODEL}, {size / 4e6:.0f}M parameters, fp32: three files of {size / 1e6:.0f} MB in, one out",
        repeats=REPEATS,
        limit=Limit(flops=2 * size / 4, bytes=4 * size),
    )
    memory = {name: peak_memory("benchmarks.param_delta", name) for name in ("param-delta", SCRIPT)}
    if interpreter:
        memory[PEER] = into_scratch(
            Mergekit(interpreter)
        )()  # a fresh process: what an earlier merge left is no baseline
    found = []
    for name in memory:
        if name == "param-delta":
            continue
        row = result.row("param-delta", name, at_most=1.0 if name == PEER else None)
        note = agreement if name == PEER else "; all bits equal"
        found.append(
            dataclasses.replace(
                row,
                measured=f"{row.measured}; {memory['param-delta']:.0f} MB",
                against=f"{row.against}; {memory[name]:.0f} MB{note}",
            )
        )
    if peer is None:
        found.append(
            Row(
                "param-delta",
                result.work,
                "",
                f"{PEER}: not measured, as {INTERPRETER} names no environment that has it",
            )
        )
    return found


def measured(name: str) -> Callable[[], Any]:
    """One of the contenders of this process, for its peak memory."""
    models()
    return into_scratch({"param-delta": ours, SCRIPT: script}[name])
