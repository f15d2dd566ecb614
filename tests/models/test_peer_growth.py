from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trialist.models import PEER
from trialist.optimizers import adamw

SMALL = {"hidden_size": 12, "num_experts": 25, "num_heads": 3, "top_k": 4, "key_dim": 6}


@pytest.fixture
def peer() -> PEER:
    torch.manual_seed(0)
    return PEER(**SMALL, glu=True)


def test_held_back_to_the_old_side_a_grown_layer_is_the_old_one_bit_for_bit(peer) -> None:
    x = torch.randn(2, 9, 12)
    old = copy.deepcopy(peer).eval()
    peer.eval().grow(8)
    assert (peer.num_experts, peer.sides) == (64, [5, 8])
    with torch.no_grad():
        peer.up[1].normal_()  # as after training
    assert not torch.equal(peer(x), old(x))
    peer.active_side = 5
    assert torch.equal(peer(x), old(x))
    peer.active_side = None
    assert peer.active_side == 8


def test_growth_appends_rows_and_moves_none(peer) -> None:
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    peer.grow(8)
    after = peer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name in after if name not in before} == {"keys.1", "down.1", "up.1", "gate.1"}
    assert after["up.1"].shape == (64 - 25, 12)


def test_new_experts_start_silent_and_their_keys_like_the_old_ones() -> None:
    torch.manual_seed(0)
    peer = PEER(12, 400, 3, 4, 64)
    with torch.no_grad():
        peer.keys[0].normal_().mul_(0.3).add_(2.0)
    peer.grow(60, torch.Generator().manual_seed(1))
    new = peer.keys[1]
    assert not peer.up[1].any()
    assert new.mean().item() == pytest.approx(2.0, abs=0.05)
    assert new.std().item() == pytest.approx(0.3, rel=0.1)
    assert peer.down[1].std().item() == pytest.approx(12**-0.5, rel=0.05)


def test_a_pool_of_one_key_grows_keys_that_differ() -> None:
    peer = PEER(12, 1, 2, 1, 6, score="sigmoid")
    peer.grow(4)
    assert peer.keys[1].std() > 0.05


def test_a_grown_layer_loads_into_one_built_with_its_generations(peer) -> None:
    peer.grow(8)
    peer.grow(9)
    loaded = PEER(12, **peer.settings)
    loaded.load_state_dict(peer.state_dict())
    x = torch.randn(7, 12)
    assert peer.settings["generations"] == [5, 8, 9]
    assert torch.equal(loaded.eval()(x), peer.eval()(x))


@pytest.mark.parametrize("what", ["experts", "experts+keys", "experts+keys+query"])
def test_what_is_frozen_keeps_its_bits_through_steps_with_decay_and_momentum(peer, what: str) -> None:
    optimizer = adamw(peer, 0.1)  # made before freezing: it holds momenta of what is frozen
    peer(torch.randn(30, 12)).square().sum().backward()
    optimizer.step()
    peer.freeze(what)
    peer.grow(8)
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    optimizer = adamw(peer, 0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (peer(torch.randn(30, 12)) - 1).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in peer.state_dict().items() if not torch.equal(tensor, before[name])}
    query = {f"query_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")} | {"query_proj.weight"}
    expected = {"down.1", "up.1", "gate.1", "keys.1"}
    expected |= set() if what == "experts+keys+query" else query
    expected |= {"keys.0"} if what == "experts" else set()
    assert changed == expected


def test_the_state_of_the_optimizer_of_old_rows_stays_aligned(peer) -> None:
    optimizer = torch.optim.Adam(peer.parameters(), 1e-2)
    peer(torch.randn(30, 12)).square().sum().backward()
    optimizer.step()
    moment = optimizer.state[peer.up[0]]["exp_avg"]
    peer.grow(8)
    optimizer.add_param_group({"params": [peer.keys[1], peer.down[1], peer.up[1], peer.gate[1]]})
    assert optimizer.state[peer.up[0]]["exp_avg"] is moment
    assert moment.shape == peer.up[0].shape


def test_what_cannot_be_is_refused(peer) -> None:
    with pytest.raises(ValueError, match="new_side is 5; the pool has side 5 and can only grow"):
        peer.grow(5)
    with pytest.raises(ValueError, match="'experts', 'experts\\+keys'"):
        peer.freeze("keys")
    for side in (1, 6):
        with pytest.raises(ValueError, match=f"active_side is {side}"):
            peer.active_side = side


def test_frozen_experts_of_a_grown_layer_still_carry_gradients_to_the_input(peer) -> None:
    peer.freeze("experts+keys+query")
    x = torch.randn(5, 12, requires_grad=True)
    nn.functional.mse_loss(peer(x), torch.zeros(5, 12)).backward()
    assert x.grad.abs().sum() > 0
