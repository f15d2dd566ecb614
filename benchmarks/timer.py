"""The one timer of all benchmarks: interleaved calls, medians with spread, paired ratios, distance to the machine's limit."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

SHORTEST = 0.002  # seconds: a sample repeats its call until it lasts this long


@dataclass(frozen=True)
class Limit:
    """What the work cannot do without: floating-point operations and bytes moved to or from memory."""

    flops: float
    bytes: float

    def seconds(self) -> float:
        """The larger of both times at the peaks measured on this machine with the present number of threads."""
        threads = torch.get_num_threads()
        return max(self.flops / peak_flops(threads), self.bytes / peak_bandwidth(threads))


@dataclass(frozen=True)
class Row:
    """One line of RESULTS.md. `met` says whether the target was reached, None where there is none."""

    what: str
    work: str
    measured: str
    against: str = ""
    ratio: str = ""
    limit: str = ""
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Result:
    """Seconds per call, `samples[name]` of shape (repeats,); sample n of every name was taken in the same round."""

    work: str
    samples: Mapping[str, np.ndarray]
    limit: Limit | None = None

    def median(self, name: str) -> float:
        return float(np.median(self.samples[name]))

    def spread(self, name: str) -> float:
        """Distance between the quartiles, in seconds."""
        low, high = np.quantile(self.samples[name], [0.25, 0.75])
        return float(high - low)

    def ratio(self, name: str, peer: str, draws: int = 2000) -> tuple[float, float, float]:
        """Ratio of medians `name` / `peer` and its 95 % bootstrap interval over rounds."""
        ours, theirs = self.samples[name], self.samples[peer]
        rounds = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
        ratios = np.median(ours[rounds], 1) / np.median(theirs[rounds], 1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(np.median(ours) / np.median(theirs)), float(low), float(high)

    def row(self, name: str, peer: str, *, at_most: float | None = None) -> Row:
        """`name` against `peer`; the target is met when the interval of the ratio ends at or below `at_most`."""
        ratio, low, high = self.ratio(name, peer)
        return Row(
            what=name,
            work=self.work,
            measured=self._describe(name),
            against=f"{peer}: {self._describe(peer)}",
            ratio=f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
            limit=f"{self.limit.seconds() / self.samples[name].min():.0%}" if self.limit else "",
            target=f"at most {at_most:g}" if at_most is not None else "",
            met=None if at_most is None else high <= at_most,
        )

    def _describe(self, name: str) -> str:
        unit, factor = ("ms", 1e3) if self.median(name) < 1 else ("s", 1.0)
        least, middle, spread = (x * factor for x in (self.samples[name].min(), self.median(name), self.spread(name)))
        return f"{middle:.3g} {unit} (min {least:.3g}, IQR {spread:.2g})"


def compare(
    functions: Mapping[str, Callable[[], object]], work: str, repeats: int = 20, limit: Limit | None = None
) -> Result:
    """Times every function once a round, in the order given (A B A B ...), after a warm-up of two calls each.

    work: what one call does, in words. repeats: rounds, at least 20 for a ratio that is to be reported.
    """
    if not functions or repeats < 2:
        raise ValueError(f"compare needs at least one function and two repeats, got {len(functions)} and {repeats}")
    calls = {}
    for name, function in functions.items():
        _seconds(function, 1)
        calls[name] = max(1, math.ceil(SHORTEST / _seconds(function, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    with _no_garbage_collection():
        for _ in range(repeats):
            for name, function in functions.items():
                rounds[name].append(_seconds(function, calls[name]))
    return Result(work, {name: np.array(samples) for name, samples in rounds.items()}, limit)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with `count` threads of PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(function: Callable[[], object], calls: int) -> float:
    barrier = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    barrier()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    barrier()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@functools.cache
def peak_flops(threads: int) -> float:
    """Best rate of a float32 matrix product of 1536 x 1536 with this many threads, in operations per second."""
    x = torch.randn(1536, 1536)
    return 2 * 1536**3 / min(_seconds(lambda: x @ x, 1) for _ in range(12))


@functools.cache
def peak_bandwidth(threads: int) -> float:
    """Best rate of copying 256 MB with this many threads, bytes read and written per second."""
    x = torch.zeros(64 * 2**20)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(_seconds(lambda: y.copy_(x), 1) for _ in range(8))
