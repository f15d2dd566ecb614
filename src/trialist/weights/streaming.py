"""The sum itself, stretch by stretch: one thread reads ahead, one writes behind, and memory holds a few stretches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from trialist.weights.checkpoint import Checkpoint
from trialist.weights.plan import Delta, Part
from trialist.weights.report import DeltaStatistics
from trialist.weights.writing import TensorFile, ordered

BLOCK = 1 << 18
"""Elements of a tensor that are in memory at once, times the number of models and a handful of temporaries"""
AHEAD, BEHIND = 4, 16
"""Stretches that are read before they are needed, and that wait to be written while the disk is busy"""

Progress = Callable[[int, int], None]
"""Called with elements done and elements in all"""
Task = tuple[Part, int, int]
Operands = list[Tensor]
"""Of the new base, then of post and base of each delta that counts; whole numbers or rows as the part asks"""


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed is a whole number from 0 to 2^63 - 1, not {seed}")


def unwatched(done: int, total: int) -> None:
    """Progress that nobody watches."""


class Summing:
    """theta = base_new + sum_i alpha_i (post_i - base_i) for one stretch, computed in `dtype`, rounded once."""

    def __init__(self, new: Checkpoint, deltas: Sequence[Delta], dtype: torch.dtype, rounding: str, seed: int) -> None:
        """Raises ValueError for an alpha that `dtype` cannot hold."""
        self.new, self.deltas, self.dtype = new, deltas, dtype
        for delta in deltas:
            if abs(delta.alpha) > torch.finfo(dtype).max:
                raise ValueError(
                    f"alpha of {delta.post.name!r} is {delta.alpha}, beyond the range of {str(dtype).removeprefix('torch.')}, "
                    "which the sum is computed in; choose a smaller one (1 is the whole delta)"
                )
        self.generator = torch.Generator().manual_seed(seed) if rounding == "stochastic" else None

    def read(self, task: Task) -> Operands:
        part, start, stop = task
        found: dict[tuple[int, int], Tensor] = {}

        def operand(checkpoint: Checkpoint, ids: Tensor | None) -> Tensor:
            key = (id(checkpoint), id(ids))  # a model that stands in several places is read once
            if key not in found:
                found[key] = (
                    checkpoint.read(part.name, start, stop)
                    if ids is None
                    else checkpoint.rows(part.name, ids[start:stop][ids[start:stop] >= 0])
                )
            return found[key]

        if part.rows is None:
            pairs = [(self.deltas[number].post, self.deltas[number].base) for number in part.deltas]
            return [operand(self.new, None), *(operand(model, None) for pair in pairs for model in pair)]
        operands = [operand(self.new, part.rows.new)]
        for number in part.deltas:
            for model, ids in zip((self.deltas[number].post, self.deltas[number].base), part.rows.deltas[number]):
                operands.append(operand(model, ids))
        return operands

    def compute(self, task: Task, operands: Operands) -> Tensor:
        """The stretch of the output, flat, in its dtype; adds to the part's report. Raises ValueError for what is no number."""
        part, start, stop = task
        if part.rows is not None:
            return self._by_token(part, start, stop, operands)
        stored = operands[0]
        if not part.deltas:
            return self._copy(part, stored)
        return self._sum(part, stored, operands[1:])

    def _sum(self, part: Part, stored: Tensor, operands: Operands) -> Tensor:
        """stored, operands: flat, of one length; the operands post and base in turn."""
        new = theta = stored.to(self.dtype)
        narrows = part.dtype.itemsize < self.dtype.itemsize
        reached: Tensor | None = None  # not 0 where a delta is not 0
        for place, number in enumerate(part.deltas):
            post, base = (tensor.to(self.dtype) for tensor in operands[2 * place : 2 * place + 2])
            delta = post - base
            self._measure(part, number, base, new, post, delta)
            theta = torch.add(theta, delta, alpha=self.deltas[number].alpha)
            if narrows:
                reached = delta if reached is None else reached.abs() + delta.abs()
        nearest = theta.to(part.dtype)
        self._within_range(part, new, theta, nearest)
        if reached is not None:
            plain = stored if stored.dtype == part.dtype else new.to(part.dtype)
            changed = int(torch.count_nonzero(reached))
            part.report.changed += changed
            # without a delta the result is the new base's; counting non-zero numbers is cheaper than comparing
            part.report.erased += changed - int(torch.count_nonzero(nearest - plain))
        return self._drawn(part, theta, nearest)

    def _copy(self, part: Part, stored: Tensor) -> Tensor:
        if stored.dtype == part.dtype:
            return stored
        exact = stored.to(self.dtype)
        nearest = exact.to(part.dtype)
        self._within_range(part, exact, exact, nearest)
        return self._drawn(part, exact, nearest)

    def _drawn(self, part: Part, exact: Tensor, nearest: Tensor) -> Tensor:
        """`nearest`, or what chance takes instead of it."""
        if self.generator is None or part.dtype == self.dtype:
            return nearest
        drawn = stochastic(exact, nearest, self.generator)
        self._within_range(part, exact, exact, drawn)
        return drawn

    def _by_token(self, part: Part, start: int, stop: int, operands: Operands) -> Tensor:
        rows = part.rows
        assert rows is not None
        width = part.elements // max(len(rows), 1)
        result = torch.empty(stop - start, width, dtype=part.dtype)
        here = rows.new[start:stop]
        known = here >= 0
        stored = operands[0].reshape(-1, width)  # the rows that the new base has, in their order
        result[known] = self._copy(part, stored)
        # deltas reach different rows, so that rows are summed in groups that the same deltas reach
        reach = (
            torch.stack([rows.deltas[number][0][start:stop] >= 0 for number in part.deltas]) if part.deltas else None
        )
        if reach is not None:
            for pattern in reach.T.unique(dim=0):
                chosen = (pattern == reach.T).all(1) & known
                if not bool(pattern.any()) or not bool(chosen.any()):
                    continue
                counted = [place for place in range(len(part.deltas)) if pattern[place]]
                picked = [
                    operands[1 + 2 * place + side].reshape(-1, width)[chosen[reach[place]]].reshape(-1)
                    for place in counted
                    for side in (0, 1)
                ]
                group = Part(
                    part.name, part.shape, part.dtype, tuple(part.deltas[place] for place in counted), part.report
                )
                result[chosen] = self._sum(group, stored[chosen[known]].reshape(-1), picked).view(-1, width)
        for number, delta in enumerate(self.deltas):
            taken = rows.source[start:stop] == number
            if bool(taken.any()):
                copied = delta.post.rows(part.name, rows.copied[start:stop][taken]).reshape(-1, width)
                result[taken] = self._copy(part, copied)
        return result.view(-1)

    def _measure(self, part: Part, number: int, base: Tensor, new: Tensor, post: Tensor, delta: Tensor) -> None:
        block = DeltaStatistics()
        block.add(base, new, delta)
        if not math.isfinite(block.delta + block.shift + block.base + block.new):
            models = self.deltas[number]
            refuse_not_finite(part.name, {self.new: new, models.base: base, models.post: post})
            block = DeltaStatistics()  # squares beyond the range of float32
            block.add(base.double(), new.double(), post.double() - base.double())
        part.report.deltas.setdefault(number, DeltaStatistics()).merge(block)

    def _within_range(self, part: Part, before: Tensor, exact: Tensor, result: Tensor) -> None:
        """Raises ValueError where `result` is not finite and `before`, of which it was made, was."""
        narrow = part.dtype in (torch.float16, torch.bfloat16)
        if bool(torch.isfinite(result.sum(dtype=torch.float32 if narrow else None))):
            return
        if not bool((torch.isfinite(before) & ~torch.isfinite(result)).any()):
            return
        if bool(torch.isfinite(exact).all()):
            dtype, advice = part.dtype, "choose --dtype bfloat16 or float32"
        else:
            dtype, advice = self.dtype, "choose a smaller alpha"
        raise ValueError(
            f"{part.name} has values beyond the range of {str(dtype).removeprefix('torch.')}, up to "
            f"{float(exact.abs().max()):.3g}; {advice}"
        )


def refuse_not_finite(name: str, values: Mapping[Checkpoint, Tensor]) -> None:
    """values: a tensor, or a stretch of it, in each model. Raises ValueError that names tensor and model."""
    for model, tensor in values.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of {model.name} holds values that are not finite; the model is damaged")


def stochastic(exact: Tensor, nearest: Tensor, generator: torch.Generator) -> Tensor:
    """`exact` rounded up or down to the dtype of `nearest`, by chance, so that its mean is exact.

    The two candidates are the nearest number and its neighbour on the other side of `exact`.
    """
    rest = exact - nearest.to(exact.dtype)
    beyond = torch.full_like(nearest, torch.inf).copysign(rest.to(nearest.dtype))
    neighbour = torch.nextafter(nearest, beyond)
    gap = neighbour.to(exact.dtype) - nearest.to(exact.dtype)
    chance = torch.rand(exact.shape, generator=generator, dtype=exact.dtype) * gap.abs()
    return torch.where(chance < rest.abs(), neighbour, nearest)


class Files:
    """The output's safetensors files, cut as the new base's; they take pieces in the order of `parts`."""

    def __init__(self, folder: Path, new: Checkpoint, parts: Sequence[Part]) -> None:
        self.folder = folder
        self.open: TensorFile | None = None
        self.names = {part.name: new.tensors[part.name].file.name for part in parts}
        self.layouts: dict[str, list[Part]] = {}
        for part in parts:
            self.layouts.setdefault(self.names[part.name], []).append(part)
        for file, entries in self.layouts.items():
            places = {name: place for place, (name, _, _) in enumerate(_layout(entries))}
            self.layouts[file] = sorted(entries, key=lambda part: places[part.name])
        self.parts = [part for entries in self.layouts.values() for part in entries]

    def write(self, part: Part, piece: Tensor) -> None:
        file = self.names[part.name]
        if self.open is None or self.open.path.name != file:
            self.close()
            self.open = TensorFile(self.folder / file, _layout(self.layouts[file]))
        self.open.write(piece)

    def close(self) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None

    def abandon(self) -> None:
        if self.open is not None:
            self.open.abandon()


def _layout(parts: Sequence[Part]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return list(ordered([(part.name, part.dtype, part.shape) for part in parts]))


def stream(summing: Summing, parts: Sequence[Part], files: Files | None, progress: Progress) -> None:
    """Takes every stretch of every part through reading, summing and, with `files`, writing.

    Raises what any of the three raises, OSError of a full disk among them, after the other two have stopped.
    """
    total = sum(part.elements for part in parts)
    done = 0
    tasks: Iterator[Task] = ((part, start, stop) for part in parts for start, stop in part.blocks(BLOCK))
    ahead: deque[tuple[Task, Future[Operands]]] = deque()
    behind: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        try:
            while True:
                while len(ahead) < AHEAD and (task := next(tasks, None)) is not None:
                    ahead.append((task, reader.submit(summing.read, task)))
                if not ahead:
                    break
                task, reading = ahead.popleft()
                piece = summing.compute(task, reading.result())
                if files is not None:
                    behind.append(writer.submit(files.write, task[0], piece))
                    if len(behind) > BEHIND:
                        behind.popleft().result()
                done += piece.numel()
                progress(done, total)
            while behind:
                behind.popleft().result()
            if files is not None:
                files.close()
        except BaseException:
            for _, reading in ahead:
                reading.cancel()
            for writing in behind:
                writing.cancel()
            if files is not None:
                writer.submit(files.abandon)
            raise
