from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, enable_selective_attention, initialize_
from trialist.objectives import CrossEntropy, MemoryLoss
from trialist.training import fit

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip


def decoder(**changes) -> ModularDecoderForCausalLM:
    model = ModularDecoderForCausalLM(
        ModularDecoderConfig(**{**SIZES, "layer_types": ["selective_attention"] * 3, **changes})
    )
    initialize_(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.double()


def tokens(B: int = 2, T: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 31, (B, T), generator=torch.Generator().manual_seed(seed))


def steer_selector(model: nn.Module, logit: float) -> None:
    """Every selector logit becomes `logit`, at every distance: queries and keys of one value, without rotation."""
    width, value = 4, abs(logit) ** 0.5
    for block in model.model.layers:

        def constant(module, args, output, sign=1.0):  # type: ignore[no-untyped-def]
            output = output.clone()
            output[..., :width] = 0.0
            output[..., width - 1] = sign * value * width**0.25  # the slowest pair of the rotation
            return output

        block.mixer.q_proj.register_forward_hook(constant)
        sign = 1.0 if logit > 0 else -1.0
        block.mixer.k_proj.register_forward_hook(lambda m, a, o, sign=sign: constant(m, a, o, sign))
    model.model.rotary_emb.inv_freq.zero_()


def share(model: nn.Module, batch: dict[str, Tensor], **options) -> float:
    loss, stats = MemoryLoss(epsilon=1.0, **options)(model, batch)
    plain, _ = CrossEntropy()(model, batch)
    torch.testing.assert_close(stats["memory"], loss.detach() - plain.detach())
    return float(stats["memory"] / stats["weight"])


def test_without_selections_everything_is_kept() -> None:
    model = decoder()
    steer_selector(model, -1.0)
    assert share(model, {"input_ids": tokens()}) == pytest.approx(1.0)  # the last query sees all n of n
    assert share(model, {"input_ids": tokens()}, reduction="mean") == pytest.approx(5 / 9)  # the mean of i + 1, over n


@pytest.mark.parametrize("T", [2, 3, 4, 9])
def test_where_everything_is_selected_first_previous_and_current_token_remain(T: int) -> None:
    model = decoder()
    steer_selector(model, 50.0)
    assert share(model, {"input_ids": tokens(T=T)}) == pytest.approx(min(T, 3) / T)
    mean = sum(min(i + 1, 3) for i in range(T)) / T
    assert share(model, {"input_ids": tokens(T=T)}, reduction="mean") == pytest.approx(mean / T)


def test_penalties_below_tau_count_in_part() -> None:
    model = decoder()
    steer_selector(model, 0.25)  # F[i, j] = 0.25 (i - j - 1) for j > 0
    T, tau = 6, 2.0
    by_hand = max(1 + sum(1 - min(0.25 * max(0, i - j - 1), tau) / tau for j in range(1, i + 1)) for i in range(1, T))
    assert share(model, {"input_ids": tokens(T=T)}, tau=tau) == pytest.approx(by_hand / T)


def test_price_zero_is_cross_entropy_bit_for_bit() -> None:
    results = []
    for objective in (CrossEntropy(), MemoryLoss(epsilon=0.0)):
        model = decoder()
        loss, stats = objective(model, {"input_ids": tokens()})
        loss.backward()
        results.append((loss, stats["weight"], *(parameter.grad for parameter in model.parameters())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_gradients_equal_finite_differences(reduction) -> None:
    model, batch = decoder(num_hidden_layers=2, layer_types=["selective_attention"] * 2), {"input_ids": tokens(T=7)}
    objective = MemoryLoss(tau=3.0, epsilon=5.0, reduction=reduction)
    objective(model, batch)[0].backward()
    generator = torch.Generator().manual_seed(1)
    for parameter in (model.model.layers[0].mixer.q_proj.weight, model.model.layers[1].mixer.k_proj.weight):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(float(objective(model, batch)[0]))
                parameter.sub_(step * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_what_is_forgotten_already_gets_no_gradient() -> None:
    model, batch = decoder(), {"input_ids": tokens()}
    steer_selector(model, 50.0)
    with_price = copy.deepcopy(model)
    CrossEntropy()(model, batch)[0].backward()
    MemoryLoss(epsilon=1e3)(with_price, batch)[0].backward()
    for plain, priced in zip(model.parameters(), with_price.parameters()):
        assert (plain.grad is None) == (priced.grad is None)
        if plain.grad is not None:
            torch.testing.assert_close(priced.grad, plain.grad)


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_batching_padding_and_packing_change_nothing(reduction) -> None:
    model, objective = decoder(), MemoryLoss(epsilon=2.0, reduction=reduction)
    rows = [tokens(1, length, seed=length) for length in (5, 8, 3)]
    alone = [objective(model, {"input_ids": row}) for row in rows]
    expected = sum(loss for loss, _ in alone), sum(stats["weight"] for _, stats in alone)

    padded = {name: torch.zeros(3, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for index, row in enumerate(rows):
        left = 2 if index == 0 else 0
        part = slice(left, left + row.shape[1])
        padded["input_ids"][index, part], padded["attention_mask"][index, part] = row[0], 1
    packed = {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
    }
    for batch in (padded, packed):
        loss, stats = objective(model, batch)
        torch.testing.assert_close(loss, expected[0])
        assert stats["weight"] == expected[1] == objective.weight(batch)


@pytest.mark.parametrize("swapped", [False, True])
def test_gradient_checkpointing_changes_no_gradient(swapped: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        if swapped:
            torch.manual_seed(0)
            model = enable_selective_attention(LlamaForCausalLM(LlamaConfig(**SIZES))).double().train()
        else:
            model = decoder().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        MemoryLoss(epsilon=3.0)(model, {"input_ids": tokens()})[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_reentrant_checkpointing_is_refused_because_it_hides_the_memory() -> None:
    model = decoder().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="must not be reentrant"):
        MemoryLoss()(model, {"input_ids": tokens()})


def test_training_with_the_price_forgets_more_than_training_without() -> None:
    kept = {}
    for epsilon in (0.0, 3.0):
        model = decoder().float()
        objective = MemoryLoss(epsilon=epsilon)
        fit(model, lambda step: {"input_ids": tokens(8, 12, seed=step)}, objective, torch.optim.AdamW(model.parameters(), 3e-3),
            "constant", {"steps": 40}, progress=False)  # fmt: skip
        kept[epsilon] = share(model, {"input_ids": tokens(8, 12, seed=99)})
    assert kept[3.0] < 0.8 * kept[0.0]


def test_nothing_is_recorded_or_held_once_the_objective_has_run() -> None:
    model = decoder()
    MemoryLoss()(model, {"input_ids": tokens()})
    model(tokens())
    with torch.no_grad():
        MemoryLoss()(model, {"input_ids": tokens()})
        model(tokens())
    assert all(block.mixer.memory_record is None for block in model.model.layers)
    MemoryLoss()(model, {"input_ids": tokens()})
    model(tokens())
    assert not any(block.mixer.memory_record.memories for block in model.model.layers)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_loss_and_gradients() -> None:
    results = []
    for compiled in (False, True):
        model = decoder().float()
        for block in model.model.layers if compiled else ():
            block.compile(fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            loss, _ = MemoryLoss(epsilon=2.0)(model, {"input_ids": tokens()})
            loss.backward()
        results.append((loss.detach(), *(parameter.grad for parameter in model.parameters())))
    for plain, theirs in zip(*results):
        torch.testing.assert_close(plain, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 0.0}, "tau is 0.0; it must be above 0"),
        ({"epsilon": -0.1}, "epsilon is -0.1; it must be at least 0"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MemoryLoss(**options)


def test_a_model_that_never_forgets_is_refused() -> None:
    model = decoder(layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match="has no selective attention"):
        MemoryLoss()(model, {"input_ids": tokens()})
