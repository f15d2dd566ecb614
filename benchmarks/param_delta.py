"""ParamDelta against mergekit's task arithmetic and against a script with three state dicts: a real checkpoint, results held
to bounds, then time and peak memory; and the decomposition of `extract-delta` against those of PyTorch.

The checkpoint is the asset smollm2-135m-instruct; base, post-trained model and new base are copies with all weights perturbed,
so that their numbers fill the mantissas of float32. mergekit pins older packages than this project, so it runs in an
environment of its own, in a process that waits for orders: its imports are not timed. MERGEKIT_PYTHON names that environment's
interpreter; without it the row says so. mergekit takes every difference from the new base, so that its float32 sum is rounded
otherwise; computed in float64 by both and rounded to float32 the sums must be the same to the bit. Files are in the page cache
of the system; ours also waits until the output is on the disk.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare
from trialist.models.loading import model_source
from trialist.weights import apply_param_delta
from trialist.weights.low_rank import OVERSAMPLING, POWER_STEPS, decompose

MODEL = "smollm2-135m-instruct"
BASE, DELTA, SHIFT = 1e-5, 5e-4, 4e-3
"""Size of what is added to the checkpoint to make the base, to the base to make post, and to make the new base"""
MATRIX, RANK, ENERGY = (576, 1536), 32, 0.9
"""Of the decompositions; the layers of the checkpoint's feed-forward parts have this shape"""
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
def models(dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Folders of base, post and new, in a temporary folder that goes when this process ends."""
    source = Path(model_source(MODEL))
    folder = Path(tempfile.mkdtemp(prefix="param-delta-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    base = moved(load_file(source / "model.safetensors"), BASE, generator)
    for name, scale in (("base", 0.0), ("post", DELTA), ("new", SHIFT)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        weights = {key: value.to(dtype) for key, value in moved(base, scale, generator).items()}
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return {name: str(folder / name) for name in ("base", "post", "new")}


def moved(weights: Mapping[str, torch.Tensor], scale: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {key: value + scale * torch.randn(value.shape, generator=generator) for key, value in weights.items()}


def ours(output: Path, dtype: torch.dtype = torch.float32, precision: str = "float32") -> None:
    found = models(dtype)
    apply_param_delta(found["new"], [(found["post"], found["base"], 1.0)], output, precision=precision)


def script(output: Path, dtype: torch.dtype = torch.float32) -> None:
    """What one writes in five minutes: right for equal names, all three models in memory."""
    found = models(dtype)
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

    def __call__(self, output: Path, dtype: str = "float32", of: torch.dtype = torch.float32) -> float:
        """dtype: of its sums. of: of the models, and of the output."""
        found = models(of)
        parts = [
            {"model": found["post"], "parameters": {"weight": 1.0}},
            {"model": found["base"], "parameters": {"weight": -1.0}},
        ]
        config: dict[str, Any] = {
            "merge_method": "task_arithmetic", "base_model": found["new"], "models": parts, "dtype": dtype,
            "parameters": {"normalize": False}, "out_dtype": str(of).removeprefix("torch."),
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
        ours(folder / "wide", precision="float64")
        peer(folder / "their wide", dtype="float64")
        exact, theirs = read(folder / "wide"), read(folder / "their wide")
        assert all(torch.equal(exact[name], theirs[name]) for name in exact)
        peer(folder / "narrow")
        narrow = read(folder / "narrow")
        total = sum(tensor.numel() for tensor in found.values())
        equal = sum(int((found[name] == narrow[name]).sum()) for name in found)
        errors = [
            sum(float((exact[name].double() - tensor.double()).abs().sum()) for name, tensor in sums.items()) / total
            for sums in (found, narrow)
        ]
        return (
            f"; float64 sums of both: all bits equal; float32 sums: {equal / total:.2%} bit-equal, mean distance from the former "
            f"{errors[0]:.2g} ours, {errors[1]:.2g} theirs"
        )


def half_precision(peer: Mergekit | None) -> Row:
    """How often a bfloat16 sum is the exact one correctly rounded."""
    half = torch.bfloat16
    found = models(half)
    new, post, base = (read(Path(found[name])) for name in ("new", "post", "base"))
    contenders: dict[str, Callable[[Path], Any]] = {
        "param-delta": functools.partial(ours, dtype=half), SCRIPT: functools.partial(script, dtype=half),
    }  # fmt: skip
    if peer is not None:
        contenders[PEER] = functools.partial(peer, dtype="bfloat16", of=half)
    shares = {}
    with tempfile.TemporaryDirectory(dir=Path(found["base"]).parent) as place:
        for name, write in contenders.items():
            write(Path(place) / name)
            right = total = 0
            for key, tensor in read(Path(place) / name).items():
                exact = (new[key].double() + (post[key].double() - base[key].double())).to(half)
                right, total = right + int((tensor == exact).sum()), total + tensor.numel()
            shares[name] = right / total
    share = shares.pop("param-delta")
    return Row(
        "param-delta, bfloat16", f"{MODEL} in bfloat16: sums that are the exact one correctly rounded",
        f"{share:.2%}", ", ".join(f"{name}: {other:.2%}" for name, other in shares.items()),
        target="100 %", met=share == 1,
    )  # fmt: skip


def decompositions() -> list[Row]:
    """`extract-delta` of one layer, by energy and by rank, against what PyTorch has."""
    generator = torch.Generator().manual_seed(0)
    m, n = MATRIX
    low = torch.randn(m, 2 * RANK, generator=generator) @ torch.randn(2 * RANK, n, generator=generator)
    matrix = low + 0.5 * torch.randn(m, n, generator=generator)
    rows = []
    contenders: tuple[tuple[str, int | None, str, Callable[[], Any]], ...] = (
        (f"energy {ENERGY}", None, "torch.linalg.svd", lambda: torch.linalg.svd(matrix, full_matrices=False)),
        (
            f"rank {RANK}",
            RANK,
            "torch.svd_lowrank",
            lambda: torch.svd_lowrank(matrix, RANK + OVERSAMPLING, POWER_STEPS),
        ),
    )
    for what, rank, peer, theirs in contenders:
        ours_too = functools.partial(decompose, matrix, rank, ENERGY, generator)
        work = f"a {m} x {n} matrix in float32, {what}"
        result = compare({"extract-delta": ours_too, peer: theirs}, work=work, repeats=REPEATS)
        # svd_lowrank does not say how much it keeps
        rows.append(result.row("extract-delta", peer, at_most=1.0 if rank is None else None))
    return rows


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
    return [*found, half_precision(peer), *decompositions()]


def measured(name: str) -> Callable[[], Any]:
    """One of the contenders of this process, for its peak memory."""
    models()
    return into_scratch({"param-delta": ours, SCRIPT: script}[name])
