"""The order of the training data: a function of seed and step alone, so that arms see the same batches and resume is exact."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trialist.data.packing import PackedRows


class BatchOrder:
    """Row indices of the batch at a step. The data are passed through in epochs, each a new permutation.

    A batch may span the end of an epoch, so every step has exactly `batch_size` rows. `step` counts from 0.
    """

    def __init__(self, rows: int, batch_size: int, seed: int):
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows and batch_size must be at least 1, not {rows} and {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def __call__(self, step: int) -> Tensor:
        """(batch_size,) int64."""
        if step < 0:
            raise ValueError(f"step must not be negative, not {step}")
        place, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while place < end:
            epoch, start = divmod(place, self.rows)
            stop = min(self.rows, start + end - place)
            parts.append(self._permutation(epoch)[start:stop])
            place += stop - start
        return torch.from_numpy(np.concatenate(parts))

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._epoch[1]


class PackedBatches:
    """The batch of packed rows at a step: `input_ids`, `position_ids`, `labels`, each (batch_size, T) int64."""

    def __init__(self, packed: PackedRows, batch_size: int, seed: int):
        self.packed = packed
        self.order = BatchOrder(len(packed), batch_size, seed)

    def __call__(self, step: int) -> dict[str, Tensor]:
        return self.packed.rows(self.order(step))
