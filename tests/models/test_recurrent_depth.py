from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models.recurrent import recurrent, written_out
from trialist.models import (
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    count_parameters,
    flops_per_token,
    initialize_,
)
from trialist.models.recurrent_depth.steps import depth_of


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("steps", [1, 4])
def test_logits_equal_the_loop_written_out(decoder, ids, steps: int) -> None:
    model = recurrent(decoder, state_init="zero")
    expected = written_out(model, ids, torch.zeros(3, 7, 24), steps)
    torch.testing.assert_close(model(ids, num_steps=steps).logits, expected, rtol=1e-4, atol=1e-4)


def test_latent_states_start_from_noise_that_is_the_same_in_every_row_and_pass(decoder, ids) -> None:
    model = recurrent(decoder, state_std=0.5)
    states = model(ids, output_latent_states=True).latent_states
    assert len(states) == 6
    assert states[0].std() == pytest.approx(0.5 * 0.9866, rel=0.1)  # the share of the spread that the cut leaves
    assert torch.equal(states[0][0], states[0][2])
    assert torch.equal(states[0], model(ids, output_latent_states=True).latent_states[0])
    expected = written_out(model, ids, states[0], 5)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_added_injection_needs_no_parameters(decoder, ids) -> None:
    model = recurrent(decoder, injection="add", state_init="zero")
    concat = recurrent(decoder, state_init="zero")
    assert count_parameters(concat) - count_parameters(model) == 24 * 48
    depth = depth_of(model)
    core, seen = depth.core.blocks[0], []
    core.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model(ids, num_steps=2, output_latent_states=True).latent_states
    torch.testing.assert_close(seen[1] - seen[0], states[1])  # s_0 = 0 and the same e


def test_number_of_parameters_does_not_depend_on_the_number_of_steps(decoder) -> None:
    assert count_parameters(recurrent(decoder, mean_recurrence=1)) == count_parameters(
        recurrent(decoder, mean_recurrence=64)
    )


def test_paper_sizes_give_its_parameter_count_and_effective_depth() -> None:
    config = ModularDecoderConfig(
        vocab_size=65536, hidden_size=5280, intermediate_size=17920, num_hidden_layers=8, num_attention_heads=55,
        head_dim=96, depth="recurrent", norm_style="sandwich",
    )  # fmt: skip
    assert config.effective_depth == 132
    with torch.device("meta"):
        model = ModularDecoderForCausalLM(config)
    block = sum(p.numel() for p in model.model.layers.prelude[0].parameters() if p.dim() == 2)
    assert block == 4 * 5280**2 + 3 * 5280 * 17920
    assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == 8 * block + 2 * 5280**2 + 65536 * 5280


def test_full_backpropagation_gives_the_gradient_of_the_loop_written_out(decoder, ids) -> None:
    model = recurrent(decoder, state_init="zero").double().train()
    weights = torch.randn(3, 7, 37, dtype=torch.float64)
    expected = torch.autograd.grad(
        (written_out(model, ids, torch.zeros(3, 7, 24).double(), 4) * weights).sum(), list(model.parameters())
    )
    found = torch.autograd.grad((model(ids, num_steps=(0, 4)).logits * weights).sum(), list(model.parameters()))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("num_steps", [(3, 2), 5], ids=["pair", "int"])
def test_steps_without_gradient_are_detached(decoder, ids, num_steps) -> None:
    model = recurrent(decoder, state_init="zero").double().train()
    weights = torch.randn(3, 7, 37, dtype=torch.float64)
    loss = (written_out(model, ids, torch.zeros(3, 7, 24).double(), 5, without_gradient=3) * weights).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = torch.autograd.grad((model(ids, num_steps=num_steps).logits * weights).sum(), list(model.parameters()))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_int_during_training_still_trains_the_core(decoder, ids) -> None:
    model = recurrent(decoder).train()
    model(ids, labels=ids, num_steps=6).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in depth_of(model).core.parameters())


def test_autocast_keeps_the_gradients_of_weights_that_ran_without_gradient_first(decoder, ids) -> None:
    model = recurrent(decoder).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, num_steps=(3, 1)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()


def test_the_prelude_learns_through_its_output_in_the_last_steps(decoder, ids) -> None:
    model = recurrent(decoder).train()
    model(ids, labels=ids, num_steps=(4, 1)).loss.backward()
    assert depth_of(model).prelude[0].ffn.down_proj.weight.grad.abs().sum() > 0


def test_labels_are_shifted_once(decoder, ids) -> None:
    model = recurrent(decoder)
    output = model(ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_training_passes_draw_steps_and_noise_anew_and_evaluation_does_not(decoder, ids) -> None:
    model = recurrent(decoder, mean_recurrence=6).train()
    outputs = [model(ids, output_latent_states=True) for _ in range(12)]
    assert len({int(output.num_steps[0, 0]) for output in outputs}) > 3
    assert not torch.equal(outputs[0].latent_states[0], outputs[1].latent_states[0])
    assert not torch.equal(outputs[0].latent_states[0][0], outputs[0].latent_states[0][1])
    model.eval()
    assert {int(model(ids).num_steps[0, 0]) for _ in range(3)} == {6}


def test_passes_without_gradient_do_not_move_the_draw_of_training(decoder, ids) -> None:
    model = recurrent(decoder, mean_recurrence=6).train()
    with torch.no_grad():
        before = model(ids)
    assert torch.equal(before.logits, model(ids).logits)  # the same draw
    assert int(depth_of(model).passes) == 1


def test_the_draw_goes_on_where_a_saved_model_stopped(decoder, ids, tmp_path) -> None:
    model = recurrent(decoder, mean_recurrence=6).train()
    for _ in range(3):
        model(ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    for _ in range(4):
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(decoder, ids, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = recurrent(decoder).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, num_steps=(2, 3)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_padding_on_the_left_leaves_the_logits_unchanged_with_and_without_position_ids(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    alone = model(ids[1:2, 4:]).logits[0]
    for given in ({"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, {}):
        together = model(ids, attention_mask=mask, **given).logits[1, 4:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other(decoder) -> None:
    model = recurrent(decoder)
    first, second = torch.randint(3, 37, (1, 6)), torch.randint(3, 37, (1, 7))
    packed = model(torch.cat([first, second], 1), position_ids=torch.cat([torch.arange(6), torch.arange(7)])[None])
    torch.testing.assert_close(packed.logits[:, 6:], model(second).logits, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_model_gives_the_same_bits(decoder, ids, tmp_path) -> None:
    model = recurrent(decoder, num_steps=3, exit_criterion="latent_diff", exit_threshold=0.4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert torch.equal(model(ids).num_steps, loaded(ids).num_steps)


def test_bfloat16_weights_give_finite_loss_and_gradients(decoder, ids) -> None:
    model = recurrent(decoder).to(torch.bfloat16).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_lora_on_the_core_alone_trains_and_keeps_the_rest(decoder, ids) -> None:
    model = get_peft_model(
        recurrent(decoder), LoraConfig(r=2, target_modules=r".*core\.blocks.*_proj", task_type="CAUSAL_LM")
    ).train()
    before = model(ids, num_steps=4).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the second matrix of LoRA starts at 0, and with it the gradient of the first
        model(ids, labels=ids, num_steps=4).loss.backward()
        optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("layers.core.blocks" in name for name in trained)
    assert not torch.equal(model(ids, num_steps=4).logits, before)


def test_all_linear_lora_finds_the_adapter_of_the_core(decoder) -> None:
    model = get_peft_model(recurrent(decoder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any(name.endswith("core.adapter") for name in model.base_model.targeted_module_names)


def test_queries_and_keys_may_have_a_bias_alone(decoder, ids, tmp_path) -> None:
    model = recurrent(decoder, changes={"attention_bias": "qk"})
    biased = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert biased == {"q_proj", "k_proj"}
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    with pytest.raises(Exception, match="attention_bias is 'q'; choose True, False or 'qk'"):
        recurrent(decoder, changes={"attention_bias": "q"})


def test_takase_initialisation_has_the_spread_of_the_paper() -> None:
    config = ModularDecoderConfig(
        vocab_size=501, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, depth="recurrent",
        recurrent={"initialization": "takase", "mean_recurrence": 8, "embedding_scale": "sqrt_width"},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    block, std = model.model.layers.core.blocks[0], math.sqrt(2 / (5 * 64))
    effective = 1 + 8 * 2 + 1
    for weight, wanted in (
        (model.model.embed_tokens.weight, std),
        (block.mixer.q_proj.weight, std),
        (block.ffn.down_proj.weight, 1 / math.sqrt(5 * 64 * effective)),
    ):
        assert weight.std().item() == pytest.approx(wanted * 0.9866, rel=0.05)
        assert weight.abs().max() <= 3 * wanted


def test_embeddings_are_scaled_where_they_are_used(decoder, ids) -> None:
    plain = recurrent(decoder, changes={"tie_word_embeddings": False})
    scaled = recurrent(decoder, changes={"tie_word_embeddings": False}, embedding_scale="sqrt_width")
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(math.sqrt(24))
    torch.testing.assert_close(scaled(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_flops_count_the_core_as_often_as_it_runs(decoder) -> None:
    model, once = recurrent(decoder, mean_recurrence=9), recurrent(decoder, mean_recurrence=1)
    core = sum(p.numel() for p in depth_of(model).core.parameters() if p.dim() == 2)
    attention = 2 * 4 * 6 * 4 * 11  # two layers, 4 * heads * width * length each
    assert flops_per_token(model, 11) - flops_per_token(once, 11) == 8 * (2 * core + attention)


def test_training_flops_charge_steps_without_gradient_a_third(decoder) -> None:
    model = recurrent(decoder, mean_recurrence=9, backprop_depth=4, train_recurrence="fixed")
    once = recurrent(decoder, mean_recurrence=1, train_recurrence="fixed")
    core = sum(p.numel() for p in depth_of(model).core.parameters() if p.dim() == 2)
    one_run = 2 * core + 2 * 4 * 6 * 4 * 11
    found = flops_per_token(model, 11, training=True) - flops_per_token(once, 11, training=True)
    assert found == pytest.approx((4 + 5 / 3 - 1) * one_run)
    assert flops_per_token(once, 11, training=True) == flops_per_token(once, 11)


def test_sequence_classifier_runs_on_recurrent_depth(decoder, padded) -> None:
    model = AutoModelForSequenceClassification.from_config(
        ModularDecoderConfig(**{**recurrent(decoder).config.to_dict(), "num_labels": 3})
    ).eval()
    assert model(padded[0], attention_mask=padded[1]).logits.shape == (3, 3)


def test_padding_runs_no_steps_with_and_without_exits(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    for options in ({}, {"exit_criterion": "latent_diff", "exit_threshold": 0.0}):
        assert torch.equal(model(ids, attention_mask=mask, **options).num_steps, 5 * mask)


def test_hidden_states_are_recorded_at_every_step(decoder, ids) -> None:
    states = recurrent(decoder)(ids, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 1 + 5 * 2 + 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"core_layers": 3}, "they must add up to it"),
        ({"coda_layers": None}, "give all three or none"),
        ({"mean_recurrence": 0}, "mean_recurrence is 0; it must be a whole number of at least 1"),
        ({"injection": "gate"}, "recurrent.injection is 'gate'; choose one of 'concat', 'add'"),
        ({"exit_criterion": "entropy"}, "recurrent.exit_criterion is 'entropy'"),
        ({"exit_criterion": "kl", "kv_slots": 4, "min_steps": 2}, "give min_steps=4 or more"),
        ({"state_std": -1.0}, "recurrent.state_std is -1.0"),
        ({"exit_threshold": -0.1}, "recurrent.exit_threshold is -0.1"),
        ({"loops": 3}, r"recurrent holds unknown keys \['loops'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused_early(decoder, settings: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):  # strict configurations wrap the ValueError
        recurrent(decoder, **settings)


@pytest.mark.parametrize("num_steps", [0, -2, True, 2.0, (1,), (0, 0), (-1, 3)])
def test_numbers_of_steps_that_cannot_work_are_refused(decoder, ids, num_steps) -> None:
    with pytest.raises(ValueError, match="num_steps is"):
        recurrent(decoder)(ids, num_steps=num_steps)


def test_a_model_without_recurrent_depth_has_no_steps_to_choose(decoder) -> None:
    with pytest.raises(ValueError, match="has no recurrent depth"):
        decoder().with_steps(3)


@pytest.mark.slow
def test_compiled_blocks_have_no_graph_break_and_equal_gradients(ids) -> None:
    config = ModularDecoderConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, depth="recurrent",
        recurrent={"mean_recurrence": 3, "state_init": "zero"},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    model(ids, labels=ids, num_steps=3).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    depth = depth_of(model)
    for block in (*depth.prelude, *depth.core.blocks, *depth.coda):
        block.compile(fullgraph=True)
    model(ids, labels=ids, num_steps=3).loss.backward()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_for_other_numbers_of_steps(decoder, ids) -> None:
    model, plain = recurrent(decoder).train(), recurrent(decoder).train()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, frames = torch.compile(model, backend=counter), []
    for steps in range(1, 9):
        output = compiled(ids, labels=ids, num_steps=steps)
        torch.testing.assert_close(output.loss, plain(ids, labels=ids, num_steps=steps).loss, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames[2:] == [frames[2]] * 6  # from three steps on, some have no gradient
    torch._dynamo.reset()
