"""Tensors that grow along one dimension without being copied for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEP, SHARE = 16, 16
"""A full tensor grows by 16 entries, or by a sixteenth of what it holds: more would cost the memory that was to be saved"""


@dataclass
class Growing:
    """The first `length` entries along `dim` of `buffer`."""

    buffer: Tensor
    length: int
    dim: int = 2

    @classmethod
    def of(cls, x: Tensor, dim: int = 2) -> Growing:
        """A copy of `x`, which may be a view into something larger."""
        grown = cls(_empty(x, dim, x.shape[dim]), 0, dim)
        grown.append(x)
        return grown

    def view(self) -> Tensor:
        return self.buffer.narrow(self.dim, 0, self.length)

    def append(self, x: Tensor) -> None:
        needed = self.length + x.shape[self.dim]
        if needed > self.buffer.shape[self.dim]:
            larger = _empty(self.buffer, self.dim, max(needed, self.length + max(STEP, self.length // SHARE)))
            larger.narrow(self.dim, 0, self.length).copy_(self.view())
            self.buffer = larger
        self.buffer.narrow(self.dim, self.length, x.shape[self.dim]).copy_(x)
        self.length = needed

    def take_first(self, count: int) -> Tensor:
        """Cuts the first `count` entries off and returns them, valid until the next change."""
        first, rest = self.view().narrow(self.dim, 0, count), self.view().narrow(self.dim, count, self.length - count)
        first, rest = first.clone(), rest.clone()
        self.length = rest.shape[self.dim]
        self.buffer.narrow(self.dim, 0, self.length).copy_(rest)
        return first

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies `function`, which leaves this dimension as it is: another order of rows, another device."""
        self.buffer = function(self.buffer)

    def put(self, x: Tensor) -> None:
        """Holds `x` from now on."""
        self.buffer, self.length = _empty(x, self.dim, x.shape[self.dim]), 0
        self.append(x)


def _empty(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return torch.empty(shape, dtype=like.dtype, device=like.device)
