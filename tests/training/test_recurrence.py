from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tests.training.conftest import VOCABULARY, tiny_llama
from trialist.models import (
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    flops_per_token,
    initialize_,
    recurrence_gain,
    token_correlation,
)
from trialist.models.recurrent_depth.sampling import sample_recurrence
from trialist.models.recurrent_depth.steps import depth_of
from trialist.objectives import CrossEntropy
from trialist.optimizers import adamw
from trialist.training import ObjectiveTrainer, RecurrenceCallback, fit

MEAN = 6


def recurrent_model(**settings) -> ModularDecoderForCausalLM:
    config = ModularDecoderConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        depth="recurrent", recurrent={"mean_recurrence": MEAN, "backprop_depth": 3, "seed": 11, **settings},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    return model


class Watch(TrainerCallback):
    """Notes the number of steps of every training pass, as the core is called."""

    def __init__(self, model: ModularDecoderForCausalLM) -> None:
        self.passes: list[int] = []
        depth = depth_of(model)
        depth.register_forward_pre_hook(lambda *_: self.passes.append(0) if depth.training else None)
        depth.core.register_forward_pre_hook(lambda *_: self._count() if depth.training else None)

    def _count(self) -> None:
        self.passes[-1] += 1


def train(model, batches, steps: int, callbacks=(), **options):
    return fit(
        model, batches, CrossEntropy(), adamw(model, 1e-3), "constant", {"steps": steps}, callbacks=callbacks,
        progress=False, divergence_margin=float("inf"), **options,
    )  # fmt: skip


def drawn(step: int) -> int:
    return sample_recurrence(11, step, MEAN, 0.5)


def test_with_the_callback_all_micro_batches_of_a_step_draw_by_the_step(batches) -> None:
    model = recurrent_model()
    watch = Watch(model)
    train(model, batches, 4, [RecurrenceCallback()], accumulate=2)
    taken = watch.passes[-8:]  # before them the objective compared two passes
    assert taken == [drawn(step) for step in range(4) for _ in range(2)]
    assert not depth_of(model).by_step


def test_without_the_callback_every_pass_draws_by_its_number(batches) -> None:
    model = recurrent_model()
    watch = Watch(model)
    train(model, batches, 3, accumulate=2)
    assert watch.passes[-6:] == [drawn(index) for index in range(6)]


@pytest.mark.parametrize("callbacks", [[], [RecurrenceCallback()]], ids=["counting", "callback"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(batches, tmp_path, callbacks: list) -> None:
    whole, halves = recurrent_model(), recurrent_model()
    losses = train(whole, batches, 6, callbacks).losses
    train(halves, batches, 3, callbacks, checkpoint=tmp_path)
    again = recurrent_model()
    assert train(again, batches, 6, callbacks, checkpoint=tmp_path).losses == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_trainer_of_transformers_draws_by_the_step_too(batches, tmp_path) -> None:
    model = recurrent_model()
    watch = Watch(model)
    rows = [{name: tensor[0] for name, tensor in batches(0).items()} for _ in range(6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = ObjectiveTrainer(
        model, arguments, objective=CrossEntropy(), train_dataset=rows, callbacks=[RecurrenceCallback()]
    )
    trainer.train()
    assert watch.passes[-3:] == [drawn(step) for step in range(3)]


def test_the_cost_of_training_counts_steps_without_gradient_as_forward_passes(batches) -> None:
    model = recurrent_model(train_recurrence="fixed")
    flops = train(model, batches, 2).cost["flops"]
    once = flops_per_token(recurrent_model(mean_recurrence=1), 11)
    core = (flops_per_token(model, 11) - once) / (MEAN - 1)
    assert flops == pytest.approx(2 * 33 * (3 * (once - core) + 3 * core * 3 + 3 * core))


def test_a_model_without_recurrent_depth_is_refused_at_the_start(batches) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no recurrent depth"):
        train(tiny_llama(), batches, 1, [RecurrenceCallback()])


def test_the_mean_number_of_steps_rises_with_the_training_step_also_after_a_resume(batches, tmp_path) -> None:
    def rising(step: int) -> int:
        return 1 + 3 * step

    whole, first, second = recurrent_model(), recurrent_model(), recurrent_model()
    watch = Watch(second)
    losses = train(whole, batches, 4, [RecurrenceCallback(mean=rising)]).losses
    train(first, batches, 2, [RecurrenceCallback(mean=rising)], checkpoint=tmp_path)
    again = train(second, batches, 4, [RecurrenceCallback(mean=rising)], checkpoint=tmp_path).losses
    assert again == losses
    assert watch.passes[-2:] == [sample_recurrence(11, step, rising(step), 0.5) for step in (2, 3)]
    assert whole.config.recurrent["mean_recurrence"] == rising(3)


def test_the_health_of_the_loop_is_measured_every_so_many_steps_and_at_the_end(batches) -> None:
    model, held_out = recurrent_model(), batches(9)
    logs: list[list[dict]] = []

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, **objects):
            logs.append(list(state.log_history))

    train(model, batches, 5, [RecurrenceCallback(health=held_out, health_every=2), Keep()])
    measured = [entry for entry in logs[0] if "recurrence_gain" in entry]
    assert [entry["step"] for entry in measured] == [2, 4, 5]
    ids, mask = held_out["input_ids"], held_out["attention_mask"]
    assert measured[-1]["recurrence_gain"] == pytest.approx(recurrence_gain(model, ids, mask))
    model.eval()
    states = model(ids, attention_mask=mask, output_latent_states=True).latent_states[-1]
    assert measured[-1]["token_correlation"] == pytest.approx(token_correlation(states, mask))


def test_measuring_the_health_does_not_change_the_training(batches) -> None:
    plain = train(recurrent_model(), batches, 4, [RecurrenceCallback()]).losses
    assert train(recurrent_model(), batches, 4, [RecurrenceCallback(health=batches(9), health_every=1)]).losses == plain


def test_health_at_every_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="health_every is 0"):
        RecurrenceCallback(health_every=0)
