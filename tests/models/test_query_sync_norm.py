from __future__ import annotations

import copy

import pytest
import torch

from trialist.models import PEER


@pytest.mark.parametrize("padded", [False, True])
def test_without_other_ranks_statistics_over_ranks_are_those_of_the_batch(padded: bool) -> None:
    torch.manual_seed(0)
    alone = PEER(12, 49, 3, 4, 6, query_norm="batchnorm")
    synced = PEER(12, 49, 3, 4, 6, query_norm="sync_batchnorm")
    synced.load_state_dict(alone.state_dict())
    x = torch.randn(2, 5, 12)
    mask = torch.arange(5) < torch.tensor([[5], [3]]) if padded else None
    outputs = []
    for layer in (alone, synced):
        for _ in range(2):
            y = layer(x, mask)
        y = y if mask is None else y[mask]
        y.square().sum().backward()
        outputs.append(y.detach())
    torch.testing.assert_close(*outputs)
    for ours, reference in zip(synced.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-5)
    for ours, reference in zip(synced.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, reference)
    assert not torch.equal(alone.query_norm.running_var, torch.ones(18))


def test_a_single_token_in_training_leaves_the_running_statistics() -> None:
    layer = PEER(12, 49, 3, 4, 6, query_norm="sync_batchnorm")
    before = copy.deepcopy(layer.query_norm.state_dict())
    x = torch.randn(1, 12)
    trained = layer(x)
    torch.testing.assert_close(trained, layer.eval()(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.query_norm.state_dict().items())
