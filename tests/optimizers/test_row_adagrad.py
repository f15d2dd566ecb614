from __future__ import annotations

import copy

import pytest
import torch

from trialist.models import PEER
from trialist.optimizers import RowAdagrad


def test_two_steps_are_the_formula_by_hand() -> None:
    table = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    optimizer = RowAdagrad([table], lr=0.1)
    table.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    optimizer.step()  # sums 12.5, 0, 1
    table.grad = torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, 0.0]])
    optimizer.step()  # sums 25, 0, 1
    expected = [[1 - 0.3 / 12.5**0.5, 2 - 0.4 / 12.5**0.5 - 0.5 / 5], [3.0, 4.0], [4.9, 5.9]]
    torch.testing.assert_close(table.data, torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_move_the_table_as_dense_ones(dtype: torch.dtype) -> None:
    tables = []
    for sparse in (False, True):
        generator = torch.Generator().manual_seed(0)
        table = torch.nn.Parameter(torch.randn(7, 3, generator=generator).to(dtype))
        optimizer = RowAdagrad([table], lr=0.1)
        for _ in range(3):
            rows = torch.randint(7, (5,), generator=generator)  # some come twice
            values = torch.randn(5, 3, generator=generator).to(dtype)
            gradient = torch.sparse_coo_tensor(rows[None], values, (7, 3), check_invariants=True)
            table.grad = gradient if sparse else gradient.to_dense()
            optimizer.step()
        tables.append(table.data)
    torch.testing.assert_close(*tables)


def test_it_keeps_one_number_a_row_and_its_state_can_be_resumed() -> None:
    table = torch.nn.Parameter(torch.randn(7, 3))
    optimizer = RowAdagrad([table], lr=0.1)
    table.grad = torch.randn(7, 3)
    optimizer.step()
    assert optimizer.state[table]["sum"].shape == (7,)
    twin = torch.nn.Parameter(table.detach().clone())
    resumed = RowAdagrad([twin], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, optim in ((table, optimizer), (twin, resumed)):
        parameter.grad = torch.ones(7, 3)
        optim.step()
    assert torch.equal(table, twin)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_bfloat16_tables_resume_to_the_bit_with_float32_accumulators(sparse: bool) -> None:
    """Accumulators of three digits would stand still: 1000 + 1/3 is 1000 in bfloat16."""

    def step(table: torch.nn.Parameter, optimizer: RowAdagrad, values: torch.Tensor) -> None:
        rows = torch.tensor([[1, 4]])
        gradient = torch.sparse_coo_tensor(rows, values.bfloat16(), (7, 3), check_invariants=True)
        table.grad = gradient if sparse else gradient.to_dense()
        optimizer.step()

    table = torch.nn.Parameter(torch.randn(7, 3).bfloat16())
    optimizer = RowAdagrad([table], lr=0.1)
    step(table, optimizer, torch.full((2, 3), 1000.0**0.5))
    twin = torch.nn.Parameter(table.detach().clone())
    resumed = RowAdagrad([twin], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        for parameter, optim in ((table, optimizer), (twin, resumed)):
            step(parameter, optim, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert torch.equal(table, twin)
    assert resumed.state[twin]["sum"].dtype == torch.float32
    assert torch.equal(resumed.state[twin]["sum"], optimizer.state[table]["sum"])
    assert resumed.state[twin]["sum"][1] > 1000.5


def test_it_trains_the_tables_of_a_layer_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    peer = PEER(8, 64, 2, 4, 8, sparse_grad=True)
    x, target = torch.randn(50, 8), torch.randn(50, 8)
    optimizer = RowAdagrad([*peer.down, *peer.up], lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (peer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_no_table_and_rates_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not parameters of shape \(3,\); give those to AdamW"):
        RowAdagrad([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="lr and eps must be > 0"):
        RowAdagrad([torch.nn.Parameter(torch.zeros(3, 2))], lr=0.0)


def test_shards_of_a_table_are_refused():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        table = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="whole tables, not shards"):
            RowAdagrad([torch.nn.Parameter(table)], lr=0.1)
    finally:
        dist.destroy_process_group()
