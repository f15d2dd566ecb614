"""What a pass over checkpoints measured: norms, angles and what rounding erased, tensor by tensor and in sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class DeltaStatistics:
    """Sums over the elements of a tensor, for one delta; all that is shown is computed from them."""

    delta: float = 0.0
    """sum (post - base)^2"""
    shift: float = 0.0
    """sum (base_new - base)^2"""
    both: float = 0.0
    """sum (post - base)(base_new - base)"""
    base: float = 0.0
    new: float = 0.0
    """sum base^2, sum base_new^2"""

    def add(self, base: Tensor, new: Tensor, delta: Tensor) -> None:
        """One block, flat and of one dtype."""
        shift = new - base
        self.delta += float(torch.dot(delta, delta))
        self.shift += float(torch.dot(shift, shift))
        self.both += float(torch.dot(delta, shift))
        self.base += float(torch.dot(base, base))
        self.new += float(torch.dot(new, new))

    def merge(self, other: DeltaStatistics) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def base_cosine(self) -> float | None:
        """Cosine between base and base_new; None where one of them is zero. By 2 ab = a^2 + b^2 - (a - b)^2."""
        return cosine((self.base + self.new - self.shift) / 2, self.base, self.new)

    @property
    def delta_cosine(self) -> float | None:
        """Cosine between what post-training and what the new base changed."""
        return cosine(self.both, self.delta, self.shift)

    def shown(self) -> dict[str, float | None]:
        return {
            "delta_norm": math.sqrt(self.delta),
            "shift_norm": math.sqrt(self.shift),
            "delta_shift_cosine": self.delta_cosine,
            "base_cosine": self.base_cosine,
        }


def cosine(product: float, first: float, second: float) -> float | None:
    scale = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, product / scale)) if scale > 0 else None


@dataclass
class TensorReport:
    """One tensor of the output. Of `changed` elements rounding to the nearest number makes `erased` the new base's again.

    Both are counted where the output's numbers are narrower than those of the sum, whichever way it is rounded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    made: str
    """`sum`, `by token`, or `copied: ...` with the reason"""
    deltas: dict[int, DeltaStatistics] = field(default_factory=dict)
    """Number of a delta -> what was measured; those with alpha 0 are not read"""
    changed: int = 0
    erased: int = 0

    def shown(self) -> dict[str, Any]:
        line: dict[str, Any] = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "made": self.made}
        if self.deltas:
            line["deltas"] = {str(number): delta.shown() for number, delta in self.deltas.items()}
            line |= {"changed": self.changed, "erased": self.erased}
        return line


@dataclass(frozen=True)
class Likeness:
    """How alike two models are: the mean over matrices of the cosine between them, from a sample of each matrix."""

    first: str
    second: str
    cosine: float | None
    lowest: float | None
    lowest_name: str
    matrices: int


@dataclass(frozen=True)
class DeltaReport:
    """What was done, or what would be: inputs, per-tensor statistics, what is worth knowing, what was overridden."""

    settings: Mapping[str, Any]
    tensors: Sequence[TensorReport]
    likeness: Sequence[Likeness]
    notes: Sequence[str]
    overridden: Sequence[str]
    """Refusals that `force` overrode, in words"""
    skipped: Sequence[str]
    """Mismatches that were left as they are in the new base"""
    seconds: float

    @property
    def totals(self) -> list[DeltaStatistics | None]:
        """Sums over all tensors, for each delta; None for one that was not read, as its alpha is 0."""
        found: list[DeltaStatistics | None] = [None] * len(self.settings["deltas"])
        for tensor in self.tensors:
            for number, delta in tensor.deltas.items():
                total = found[number] or DeltaStatistics()
                total.merge(delta)
                found[number] = total
        return found

    @property
    def erased(self) -> float | None:
        """Share of the elements that a delta changes which rounding to the nearest number sets back to the new base's."""
        changed = sum(tensor.changed for tensor in self.tensors)
        return sum(tensor.erased for tensor in self.tensors) / changed if changed else None

    def record(self) -> dict[str, Any]:
        """JSON types, for the file in the output folder."""
        return {
            "transform": "param-delta",
            "formula": "theta = base_new + sum_i alpha_i (post_i - base_i)",
            **self.settings,
            "totals": [delta and delta.shown() for delta in self.totals],
            "erased_share": self.erased,
            "likeness": [asdict(entry) for entry in self.likeness],
            "forced": bool(self.overridden),
            "overridden": list(self.overridden),
            "skipped": list(self.skipped),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "tensors": [tensor.shown() for tensor in self.tensors],
        }

    def summary(self) -> dict[str, Any]:
        """Label -> words, for a reader in a hurry."""
        shown: dict[str, Any] = {}
        for entry in self.likeness:
            value = "undefined" if entry.cosine is None else f"{entry.cosine:.4f}"
            shown[f"likeness of {entry.first} and {entry.second}"] = f"{value} over {entry.matrices} matrices"
        for number, delta in enumerate(self.totals, 1):
            which = f" {number}" if len(self.totals) > 1 else ""
            if delta is None:
                shown[f"delta{which}"] = "not read, its alpha is 0"
                continue
            angle = "undefined" if delta.delta_cosine is None else f"{delta.delta_cosine:+.3f}"
            shown[f"delta{which}"] = (
                f"norm {math.sqrt(delta.delta):.4g}, the bases are {math.sqrt(delta.shift):.4g} apart, cosine of both {angle}"
            )
        if self.erased is not None:
            label = (
                "erased by rounding" if self.settings["rounding"] == "nearest" else "rounding to nearest would erase"
            )
            shown[label] = f"{self.erased:.2%} of the changed elements"
        kept = sum(not tensor.deltas for tensor in self.tensors)
        shown["tensors"] = f"{len(self.tensors)}" + (f", of which {kept} are those of the new base" if kept else "")
        if self.overridden:
            shown["overridden"] = "; ".join(self.overridden)
        shown["seconds"] = round(self.seconds, 1)
        return shown
