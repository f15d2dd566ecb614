from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, get_scheduler

from trialist.models import (
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    enable_selective_attention,
    initialize_,
    set_budgets,
)
from trialist.models.selective_attention.memory import record_memory
from trialist.objectives import CrossEntropy, MemoryLoss
from trialist.training import ObjectiveTrainer, fit

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


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_is_recorded_or_computed_once_the_objective_has_run(gradients: bool) -> None:
    model = decoder()
    with torch.set_grad_enabled(gradients):
        MemoryLoss()(model, {"input_ids": tokens()})
    assert all(block.mixer.memory_record is None for block in model.model.layers)


def test_under_gradient_checkpointing_nothing_is_held_once_the_objective_has_run() -> None:
    model = decoder().train()
    model.gradient_checkpointing_enable()
    MemoryLoss()(model, {"input_ids": tokens()})
    model(tokens())
    assert not any(block.mixer.memory_record.memories for block in model.model.layers)


def rows_of_uneven_length(step: int) -> dict[str, Tensor]:
    ids, mask = tokens(2, 9, seed=step), torch.ones(2, 9, dtype=torch.long)
    mask[0, 9 - step % 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_the_trainer_of_transformers_takes_the_losses_of_fit(tmp_path) -> None:
    ours, theirs = decoder().float(), decoder().float()
    objective, steps, accumulate = MemoryLoss(epsilon=2.0), 4, 2
    expected = fit(ours, rows_of_uneven_length, objective, torch.optim.AdamW(ours.parameters(), 1e-3), "constant",
                   {"steps": steps}, accumulate=accumulate, progress=False).losses  # fmt: skip
    batches = [rows_of_uneven_length(index) for index in range(steps * accumulate)]
    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in batches for row in range(2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-3)
    optimizers = optimizer, get_scheduler("constant", optimizer)
    trainer = ObjectiveTrainer(theirs, arguments, objective=objective, train_dataset=rows, optimizers=optimizers)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=2e-5)


def test_under_lora_and_half_precision_the_price_reaches_the_adapters_of_the_selector() -> None:
    torch.manual_seed(0)
    base = enable_selective_attention(LlamaForCausalLM(LlamaConfig(**SIZES)))
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, shares = get_peft_model(base, lora), []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss, stats = MemoryLoss(tau=0.1, epsilon=1e4)(model, {"input_ids": tokens()})
        loss.backward()
        shares.append(float(stats["memory"] / stats["weight"]))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".layers.0." in name:
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 1e-3, name
    assert shares[0] < 0.999
    assert shares[1] == pytest.approx(shares[0], rel=0.02)


def test_every_step_with_gradient_of_a_recurrent_core_counts_as_a_layer() -> None:
    def recurrent(without: int, with_gradient: int) -> tuple[float, list[Tensor]]:
        settings = {"prelude_layers": 1, "core_layers": 1, "coda_layers": 1, "mean_recurrence": 3, "state_init": "zero"}
        model = decoder(depth="recurrent", recurrent=settings).train()
        seen: list[Tensor] = []
        with record_memory(model, 1.0) as records:
            model(tokens(), num_steps=(without, with_gradient), use_cache=False)
            seen = [memory.detach() for record in records for memory in record.memories]
        objective = MemoryLoss(epsilon=1.0, cross_entropy=Steps(without, with_gradient))  # type: ignore[arg-type]
        _, stats = objective(model, {"input_ids": tokens()})
        return float(stats["memory"] / stats["weight"]), seen

    for steps in ((0, 3), (2, 1)):
        measured, memories = recurrent(*steps)
        assert len(memories) == 2 + steps[1]
        by_hand = sum(float(memory.max(1).values.mean()) for memory in memories) / len(memories) / 9
        assert measured == pytest.approx(by_hand)


@dataclass(frozen=True)
class Steps:
    """Cross entropy of a pass with a given number of steps without and with gradient."""

    without: int
    with_gradient: int

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(**batch, num_steps=(self.without, self.with_gradient), use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum"
        )
        return loss, {"weight": torch.tensor(batch["input_ids"][:, 1:].numel())}


@pytest.mark.parametrize("budget", [3, 5])
def test_under_a_budget_only_what_is_still_there_counts(budget: int) -> None:
    model = decoder()
    steer_selector(model, -1.0)
    set_budgets(model, budget)
    assert share(model, {"input_ids": tokens()}) == pytest.approx((budget + 1) / 9)


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
        ({"tau": 0.0}, "tau is 0.0; it must be finite and above 0"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"epsilon": -0.1}, "epsilon is -0.1; it must be finite and at least 0"),
        ({"epsilon": float("inf")}, "epsilon is inf; it must be finite"),
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
