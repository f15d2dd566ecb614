from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.models.conftest import GREEDY
from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_

VARIANTS = {
    "full": {"layer_types": ["full_attention"] * 2},
    "selective": {"layer_types": ["selective_attention"] * 2},
    "mixed-sandwich": {"layer_types": ["full_attention", "selective_attention"], "norm_style": "sandwich"},
    "untied-eager": {"tie_word_embeddings": False, "attn_implementation": "eager"},
}
variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def as_llama(name: str) -> str:
    for ours, theirs in (("mixer_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
        name = name.replace(ours, theirs)
    return name.replace("mixer.", "self_attn.").replace("ffn.", "mlp.")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_full_attention_decoder_computes_the_logits_of_a_llama_with_its_weights(
    decoder, padded, implementation: str
) -> None:
    ours = decoder("full_attention", "full_attention", attn_implementation=implementation)
    fields = {key: value for key, value in ours.config.to_dict().items() if key in LlamaConfig().to_dict()}
    fields.pop("architectures")
    theirs = LlamaForCausalLM._from_config(
        LlamaConfig(**{**fields, "model_type": "llama"}), attn_implementation=implementation
    ).eval()
    missing = theirs.load_state_dict({as_llama(name): tensor for name, tensor in ours.state_dict().items()})
    assert not missing.missing_keys
    ids, mask = padded
    torch.testing.assert_close(
        ours(ids, attention_mask=mask).logits[mask.bool()], theirs(ids, attention_mask=mask).logits[mask.bool()]
    )


def test_sandwich_norm_normalises_the_residual_stream_after_every_block(decoder, padded) -> None:
    model = decoder(norm_style="sandwich")
    states = model(padded[0][:1], output_hidden_states=True).hidden_states
    for state in states[1:]:
        rms = state.pow(2).mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=1e-3)


def test_sandwich_block_norms_each_branch_before_and_after_its_addition(decoder, padded) -> None:
    model = decoder("full_attention", norm_style="sandwich")
    block, norms = model.model.layers[0], torch.linspace(0.5, 2, 24)
    with torch.no_grad():
        for power, norm in enumerate(
            (block.mixer_norm, block.mixer_stream_norm, block.ffn_norm, block.ffn_stream_norm)
        ):
            norm.weight.copy_(norms.roll(power))

    def rms(x: torch.Tensor, power: int) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norms.roll(power)

    x = torch.randn(2, 5, 24)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    middle = rms(x + block.mixer(rms(x, 0), positions)[0], 1)
    expected = rms(middle + block.ffn(rms(middle, 2)), 3)
    torch.testing.assert_close(block(x, position_embeddings=positions), expected)


@variant
def test_cached_greedy_generation_equals_uncached(decoder, padded, changes: dict) -> None:
    model, (ids, mask) = decoder(**changes), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options


@variant
def test_padding_on_the_left_leaves_the_logits_unchanged(decoder, padded, changes: dict) -> None:
    model, (ids, mask) = decoder(**changes), padded
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=position_ids).logits[1, 4:]
    alone = model(ids[1:2, 4:]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@variant
def test_packed_documents_do_not_see_each_other(decoder, changes: dict) -> None:
    model = decoder(**changes)
    first, second = torch.randint(3, 37, (1, 6)), torch.randint(3, 37, (1, 7))
    packed = model(torch.cat([first, second], 1), position_ids=torch.cat([torch.arange(6), torch.arange(7)])[None])
    torch.testing.assert_close(packed.logits[:, 6:], model(second).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.logits[:, :6], model(first).logits, rtol=1e-4, atol=1e-4)


@variant
def test_saved_and_loaded_model_gives_the_same_bits(decoder, padded, tmp_path, changes: dict) -> None:
    model = decoder(**changes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=changes.get("attn_implementation", "sdpa")
    ).eval()
    assert isinstance(loaded, ModularDecoderForCausalLM)
    assert torch.equal(model(padded[0]).logits, loaded(padded[0]).logits)
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(backbone(padded[0]).last_hidden_state, model.model(padded[0]).last_hidden_state)


@variant
def test_gradient_checkpointing_changes_no_gradient(decoder, padded, changes: dict) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = decoder(**changes).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(padded[0], labels=padded[0]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("tie", [True, False])
def test_head_and_embedding_are_one_tensor_exactly_when_tied(decoder, tie: bool) -> None:
    model = decoder(tie_word_embeddings=tie)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tie


def test_future_tokens_change_no_earlier_logit(decoder, padded) -> None:
    model, ids = decoder(), padded[0]
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    torch.testing.assert_close(model(ids).logits[:, :6], model(changed).logits[:, :6])


def test_unknown_keyword_arguments_are_ignored(decoder, padded) -> None:
    output = decoder()(padded[0], labels=padded[0], num_items_in_batch=torch.tensor(30), some_future_argument=1)
    assert torch.isfinite(output.loss)


def test_attentions_and_hidden_states_are_recorded_on_demand(decoder, padded) -> None:
    model = decoder("full_attention", "full_attention", attn_implementation="eager")
    output = model(padded[0], output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 6, 11, 11)] * 2


def test_sequence_classifier_scores_the_last_token_that_is_not_padding(decoder, padded) -> None:
    ids, mask = padded[0].flip(1), padded[1].flip(1)  # padding on the right
    model = AutoModelForSequenceClassification.from_config(
        ModularDecoderConfig(**{**decoder().config.to_dict(), "num_labels": 3})
    ).eval()
    together = model(ids, attention_mask=mask).logits
    alone = model(ids[1:2, :7]).logits
    assert together.shape == (3, 3)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_lora_finds_every_linear_layer_and_the_adapted_model_generates(decoder, padded) -> None:
    model = get_peft_model(decoder(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name.split(".")[-1] for name in model.base_model.targeted_module_names}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    ids, mask = padded
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), uncached)


def test_bfloat16_autocast_gives_finite_loss_and_gradients(decoder, padded) -> None:
    model = decoder().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(padded[0], labels=padded[0]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_two_token_inputs_or_none_are_refused(decoder, padded) -> None:
    model = decoder()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.model()


def test_beam_search_with_cache_equals_beam_search_without(decoder, padded) -> None:
    model, (ids, mask) = decoder(), padded
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=use_cache, **GREEDY)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full_attention", "selective_attention"])
def test_compiled_block_has_no_graph_break_and_equal_gradients(kind: str) -> None:
    config = ModularDecoderConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        layer_types=[kind] * 2,
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    ids = torch.randint(3, 37, (2, 9))
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for block in model.model.layers:
        block.compile(fullgraph=True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for parameter, gradient in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
