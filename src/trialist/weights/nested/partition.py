"""Nested partitions of rows: clusters split in two, and borders of all precisions moved together.

A partition into 2^P intervals has borders x[0 .. 2^P]. Border j stands in the partition at b bits where 2^(P - b) divides j, so
a code of b bits is the first b bits of a code of P bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trialist.kernels.interval_clusters import gain
from trialist.weights.nested.sums import SortedRows, labels_of

SWEEPS = 30
WORTH = 1e-9
"""Relative gain below which a border stays where it is: less is rounding"""


def split(rows: SortedRows, borders: Tensor) -> Tensor:
    """Borders (R, 2 C + 1): each of C intervals cut where the weighted cost of its halves is least.

    Cost over the place of the cut has many minima, so every place is looked at. An interval of one number, or none, keeps it in
    its lower half.
    """
    C, K = borders.shape[1] - 1, rows.size
    label = labels_of(borders, K)  # (R, K)
    begin, end = borders.gather(1, label), borders.gather(1, label + 1)
    here0, here1 = rows.s0[:, 1:], rows.s1[:, 1:]  # the cut stands behind the place
    left = gain(here0 - rows.s0.gather(1, begin), here1 - rows.s1.gather(1, begin))
    right = gain(rows.s0.gather(1, end) - here0, rows.s1.gather(1, end) - here1)
    cuts = _best_places(left + right, label, C, torch.arange(1, K + 1, device=borders.device), default=borders[:, 1:])
    both = torch.stack([borders[:, :-1], cuts], 2).flatten(1)
    return torch.cat([both, borders[:, -1:]], 1)


def _best_places(value: Tensor, label: Tensor, C: int, places: Tensor, default: Tensor) -> Tensor:
    """(R, C): in each group of places the first of greatest value; `default` in groups without a place."""
    R, K = value.shape
    largest = value.new_full((R, C), -torch.inf).scatter_reduce(1, label, value, "amax")
    beyond = int(places[-1]) + 1
    candidate = torch.where(value == largest.gather(1, label), places.expand(R, K), beyond)
    first = torch.full((R, C), beyond, dtype=torch.long, device=value.device).scatter_reduce(
        1, label, candidate, "amin"
    )
    return torch.where(first == beyond, default, first)


def coarser(borders: Tensor, levels: int) -> Tensor:
    """The partition that lies `levels` bits above one."""
    return borders[:, :: 1 << levels]


def gains(rows: SortedRows, borders: Tensor) -> Tensor:
    """(R,): what a partition saves of the weighted squares."""
    return gain(rows.s0.gather(1, borders).diff(dim=1), rows.s1.gather(1, borders).diff(dim=1)).sum(1)


def move_together(rows: SortedRows, borders: Tensor, seed_bits: int, parent_bits: int, alphas: Tensor) -> Tensor:
    """Borders (R, 2^P + 1) of which none can be moved between its neighbours to lower the sum over b of alpha_b cost_b.

    alphas: (R, P - seed + 1), what the cost at each precision counts. Borders that share no interval are moved at once: all that
    first stand at the same precision, those of the seed in two turns. Never worse than the borders given.
    """
    bits = range(seed_bits, parent_bits + 1)
    total = 1 << parent_bits
    groups = [list(range(1 << (parent_bits - b), total, 2 << (parent_bits - b))) for b in reversed(bits[1:])]
    seeds = list(range(1 << (parent_bits - seed_bits), total, 1 << (parent_bits - seed_bits)))
    groups += [group for group in (seeds[::2], seeds[1::2]) if group]
    active = torch.arange(len(borders), device=borders.device)
    borders = borders.clone()
    for _ in range(SWEEPS):
        part = SortedRows(*(getattr(rows, name)[active] for name in rows.__dataclass_fields__))
        moved = borders[active]
        for group in groups:
            moved = _move(part, moved, group, bits, alphas[active])
        changed = (moved != borders[active]).any(1)
        borders[active] = moved
        active = active[changed]
        if not len(active):
            break
    return borders


def _move(rows: SortedRows, borders: Tensor, group: list[int], bits: range, alphas: Tensor) -> Tensor:
    """Moves the borders `group` each to its best place between its neighbours at the highest precision."""
    R, K = rows.values.shape
    parent, device = bits[-1], borders.device
    total = 1 << parent
    s0, s1 = rows.s0.gather(1, borders), rows.s1.gather(1, borders)  # (R, 2^P + 1)
    owner = torch.full((total + 1,), -1, dtype=torch.long, device=device)
    for index, j in enumerate(group):
        owner[j - 1] = owner[j] = index
    lower, upper = {}, {}
    j = torch.tensor(group, device=device)
    for b in bits:
        reach = 1 << (parent - b)
        if all(border % reach == 0 for border in group):
            lower[b], upper[b] = j - reach, j + reach

    def objective(at0: Tensor, at1: Tensor, of: Tensor) -> Tensor:
        value = torch.zeros_like(at0)
        for b in lower:
            low, high = (side[b][of] if of.dim() == 1 else side[b][of.clamp(min=0)] for side in (lower, upper))
            l0, l1, h0, h1 = (_at(sums, index) for index in (low, high) for sums in (s0, s1))
            value += alphas[:, b - bits[0], None] * (gain(at0 - l0, at1 - l1) + gain(h0 - at0, h1 - at1))
        return value

    leaf = labels_of(borders, K)  # place p lies between borders leaf and leaf + 1
    of = owner[leaf]  # (R, K): which border of the group may move to p
    value = objective(rows.s0[:, :-1], rows.s1[:, :-1], of).masked_fill(of < 0, -torch.inf)
    current = borders[:, j]
    C = len(group)
    every = torch.arange(C, device=device)
    standing = objective(s0[:, j], s1[:, j], every)
    places = torch.arange(K, device=device)
    best = _best_places(
        value, torch.where(of < 0, C, of), C + 1, places, default=torch.zeros(1, C + 1, device=device).long()
    )
    reached = value.new_full((R, C + 1), -torch.inf).scatter_reduce(1, torch.where(of < 0, C, of), value, "amax")[:, :C]
    end = objective(s0[:, j + 1], s1[:, j + 1], every)  # the place of the next border is no place before it
    chosen = torch.where(end > reached, borders[:, j + 1], best[:, :C])
    better = torch.maximum(reached, end) > standing + WORTH * standing.abs()
    moved = borders.clone()
    moved[:, j] = torch.where(better, chosen, current)
    return moved


def _at(sums: Tensor, index: Tensor) -> Tensor:
    return sums[:, index] if index.dim() == 1 else sums.gather(1, index)
