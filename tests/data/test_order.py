from __future__ import annotations

import pytest
import torch

from trialist.data.order import BatchOrder, PackedBatches
from trialist.data.packing import pack


@pytest.mark.parametrize(("rows", "batch_size"), [(7, 3), (5, 5), (3, 8), (1, 2)])
def test_every_epoch_visits_every_row_once(rows: int, batch_size: int):
    order = BatchOrder(rows, batch_size, seed=0)
    sequence = torch.cat([order(step) for step in range(3 * rows)])
    assert len(sequence) == 3 * rows * batch_size
    for epoch in sequence[: len(sequence) // rows * rows].reshape(-1, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


def test_a_step_has_the_same_batch_in_any_order_of_asking():
    forward = BatchOrder(23, 4, seed=9)
    expected = [forward(step).tolist() for step in range(40)]
    backward = BatchOrder(23, 4, seed=9)
    assert [backward(step).tolist() for step in reversed(range(40))] == expected[::-1]


def test_epochs_and_seeds_have_different_orders():
    assert BatchOrder(50, 50, seed=0)(0).tolist() != BatchOrder(50, 50, seed=0)(1).tolist()
    assert BatchOrder(50, 50, seed=0)(0).tolist() != BatchOrder(50, 50, seed=1)(0).tolist()


def test_packed_batches_are_the_rows_of_the_order():
    packed = pack([list(range(9))] * 5, 4, bos_id=9)
    batches = PackedBatches(packed, 3, seed=2)
    indices = BatchOrder(len(packed), 3, seed=2)(7)
    assert torch.equal(batches(7)["input_ids"], packed.input_ids[indices])
    assert torch.equal(batches(7)["labels"], packed.labels[indices])
    assert torch.equal(batches(7)["position_ids"], packed.position_ids[indices])


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_sizes_are_refused(arguments: tuple[int, int, int]):
    with pytest.raises(ValueError, match="must"):
        BatchOrder(*arguments)
    with pytest.raises(ValueError, match="step must not be negative"):
        BatchOrder(2, 1, 0)(-1)
