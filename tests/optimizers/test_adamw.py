from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from trialist.optimizers.adamw import adamw


def names(model, optimizer):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{known[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]


def test_matrices_decay_and_embeddings_norms_and_biases_do_not():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=5)
    model = GPT2LMHeadModel(config)  # its head is tied to the embedding
    optimizer = adamw(model, 1e-3)
    decayed, plain = names(model, optimizer)
    block = "transformer.h.0"
    assert decayed == {f"{block}.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert {"transformer.wte.weight", "transformer.wpe.weight", f"{block}.ln_1.weight", "transformer.ln_f.bias"} < plain
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert decayed | plain == {name for name, _ in model.named_parameters()}


def test_two_steps_are_the_formula_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = adamw(model, 0.1, weight_decay=0.5, betas=(0.9, 0.99))
    weight, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        weight -= 0.1 * 0.5 * weight
        weight -= 0.1 * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.99**step)) + 1e-8)
    assert model.weight.item() == pytest.approx(weight, rel=1e-6)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3, 3))
        self.inner = nn.Linear(3, 3)

    def optimizer_groups(self):
        return [{"params": [self.gate], "learning_rate_scale": 0.1, "weight_decay": 0.0, "betas": (0.5, 0.6)}]


def test_a_module_declares_groups_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), Gate())
    optimizer = adamw(model, 0.02)
    assert names(model, optimizer) == [{"0.weight", "1.inner.weight"}, {"0.bias", "1.inner.bias"}, {"1.gate"}]
    declared = optimizer.param_groups[2]
    assert declared["lr"] == pytest.approx(0.002)
    assert (declared["weight_decay"], declared["betas"]) == (0.0, (0.5, 0.6))


def test_the_outermost_declaration_wins_and_no_parameter_comes_twice():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Gate()

        def optimizer_groups(self):
            return [{"params": list(self.parameters()), "weight_decay": 0.3}]

    model = Outer()
    optimizer = adamw(model, 0.02)
    assert names(model, optimizer) == [{"part.gate", "part.inner.weight", "part.inner.bias"}]
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_a_declared_parameter_of_another_module_is_refused():
    class Thief(nn.Linear):
        def optimizer_groups(self):
            return [{"params": [nn.Parameter(torch.zeros(1))]}]

    with pytest.raises(ValueError, match=r"optimizer_groups\(\) of module '0' names a foreign parameter"):
        adamw(nn.Sequential(Thief(2, 2)), 0.1)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    assert names(model, adamw(model, 0.1)) == [{"1.weight"}, {"1.bias"}]


def test_the_update_is_fused_and_the_same_each_time():
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(50, 41)
        optimizer = adamw(model, 0.1)
        for _ in range(3):
            model(torch.randn(7, 50)).square().sum().backward()
            optimizer.step()
        weights.append(model.weight.detach().clone())
    assert optimizer.defaults["fused"]
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"learning_rate": 0.0}, "learning_rate"), ({"learning_rate": 1.0, "weight_decay": -1}, "weight_decay")],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        adamw(nn.Linear(2, 2), **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        adamw(nn.Linear(2, 2).requires_grad_(False), 0.1)
