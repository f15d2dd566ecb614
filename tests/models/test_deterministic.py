"""Scores in training mode that are those of evaluation, of models without a loop; those with one have tests of their own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.conftest import EXPERTS
from trialist.models import PEER, deterministic_scoring, selected_logprobs, swap_ffn


@pytest.fixture
def model(family, decoder):
    def build(kind: str):
        torch.manual_seed(3)
        if kind == "decoder":
            return decoder(ffn_types=["peer", "swiglu"], peer=EXPERTS, attention_dropout=0.3)
        swapped = swap_ffn(family("gpt2" if kind == "gpt2" else "llama", attention_dropout=0.3), [1], **EXPERTS)
        if kind != "adapted":
            return swapped
        lora = LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["mlp"], lora_dropout=0.5, init_lora_weights=False
        )
        return get_peft_model(swapped, lora).eval()

    return build


kinds = pytest.mark.parametrize("kind", ["decoder", "llama", "gpt2", "adapted"])


@kinds
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_scores_in_training_mode_are_those_of_evaluation(model, padded, kind: str, checkpointing: bool) -> None:
    scored, (ids, mask) = model(kind), padded
    expected = selected_logprobs(scored, ids, mask)
    scored.train()
    if checkpointing:
        scored.gradient_checkpointing_enable()
    before = {name: buffer.clone() for name, buffer in scored.named_buffers()}
    with deterministic_scoring(scored):
        for _ in range(2):
            scored.train()  # as trainers do before each step
            torch.testing.assert_close(selected_logprobs(scored, ids, mask), expected)
        torch.testing.assert_close(selected_logprobs(scored, ids[:1], mask[:1]), expected[:1], rtol=1e-4, atol=1e-4)
        selected_logprobs(scored, ids, mask).sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in scored.named_buffers())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in scored.parameters())
    assert all(module.training for module in scored.modules())
    assert not torch.allclose(selected_logprobs(scored, ids, mask), expected)


def test_a_layer_of_its_own_is_held_and_let_go() -> None:
    torch.manual_seed(0)
    layer, x = PEER(12, **EXPERTS), torch.randn(9, 12)
    expected = layer.eval()(x)
    with deterministic_scoring(layer.train()):
        assert torch.equal(layer(x), expected)
    assert all(module.training for module in layer.modules())
    assert not torch.equal(layer(x), expected)


def test_a_model_that_goes_into_evaluation_meanwhile_stays_there(model, padded) -> None:
    scored = model("llama").train()
    with deterministic_scoring(scored):
        scored(padded[0])
        scored.eval()
    assert not any(module.training for module in scored.modules())


def test_no_hook_stays_behind(model) -> None:
    scored = model("llama")
    hooks = [len(module._forward_pre_hooks) for module in scored.modules()]
    with pytest.raises(KeyError), deterministic_scoring(scored):
        raise KeyError
    assert [len(module._forward_pre_hooks) for module in scored.modules()] == hooks


def test_a_number_of_steps_without_a_loop_is_refused(model) -> None:
    with pytest.raises(ValueError, match="has no recurrent depth"), deterministic_scoring(model("llama"), 3):
        pass


@pytest.mark.slow
def test_a_model_that_was_compiled_before_is_held_too(model, padded) -> None:
    scored = model("decoder")
    compiled = torch.compile(scored.train(), backend="eager")
    compiled(*padded)
    expected = scored.eval()(*padded).logits
    with deterministic_scoring(compiled):
        scored.train()
        found = compiled(*padded).logits
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)
