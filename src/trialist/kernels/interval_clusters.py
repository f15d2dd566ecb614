"""The best cut of sorted rows into intervals, given prefix sums: weighted k-means of numbers, found exactly.

    D[c, j] = max over i <= j of D[c - 1, i] + gain(i, j)        gain(i, j) = (S1[j] - S1[i])^2 / (S0[j] - S0[i])

The first best i grows with j, so that places halved level by level bound the search at those between them: K log K gains a row
for each c. The C kernel does a row at a time, the reference all rows at once.

Letters: R rows, K numbers in a row, C intervals.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trialist.kernels.compile import load_library

BACKENDS = ("auto", "reference", "c")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("s0", "s1", "borders")),
        *((name, ctypes.c_long) for name in ("R", "K")),
        *((name, ctypes.c_int) for name in ("C", "threads")),
    ]


def available() -> bool:
    """Whether the kernel could be compiled here; the first call compiles it."""
    return load_library("interval_clusters.c") is not None


def cut_rows(s0: Tensor, s1: Tensor, C: int, *, backend: str = "auto") -> Tensor:
    """Borders `(R, C + 1)` int64, ascending from 0 to K, of the C intervals of greatest summed gain; some may be empty.

    s0, s1: `(R, K + 1)` float64 prefix sums that begin with 0, s0 ascending. backend: "c" (on the CPU), "reference", or "auto".
    """
    if s0.shape != s1.shape or s0.dtype != torch.float64 or s1.dtype != torch.float64 or C < 1:
        raise ValueError(
            f"s0 {s0.dtype} {tuple(s0.shape)}, s1 {s1.dtype} {tuple(s1.shape)}, C {C}: wanted float64 and C >= 1"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    able = s0.device.type == "cpu" and backend != "reference" and available()
    if backend == "c" and not able:
        raise ValueError("backend 'c' takes tensors on the CPU, and a C compiler; pass backend='auto'")
    if not able:
        return _reference(s0, s1, C)
    s0, s1, (R, places) = s0.contiguous(), s1.contiguous(), s0.shape
    borders = torch.empty(R, C + 1, dtype=torch.int64)
    problem = _Problem(s0.data_ptr(), s1.data_ptr(), borders.data_ptr(), R, places - 1, C, torch.get_num_threads())
    if load_library("interval_clusters.c").cut_rows(ctypes.byref(problem)):  # type: ignore[union-attr]
        raise MemoryError("no memory to cut rows into intervals")
    return borders


def gain(s0: Tensor, s1: Tensor) -> Tensor:
    """S1^2 / S0 of intervals with these sums; 0 for empty ones."""
    return torch.where(s0 > 0, s1 * s1 / s0, 0.0)


def _reference(s0: Tensor, s1: Tensor, C: int) -> Tensor:
    R, places = s0.shape
    best = gain(s0, s1)  # D[1]
    choices: list[Tensor] = []
    for c in range(2, C + 1):
        if c < C:
            best, chosen = _layer(s0, s1, best)
        else:  # nothing is built on it: only its last place is wanted
            chosen = torch.zeros_like(choices[0] if choices else best, dtype=torch.long)
            chosen[:, -1] = (best + gain(s0[:, -1:] - s0, s1[:, -1:] - s1)).argmax(1)
        choices.append(chosen)
    borders = torch.zeros(R, C + 1, dtype=torch.long, device=s0.device)
    borders[:, C] = places - 1
    for c in range(C, 1, -1):
        borders[:, c - 1] = choices[c - 2].gather(1, borders[:, c : c + 1])[:, 0]
    return borders


def _layer(s0: Tensor, s1: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """D[c] and its choices (R, K + 1) from D[c - 1], the places halved level by level."""
    R, places = before.shape
    best = torch.zeros_like(before)
    chosen = torch.zeros(R, places, dtype=torch.long, device=before.device)
    step = 1 << max(0, (places - 1).bit_length() - 1)
    while step >= 1:
        at = torch.arange(step, places, 2 * step, device=before.device)
        # their neighbours at this distance are known, as place 0 is
        behind = torch.where(at + step < places, chosen[:, (at + step).clamp(max=places - 1)], at)
        best[:, at], chosen[:, at] = _search(s0, s1, before, at, chosen[:, at - step], torch.minimum(behind, at))
        step //= 2
    return best, chosen


def _search(s0: Tensor, s1: Tensor, before: Tensor, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Largest `before[i] + gain(i, at)` over low <= i <= high, and the first i that has it, (R, P) each."""
    R, P = low.shape
    counts = (high - low + 1).flatten()
    ends = counts.cumsum(0)
    total, width = int(ends[-1]), before.shape[1]
    owner = torch.repeat_interleave(torch.arange(R * P, device=low.device), counts, output_size=total)
    i = torch.arange(total, device=low.device) - (ends - counts)[owner] + low.flatten()[owner]
    row, j = owner // P * width, at[owner % P]
    flat0, flat1 = s0.flatten(), s1.flatten()
    value = before.flatten()[row + i] + gain(flat0[row + j] - flat0[row + i], flat1[row + j] - flat1[row + i])
    largest = value.new_full((R * P,), -torch.inf).scatter_reduce(0, owner, value, "amax")
    first = torch.full((R * P,), width, dtype=torch.long, device=low.device)
    first = first.scatter_reduce(0, owner, torch.where(value == largest[owner], i, width), "amin")
    return largest.view(R, P), first.view(R, P)
