"""Log-probabilities of models of recurrent depth: those of evaluation, in any mode, batch and pass."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.recurrent import recurrent
from trialist.models import deterministic_scoring, selected_logprobs
from trialist.models.recurrent_depth.settings import THRESHOLDS
from trialist.models.recurrent_depth.steps import depth_of

PEER = {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_dim": 8}
CHANGES = {
    "plain": {},
    "peer in the core": {"ffn_types": ["swiglu", "peer", "peer", "swiglu"], "peer": PEER},
    "attention dropout": {"attention_dropout": 0.3},
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_scores_in_training_mode_are_those_of_evaluation(decoder, ids, changes: dict) -> None:
    model = recurrent(decoder, changes=changes, mean_recurrence=6)
    expected = selected_logprobs(model, ids)
    model.train()
    with deterministic_scoring(model):
        found = selected_logprobs(model, ids)
        torch.testing.assert_close(found, expected)
        assert torch.equal(selected_logprobs(model, ids), found)
        torch.testing.assert_close(selected_logprobs(model, ids[1:2]), expected[1:2], rtol=1e-4, atol=1e-4)
        assert found.requires_grad
        model.train()  # as trainers do before each step
        assert torch.equal(selected_logprobs(model, ids), found)
    assert all(module.training for module in model.modules())
    assert not torch.equal(selected_logprobs(model, ids), expected)


def test_scores_can_be_held_at_another_number_of_steps(decoder, ids) -> None:
    model = recurrent(decoder)
    expected = selected_logprobs(model, ids, arguments={"num_steps": 3})
    with deterministic_scoring(model.train(), 3):
        torch.testing.assert_close(selected_logprobs(model, ids), expected)
        with deterministic_scoring(model, 4):
            assert not torch.equal(selected_logprobs(model, ids), expected)
        torch.testing.assert_close(selected_logprobs(model, ids), expected)


def test_modules_that_stood_still_before_still_do_afterwards(decoder, ids) -> None:
    model = recurrent(decoder).train()
    depth_of(model).prelude.eval()
    with deterministic_scoring(model):
        model(ids)
    assert not any(module.training for module in depth_of(model).prelude.modules())
    assert all(module.training for module in depth_of(model).core.modules())
    model.eval()
    with deterministic_scoring(model.train()):
        model(ids)
        model.eval()
    assert not any(module.training for module in model.modules())


def test_dropout_of_adapters_is_off_while_scores_are_held(decoder, ids) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(recurrent(decoder), lora).train()
    with deterministic_scoring(model):
        assert torch.equal(selected_logprobs(model, ids), selected_logprobs(model, ids))
    assert any(isinstance(module, torch.nn.Dropout) and module.training for module in model.modules())


def test_activations_are_still_checkpointed_while_scores_are_held(decoder, ids) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = recurrent(decoder, changes=CHANGES["peer in the core"]).train()
        passes = []
        depth_of(model).core.blocks[0].mixer.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        with deterministic_scoring(model, 2):
            selected_logprobs(model, ids)
            passes.clear()
            selected_logprobs(model, ids).sum().backward()
        assert len(passes) == (4 if checkpointing else 2)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("criterion", THRESHOLDS)
def test_a_model_with_a_configured_exit_is_scored_at_all_steps(decoder, ids, criterion: str) -> None:
    early = 0 if criterion == "argmax" else math.inf
    model = recurrent(decoder, exit_criterion=criterion, exit_threshold=early)
    assert model(ids).num_steps.unique().tolist() == [1]
    expected = selected_logprobs(recurrent(decoder), ids)
    torch.testing.assert_close(selected_logprobs(model, ids), expected)
    with deterministic_scoring(model.train()):
        torch.testing.assert_close(selected_logprobs(model, ids), expected)
        assert model(ids).num_steps.unique().tolist() == [5]


def test_scores_with_early_exits_are_there_for_whoever_asks(decoder, ids) -> None:
    model = recurrent(decoder)
    options = {"exit_criterion": "latent_diff", "exit_threshold": 0.5}
    logits = model(ids, **options).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(selected_logprobs(model, ids, arguments=options), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(selected_logprobs(model, ids), expected)


def test_log_probabilities_can_be_scored_while_training(decoder, ids) -> None:
    model = recurrent(decoder, mean_recurrence=6).train()  # the first call compares two passes of the model
    assert selected_logprobs(model, ids).requires_grad
