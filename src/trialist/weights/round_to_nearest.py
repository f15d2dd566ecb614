"""Rounding to an even grid between two ends for each group of a row: what tables of free values are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKS = tuple(1.0 - 0.05 * n for n in range(13))
"""Shares of the range of a group that are tried as the range of its grid"""


def round_to_nearest(weight: Tensor, bits: int, groups: int, sensitivity: Tensor | None = None) -> Tensor:
    """`weight` (N, K) on grids of 2^bits values, a grid for each of `groups` stretches of a row, as float32.

    A grid is stored as two float16 numbers, its lowest value and its step, so 2^(bits - 1) groups take the bytes of a table of
    2^bits float16 values a row. Of grids that cover the group's range or less, that of the least error is taken, weighted by
    `sensitivity` (N, K) or (K,). Raises ValueError for fewer than 1 or more than K groups.
    """
    N, K = weight.shape
    if not 1 <= groups <= K:
        raise ValueError(f"groups is {groups}; wanted 1 to {K}, the width of the matrix")
    counts = torch.ones(K, device=weight.device) if sensitivity is None else sensitivity.float()
    near = torch.empty(N, K, dtype=torch.float32, device=weight.device)
    for columns in torch.arange(K, device=weight.device).tensor_split(groups):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        values, count = weight[:, part].float(), counts[..., part]
        best = torch.full((N, 1), torch.inf, device=weight.device)
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2
        for shrink in SHRINKS:
            start = (middle - shrink * half).half().float()
            step = (2 * shrink * half / ((1 << bits) - 1)).half().float().clamp(min=2.0**-24)
            grid = ((values - start) / step).round().clamp(0, (1 << bits) - 1) * step + start
            error = (count * (values - grid).square()).sum(1, keepdim=True)
            near[:, part] = torch.where(error < best, grid, near[:, part])
            best = torch.minimum(best, error)
    return near
