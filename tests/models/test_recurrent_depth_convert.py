from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config

from tests.models.recurrent import GREEDY
from trialist.models.recurrent_depth.convert import to_recurrent
from trialist.models.recurrent_depth.steps import depth_of, set_mean_recurrence

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SOURCES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, rope_theta=500.0),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def random_model(config) -> torch.nn.Module:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8).add_(0.1 * torch.randn_like(parameter))  # biases and norms must show too
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("config", SOURCES.values(), ids=SOURCES)
def test_one_step_of_all_layers_is_the_source_model(config, ids) -> None:
    source = random_model(config)
    ours = to_recurrent(source, 2, 3, 1, mean_recurrence=4)
    torch.testing.assert_close(ours(ids, num_steps=1).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_one_step_of_some_layers_is_the_source_with_the_others_left_out(ids) -> None:
    source = random_model(SOURCES["llama"])
    ours = to_recurrent(source, 1, 2, 1)
    source.model.layers = torch.nn.ModuleList([source.model.layers[index] for index in (0, 2, 3, 5)])
    torch.testing.assert_close(ours(ids, num_steps=1).logits, source(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_the_core_may_be_taken_from_anywhere_between(ids) -> None:
    source = random_model(SOURCES["llama"])
    ours = to_recurrent(source, 1, 2, 1, core_start=3)
    source.model.layers = torch.nn.ModuleList([source.model.layers[index] for index in (0, 3, 4, 5)])
    torch.testing.assert_close(ours(ids, num_steps=1).logits, source(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_stack_of_our_own_keeps_its_mixers(decoder, ids) -> None:
    source = decoder("full_attention", "selective_attention", "full_attention")
    ours = to_recurrent(source, 1, 1, 1)
    assert ours.config.layer_types == ["full_attention", "selective_attention", "full_attention"]
    torch.testing.assert_close(ours(ids, num_steps=1).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_state_is_ignored_at_first_and_learnt_from_then_on(ids) -> None:
    ours = to_recurrent(random_model(SOURCES["llama"]), 2, 2, 2, mean_recurrence=3, backprop_depth=3)
    torch.testing.assert_close(ours(ids, num_steps=1).logits, ours(ids, num_steps=3).logits, rtol=1e-4, atol=1e-4)
    ours.train()(ids, labels=ids, num_steps=3).loss.backward()
    assert depth_of(ours).core.adapter.weight.grad[:, :24].abs().sum() > 0


def test_the_new_model_shares_no_tensor_generates_and_reloads(ids, tmp_path) -> None:
    source = random_model(SOURCES["qwen2"])
    ours = to_recurrent(source, 2, 3, 1, mean_recurrence=2)
    own = {parameter.data_ptr() for parameter in source.parameters()}
    assert not own & {parameter.data_ptr() for parameter in ours.parameters()}
    ours.generation_config.num_steps = 2
    assert not hasattr(source.generation_config, "num_steps")
    del ours.generation_config.num_steps
    written = ours.generate(ids, num_steps=1, **GREEDY)
    assert torch.equal(written, source.generate(ids, **GREEDY))
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(ids, num_steps=1, **GREEDY), written)


def test_dtype_and_mode_of_the_source_are_kept() -> None:
    ours = to_recurrent(random_model(SOURCES["llama"]).to(torch.bfloat16).train(), 2, 2, 2)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours.training


def test_the_mean_number_of_steps_can_rise_during_training(ids) -> None:
    ours = to_recurrent(random_model(SOURCES["llama"]), 2, 2, 2, mean_recurrence=1)
    set_mean_recurrence(ours, 6)
    assert ours(ids).num_steps.unique().tolist() == [6]
    with pytest.raises(ValueError, match="mean_recurrence is 0"):
        set_mean_recurrence(ours, 0)


@pytest.mark.parametrize("name", ["gpt2", "gemma", "qwen3", "smollm3"])
def test_families_that_the_decoder_cannot_hold_are_refused_by_name(family, name: str) -> None:
    model = family(name)
    with pytest.raises(ValueError, match=f"not {type(model).__name__}"):
        to_recurrent(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**SIZES, mlp_bias=True), "has no place for mlp.down_proj, mlp.gate_proj, mlp.up_proj"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "its feed-forward uses 'gelu', ours silu"),
        (MistralConfig(**SIZES, sliding_window=8), "sliding window"),
    ],
)
def test_models_that_compute_something_else_are_refused_with_the_reason(config, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_recurrent(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("counts", [(3, 3, 3), (0, 7, 0), (2, 0, 2), (-1, 2, 2)])
def test_counts_that_do_not_fit_are_refused(counts: tuple) -> None:
    with pytest.raises(ValueError, match=r"do not fit into the 6 layers|must be a whole number"):
        to_recurrent(LlamaForCausalLM(SOURCES["llama"]), *counts)


def test_a_recurrent_model_is_not_converted_again(ids) -> None:
    ours = to_recurrent(random_model(SOURCES["llama"]), 2, 2, 2)
    with pytest.raises(ValueError, match="has depth='recurrent' already"):
        to_recurrent(ours)


def test_an_adapter_is_needed_to_start_from_the_source() -> None:
    with pytest.raises(ValueError, match="take injection='concat'"):
        to_recurrent(LlamaForCausalLM(SOURCES["llama"]), 1, 2, 1, injection="add")
