from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from tests.models.conftest import GREEDY
from trialist.models import (
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    RecurrentStateLayer,
    flops_per_token,
    initialize_,
    selected_logprobs,
)
from trialist.models.documents import keeps_documents_apart
from trialist.models.recurrent.mixer import CausalConvolution, tokens_since

VARIANTS = {
    "min_gru": {"layer_types": ["min_gru"] * 2},
    "min_lstm-no-conv": {"layer_types": ["min_lstm"] * 2, "min_rnn": {"conv_kernel": None, "expansion": 1.5}},
    "gru": {"layer_types": ["gru"] * 2},
    "recurrent-first": {"layer_types": ["min_gru", "full_attention"], "min_rnn": {"activation": "tanh", "bias": False}},
    "attention-first": {"layer_types": ["selective_attention", "min_lstm"], "norm_style": "sandwich"},
    "one-tap": {"layer_types": ["min_gru", "gru"], "min_rnn": {"conv_kernel": 1}},
    "attention-behind-a-convolution": {"layer_types": ["conv_attention", "min_gru"], "min_rnn": {"conv_kernel": 3}},
}  # fmt: skip
variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@variant
def test_cached_greedy_generation_equals_teacher_forcing(decoder, padded, changes: dict) -> None:
    model, (ids, mask) = decoder(**changes), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 1}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    forced = model(uncached[:1]).logits.argmax(-1)[:, 10:-1]
    assert torch.equal(uncached[:1, 11:], forced)


@variant
def test_beams_sampling_and_several_answers_are_the_same_with_and_without_cache(decoder, padded, changes: dict) -> None:
    model, (ids, mask) = decoder(**changes), padded
    ways = {
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 2},
    }
    for options in ways.values():
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **options}))
        assert torch.equal(*found)


@variant
def test_padding_on_the_left_leaves_the_logits_unchanged(decoder, padded, changes: dict) -> None:
    model, (ids, mask) = decoder(**changes), padded
    alone = model(ids[1:2, 4:]).logits[0]
    ids = ids.masked_fill(mask == 0, 9)  # unlike the padding token, whose embedding is zero
    counted = mask.cumsum(-1) - 1
    for position_ids in (counted.clamp(min=0), counted.masked_fill(mask == 0, 1), None):
        together = model(ids, attention_mask=mask, position_ids=position_ids).logits[1, 4:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@variant
def test_packed_documents_do_not_see_each_other(decoder, changes: dict) -> None:
    model = decoder(**changes)
    first, second, third = (torch.randint(3, 37, (1, length)) for length in (6, 2, 7))
    positions = torch.cat([torch.arange(6), torch.arange(2), torch.arange(7)])[None]
    packed = model(torch.cat([first, second, third], 1), position_ids=positions).logits
    for document, place in ((first, slice(0, 6)), (second, slice(6, 8)), (third, slice(8, 15))):
        torch.testing.assert_close(packed[:, place], model(document).logits, rtol=1e-4, atol=1e-4)


@variant
def test_a_document_starts_wherever_positions_do_not_go_on_by_one(decoder, changes: dict) -> None:
    """As the masks of transformers have it, where there is neither a padding mask nor a cache."""
    model, ids = decoder(**changes), torch.randint(3, 37, (1, 12))
    positions = torch.cat([torch.arange(6), torch.arange(3, 9)])[None]
    packed = model(ids, position_ids=positions).logits
    alone = model(ids[:, 6:], position_ids=positions[:, 6:]).logits
    torch.testing.assert_close(packed[:, 6:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ["min_gru", "gru", "conv_attention"])
def test_masks_that_say_who_sees_whom_are_refused_where_a_layer_cannot_honour_them(decoder, mixer: str) -> None:
    model, ids = decoder(mixer, "full_attention"), torch.randint(3, 37, (1, 8))
    visible = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for mask, words in ((visible, r"of shape \(1, 1, 8, 8\)"), ({"full_attention": visible}, "a dict")):
        with pytest.raises(ValueError, match=words + ".* takes a padding mask"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="takes a padding mask"):
        selected_logprobs(model, ids, visible)


def test_documents_that_start_inside_a_cache_are_refused_where_attention_would_see_the_one_before(decoder) -> None:
    ids, positions = torch.randint(3, 37, (1, 8)), torch.cat([torch.arange(5), torch.arange(3)])[None]
    for names in (("min_gru", "full_attention"), ("full_attention", "full_attention")):
        model = decoder(*names)
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="pack documents without a cache"):
            model(ids, position_ids=positions, past_key_values=cache)
        model(ids, position_ids=torch.arange(8)[None], past_key_values=cache)
        with pytest.raises(ValueError, match="pack documents without a cache"):
            model(ids, position_ids=torch.arange(8)[None], past_key_values=cache)
        model(ids, position_ids=torch.arange(8, 16)[None], past_key_values=cache)


def test_packed_documents_pass_a_cache_of_recurrent_layers_one_by_one(decoder) -> None:
    model, ids = decoder("min_gru", "gru"), torch.randint(3, 37, (1, 8))
    cache = DynamicCache(config=model.config)
    positions = torch.cat([torch.arange(5), torch.arange(3)])[None]
    found = model(ids, position_ids=positions, past_key_values=cache).logits[:, 5:]
    torch.testing.assert_close(found, model(ids[:, 5:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 4])
def test_starts_of_documents_are_looked_for_once_a_pass_and_not_at_all_without_positions(
    decoder, monkeypatch, layers: int
) -> None:
    """Looking waits for the accelerator."""
    model, ids, looks, look = decoder(*["min_gru"] * layers), torch.randint(3, 37, (1, 8)), [], Tensor.any
    monkeypatch.setattr(
        Tensor, "any", lambda self, *arguments, **named: looks.append(1) or look(self, *arguments, **named)
    )
    model(ids)
    assert not looks
    model(ids, position_ids=torch.arange(8)[None])
    assert len(looks) == 1
    looks.clear()
    model.generate(ids, **GREEDY)
    assert len(looks) < 2 * GREEDY["max_new_tokens"]  # generate's own


@pytest.mark.parametrize("mixer", ["min_gru", "min_lstm"])
def test_log_space_scan_decodes_a_padded_batch_as_the_direct_one(decoder, padded, mixer: str) -> None:
    ids, mask = padded
    tokens = [
        decoder(mixer, mixer, min_rnn={"backend": backend}).generate(ids, attention_mask=mask, **GREEDY)
        for backend in ("log_scan", "torch")
    ]
    assert torch.equal(*tokens)


def test_padding_that_comes_token_by_token_leaves_no_trace(decoder, padded) -> None:
    model, (ids, mask) = decoder("min_gru", "full_attention", "gru"), padded
    ids = ids.masked_fill(mask == 0, 9)
    cache = DynamicCache(config=model.config)
    logits = [
        model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(11)
    ]
    torch.testing.assert_close(torch.cat(logits, 1)[1, 4:], model(ids[1:2, 4:]).logits[0], rtol=1e-4, atol=1e-4)


def test_a_new_document_in_a_used_cache_starts_from_nothing(decoder) -> None:
    model = decoder("min_gru", "min_lstm", "gru")
    cache = DynamicCache(config=model.config)
    first, second = torch.randint(3, 37, (2, 6)), torch.randint(3, 37, (2, 5))
    model(first, past_key_values=cache)
    found = model(second, position_ids=torch.arange(5).expand(2, -1), past_key_values=cache).logits
    torch.testing.assert_close(found, model(second).logits, rtol=1e-4, atol=1e-4)


@variant
def test_packing_is_seen_to_keep_documents_apart(decoder, changes: dict) -> None:
    with torch.no_grad():
        assert keeps_documents_apart(decoder(**changes), 1, torch.device("cpu"))


@variant
def test_saved_and_loaded_model_gives_the_same_bits(decoder, padded, tmp_path, changes: dict) -> None:
    model = decoder(**changes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(padded[0]).logits, loaded(padded[0]).logits)


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


@variant
def test_future_tokens_change_no_earlier_logit(decoder, padded, changes: dict) -> None:
    model, ids = decoder(**changes), padded[0]
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    torch.testing.assert_close(model(ids).logits[:, :6], model(changed).logits[:, :6])
    assert not torch.allclose(model(ids).logits[:, 7:], model(changed).logits[:, 7:], atol=1e-3)


@variant
def test_bfloat16_autocast_gives_finite_gradients_and_a_float32_state(decoder, padded, changes: dict) -> None:
    model = decoder(**changes).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(padded[0], labels=padded[0], use_cache=True)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    states = [layer.state for layer in output.past_key_values.layers if isinstance(layer, RecurrentStateLayer)]
    assert states
    assert all(state.dtype == torch.float32 for state in states)


def test_lora_finds_the_linear_layers_and_the_adapted_model_generates(decoder, padded) -> None:
    model = get_peft_model(
        decoder("min_gru", "min_lstm"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    targets = {name.split(".")[-1] for name in model.base_model.targeted_module_names}
    assert targets == {"in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
    ids, mask = padded
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), uncached)


def test_assisted_decoding_is_refused_because_the_model_has_a_state(decoder, padded) -> None:
    assert not decoder("full_attention", "selective_attention")._is_stateful
    with pytest.raises(ValueError, match="not supported with stateful models"):
        decoder("full_attention", "min_gru").generate(padded[0][:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_initial_gate_bias_survives_the_initialisation_of_the_model(decoder) -> None:
    model = decoder("min_gru", "min_lstm", min_rnn={"gate_bias_init": [2, 3], "expansion": 0.125})  # 3 channels
    kept = torch.tensor([2.0, 6**0.5, 3.0]).sub(1).log()
    gru, lstm = (layer.mixer.cell.in_proj.bias for layer in model.model.layers)
    torch.testing.assert_close(gru.detach(), torch.cat([-kept, torch.zeros(3)]))
    torch.testing.assert_close(lstm.detach(), torch.cat([kept, -kept, torch.zeros(3)]))


def test_gru_weights_are_drawn_and_depend_on_the_seed_only(decoder) -> None:
    first, again, other = (decoder("gru", "gru", seed=seed).model.layers[0].mixer.cell.rnn for seed in (0, 0, 1))
    assert torch.equal(first.weight_hh_l0, again.weight_hh_l0)
    assert not torch.equal(first.weight_hh_l0, other.weight_hh_l0)
    square = first.weight_hh_l0.T @ first.weight_hh_l0  # orthogonal, then sharpened twelvefold
    torch.testing.assert_close(square, 144 * torch.eye(24), rtol=1e-4, atol=1e-4)


def convolve(x: Tensor, weight: Tensor, reset: list[int]) -> Tensor:
    """One row, number by number; a token looks back to the start of its document at most."""
    y = torch.zeros_like(x)
    for t in range(len(x)):
        start = max([0, *(place for place in reset if place <= t)])
        for n in range(len(weight)):
            if t - n >= start:
                y[t] += weight[n] * x[t - n]
    return y


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_is_causal_and_stops_at_the_start_of_a_document(taps: int) -> None:
    conv, x = CausalConvolution(3, taps), torch.randn(2, 9, 3)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 2] = reset[0, 3] = reset[1, 7] = True
    y, _ = conv(x, reset=reset)
    torch.testing.assert_close(y[0], convolve(x[0], conv.weight, [2, 3]))
    torch.testing.assert_close(y[1], convolve(x[1], conv.weight, [7]))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_in_pieces_equals_the_whole(taps: int) -> None:
    conv, x = CausalConvolution(3, taps), torch.randn(2, 9, 3)
    whole, tail = conv(x)
    pieces, before = [], None
    for piece in x.split([1, 2, 1, 5], 1):
        y, before = conv(piece, before)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(before, tail)


def test_tokens_since_a_restart_count_up_and_are_large_before_the_first() -> None:
    reset = torch.tensor([[False, True, False, False, True, False]])
    assert tokens_since(reset)[0, 1:].tolist() == [0, 1, 2, 0, 1]
    assert tokens_since(reset)[0, 0] > 10**9


def test_a_convolution_of_zeros_is_no_convolution(decoder, padded) -> None:
    with_conv, without = decoder("min_gru"), decoder("min_gru", min_rnn={"conv_kernel": None})
    with_conv.model.layers[0].mixer.conv.weight.data.zero_()
    missing = without.load_state_dict(with_conv.state_dict(), strict=False)
    assert missing.unexpected_keys == ["model.layers.0.mixer.conv.weight"]
    assert torch.equal(with_conv(padded[0]).logits, without(padded[0]).logits)


def test_flops_count_the_projections_the_recurrence_and_the_convolution(decoder) -> None:
    width, inner, tokens = 24, 36, 37
    shared = 3 * width * 40 + width * tokens  # feed-forward and head
    for name, gates, recurrent in (("min_gru", 2, 0), ("min_lstm", 3, 0), ("gru", 3, 3 * inner * inner)):
        model = decoder(name, min_rnn={"expansion": 1.5, "conv_kernel": 4})
        scan = 0 if name == "gru" else inner
        products = shared + gates * width * inner + recurrent + inner * width + 4 * width + scan
        assert flops_per_token(model, 16) == 2 * products


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"conv_kernel": 0}, "conv_kernel is 0"),
        ({"conv_kernel": 2.5}, "conv_kernel is 2.5"),
        ({"expansion": 0.0}, "expansion is 0.0"),
        ({"expansion": 0.001}, "of a width of 256 it leaves no channel"),
        ({"expansion": float("inf")}, "must be a finite number"),
        ({"expansion": "2"}, "expansion is '2'; it must be a finite number"),
        ({"conv_kernel": True}, "conv_kernel is True"),
        ({"bias": "no"}, "bias is 'no'; it must be True or False"),
        ({"gate_bias_init": "12"}, "gate_bias_init is '12'"),
        ({"gate_bias_init": [2, float("inf")]}, "shortest, longest"),
        ({"activation": "relu"}, "choose one of g, identity, tanh"),
        ({"backend": "log_scan", "activation": "tanh"}, "needs positive states"),
        ({"gate_bias_init": [1]}, "shortest, longest"),
        ({"kernel": 4}, r"unknown keys \['kernel'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_the_configuration_is_made(settings: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):
        ModularDecoderConfig(num_hidden_layers=1, layer_types=["min_gru"], min_rnn=settings)


@pytest.mark.parametrize(
    ("mixers", "settings", "unread"),
    [
        (["gru"], {"activation": "tanh", "gate_bias_init": [2, 99], "expansion": 2.0}, "activation, gate_bias_init"),
        (["conv_attention"], {"expansion": 2.0, "conv_kernel": 2}, "expansion"),
        (["conv_attention", "gru"], {"backend": "torch"}, "backend"),
        (["full_attention"], {"activation": "nonsense"}, "activation"),
    ],
)  # fmt: skip
def test_settings_that_no_layer_reads_are_refused(mixers: list[str], settings: dict, unread: str) -> None:
    with pytest.raises(Exception, match=f"min_rnn holds {unread}, which nothing reads"):
        ModularDecoderConfig(num_hidden_layers=len(mixers), layer_types=mixers, min_rnn=settings)
    ModularDecoderConfig(num_hidden_layers=2, layer_types=["gru", "min_gru"], min_rnn={"activation": "tanh"})


def test_attention_behind_no_convolution_is_refused() -> None:
    with pytest.raises(Exception, match="without a convolution is full_attention"):
        ModularDecoderConfig(num_hidden_layers=1, layer_types=["conv_attention"], min_rnn={"conv_kernel": None})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch", "log_scan"])
def test_compiled_model_gives_the_logits_of_the_plain_one(decoder, backend: str) -> None:
    model, ids = decoder("min_gru", "min_lstm", min_rnn={"backend": backend}), torch.randint(3, 37, (2, 9))
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["min_gru", "min_lstm"])
def test_compiled_block_has_no_graph_break_and_equal_gradients(kind: str, backend: str) -> None:
    config = ModularDecoderConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        layer_types=[kind] * 2, min_rnn={"backend": backend},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    ids = torch.randint(3, 37, (2, 9))
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None].expand(2, -1)
    model(ids, labels=ids, position_ids=positions).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for block in model.model.layers:
        block.compile(fullgraph=True)
    model(ids, labels=ids, position_ids=positions).loss.backward()
    for parameter, gradient in zip(model.parameters(), plain):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_linear_attention_layer_of_transformers_would_forget_the_state(decoder, padded) -> None:
    """Why there is a layer of our own: without a convolution beside it, the stock layer never says that it has a state."""
    stock = LinearAttentionLayer()
    stock.update_recurrent_state(torch.ones(2, 3))
    known = stock.has_previous_state  # one for each state, in earlier versions of transformers one for all
    assert not any(known.values() if isinstance(known, dict) else [known])
    model = decoder("min_gru", "min_gru", min_rnn={"conv_kernel": None})
    cache = DynamicCache(config=model.config)
    model(padded[0][:, :6], past_key_values=cache)
    states = [layer.state.clone() for layer in cache.layers]
    continued = model(padded[0][:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(continued, model(padded[0]).logits[:, 6:], rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(layer.state, state) for layer, state in zip(cache.layers, states))
