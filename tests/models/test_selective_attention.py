from __future__ import annotations

import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.models.conftest import FAMILIES, GREEDY, SIZES, sharpen
from trialist.models import disable_selective_attention, enable_selective_attention, load_model
from trialist.models.masks import first_tokens
from trialist.models.selective_attention.cache import SelectiveCacheLayer
from trialist.models.selective_attention.mixer import attend_selectively


def by_loop(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, head: int = 0) -> tuple[Tensor, Tensor]:
    """The formula as it is written, one number at a time: output (B, T, H, D) and F (B, T, T); visible (B, T, T)."""
    B, H, T, D = query.shape
    shared = H // key.shape[1]
    output, penalties = torch.zeros(B, T, H, D, dtype=query.dtype), torch.zeros(B, T, T, dtype=query.dtype)
    for b in range(B):
        first = {min(j for j in range(T) if visible[b, i, j]) for i in range(T) if visible[b, i].any()}
        total = [0.0] * T
        for i in range(T):
            columns = [j for j in range(T) if visible[b, i, j]]
            penalties[b, i] = torch.tensor(total)
            for h in range(H):
                logits = [float(query[b, h, i] @ key[b, h // shared, j]) / math.sqrt(D) for j in columns]
                weights = [math.exp(logit - total[j]) for logit, j in zip(logits, columns)]
                for weight, j in zip(weights, columns):
                    output[b, i, h] += weight / sum(weights) * value[b, h // shared, j]
            for j in columns:
                if j != i and j not in first:
                    total[j] += max(0.0, float(query[b, head, i] @ key[b, head // shared, j]) / math.sqrt(D))
    return output, penalties


def random_states(B: int, H: int, G: int, T: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((B, H, T, D), (B, G, T, D), (B, G, T, D))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 for shape in shapes]


def causal(B: int, T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T).clone()


def penalty_rows(query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """F of every query (B, T, T), read from a cache that is fed one token at a time."""
    layer, rows = SelectiveCacheLayer(), []
    for i in range(query.shape[2]):
        keys, values = layer.update(key[:, :, i : i + 1], key[:, :, i : i + 1])
        rows.append(torch.zeros(len(query), query.shape[2], dtype=query.dtype))
        if layer.penalty is not None:
            rows[-1][:, : i + 1] = layer.penalty
        mask = None if visible is None else visible[:, None, i : i + 1, : i + 1]
        attend_selectively(query[:, :, i : i + 1], keys, values, mask, scaling=query.shape[-1] ** -0.5, layer=layer)
    return torch.stack(rows, 1)


LAYOUTS = {"plain": None, "left padding": "left", "packed": "packed", "right padding": "right", "hole": "hole"}


def layout(kind: str | None, B: int, T: int) -> Tensor:
    visible = causal(B, T)
    if kind == "left":
        visible[1, :, :3] = False
    elif kind == "right":
        visible[1, :, T - 2 :] = False
    elif kind == "hole":
        visible[1, :, 4] = False
    elif kind == "packed":
        visible[0, 4:, :4] = False
        visible[1, 2:, :2] = False
        visible[1, 7:, :7] = False
    return visible


@pytest.mark.parametrize("kind", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "float"])
def test_output_equals_a_loop_over_single_numbers(kind: str | None, additive: bool) -> None:
    query, key, value = random_states(2, 4, 2, 9, 4)
    visible = layout(kind, 2, 9)
    expected, _ = by_loop(query, key, value, visible)
    mask = visible[:, None]
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    output = attend_selectively(query, key, value, None if kind is None else mask, scaling=0.5)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("head", [0, 3])
def test_selector_head_uses_the_key_head_of_its_group(head: int) -> None:
    query, key, value = random_states(2, 4, 2, 7, 4)
    expected, _ = by_loop(query, key, value, causal(2, 7), head)
    torch.testing.assert_close(attend_selectively(query, key, value, None, scaling=0.5, selector_head=head), expected)


def test_penalty_never_touches_first_own_and_previous_token_and_never_falls() -> None:
    query, key, value = random_states(2, 4, 2, 9, 4)
    F = penalty_rows(query, key)
    torch.testing.assert_close(F, by_loop(query, key, value, causal(2, 9))[1])
    assert (F[:, :, 0] == 0).all()
    for i in range(1, 9):
        assert (F[:, i, i - 1 :] == 0).all()
        assert (F[:, i] >= F[:, i - 1]).all()
    assert F.max() > 1


def test_selections_do_not_cross_documents_in_a_packed_row() -> None:
    query, key, _ = random_states(2, 4, 2, 9, 4)
    visible = layout("packed", 2, 9)
    F = penalty_rows(query, key, visible)
    alone = penalty_rows(query[:1, :, 4:], key[:1, :, 4:])
    torch.testing.assert_close(F[:1, 4:, 4:], alone)


def test_a_selector_without_positive_logits_leaves_standard_attention() -> None:
    query, key, value = random_states(2, 4, 2, 9, 4)
    query[:, 0], key[:, 0] = -query[:, 0].abs(), key[:, 0].abs()
    standard = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_selectively(query, key, value, None, scaling=0.5), standard.transpose(1, 2))


def test_up_to_three_tokens_are_standard_attention_and_the_fourth_query_is_the_first_to_differ() -> None:
    query, key, value = random_states(2, 4, 2, 4, 4)
    query[:, 0], key[:, 0] = query[:, 0].abs(), key[:, 0].abs()
    standard = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    output = attend_selectively(query, key, value, None, scaling=0.5)
    torch.testing.assert_close(output[:, :3], standard.transpose(1, 2)[:, :3])
    assert (output[:, 3] - standard.transpose(1, 2)[:, 3]).abs().max() > 1e-3


def test_without_protection_the_first_token_is_selected_too() -> None:
    query, key, value = random_states(1, 4, 2, 9, 4)
    query[:, 0], key[:, 0] = query[:, 0].abs(), key[:, 0].abs()
    layer = SelectiveCacheLayer()
    keys, values = layer.update(key, value)
    attend_selectively(query, keys, values, None, scaling=0.5, protect_bos=False, layer=layer)
    assert layer.penalty[0, 0] > 0


def test_gradients_flow_through_the_penalty() -> None:
    query, key, value = random_states(1, 2, 1, 5, 2)
    states = [state.requires_grad_() for state in (query, key, value)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_selectively(q, k, v, None, scaling=0.7), states)


def test_first_tokens_are_the_first_visible_columns() -> None:
    visible = torch.cat([layout("left", 2, 9)[1:], layout("packed", 2, 9), torch.zeros(1, 9, 9, dtype=torch.bool)])
    marks = first_tokens(visible[:, None], 4, 9, visible.device)
    assert [row.nonzero().flatten().tolist() for row in marks] == [[3], [0, 4], [0, 2, 7], []]


def test_half_precision_keeps_the_penalty_in_float32() -> None:
    query, key, value = (state.bfloat16() for state in random_states(1, 2, 1, 300, 4))
    layer = SelectiveCacheLayer()
    output = attend_selectively(query, *layer.update(key, value), None, scaling=0.5, layer=layer)
    exact = penalty_of(*(state.double() for state in (query, key, value)))
    assert (output.dtype, layer.penalty.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(layer.penalty, exact.float(), rtol=5e-3, atol=0.2)


def penalty_of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """F after all queries (B, T), as one matrix expression in float64."""
    T = query.shape[2]
    selected = (query[:, 0] @ key[:, 0].transpose(-1, -2) * 0.5).relu().tril(-1)
    selected[:, :, 0] = 0
    return selected.sum(1).view(-1, T)


# --- the swap for existing models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation"), [*((name, "sdpa") for name in FAMILIES), ("llama", "eager")])
def test_every_way_of_decoding_equals_the_full_forward_pass(family, padded, name: str, implementation: str) -> None:
    model, (ids, mask) = enable_selective_attention(family(name, implementation)), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)
    ]
    assert torch.equal(*beams)
    lookup = model.generate(ids[:1], prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY)
    assert torch.equal(lookup, uncached[:1])


@pytest.mark.parametrize("name", FAMILIES)
def test_enabled_attention_changes_the_logits_and_disabling_restores_them_bit_for_bit(family, padded, name) -> None:
    model, (ids, mask) = family(name), padded
    before = model(ids, attention_mask=mask).logits
    enable_selective_attention(model)
    assert (model(ids, attention_mask=mask).logits - before)[mask.bool()].abs().max() > 0.1
    disable_selective_attention(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert not hasattr(model.config, "selective_attention")


def test_no_layers_is_the_unchanged_model_bit_for_bit(family, padded) -> None:
    model, ids = family("llama"), padded[0]
    before = model(ids).logits, model.generate(ids, **GREEDY)
    enable_selective_attention(model, layers=[])
    assert torch.equal(model(ids).logits, before[0])
    assert torch.equal(model.generate(ids, **GREEDY), before[1])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unchosen_layers_stay_standard(family, padded, implementation: str) -> None:
    model, ids = family("llama", implementation), padded[0]
    states = {}
    for layers in ([], [1]):
        enable_selective_attention(model, layers=layers)
        states[len(layers)] = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0][1], states[1][1])
    assert not torch.allclose(states[0][2], states[1][2])


def test_swapped_llama_equals_the_decoder_with_the_selective_mixer(decoder, padded) -> None:
    native = decoder("selective_attention", "selective_attention", selective={"selector_head": 5})
    swapped = decoder("full_attention", "full_attention")
    swapped.load_state_dict(native.state_dict())
    enable_selective_attention(swapped, selector_head=5)
    ids, mask = padded
    torch.testing.assert_close(swapped(ids, attention_mask=mask).logits, native(ids, attention_mask=mask).logits)


def test_packed_documents_are_independent_in_a_swapped_model(family) -> None:
    model = enable_selective_attention(family("llama"))
    first, second = torch.randint(3, 37, (1, 6)), torch.randint(3, 37, (1, 7))
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 6:], model(second).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_of_a_swapped_model(family, padded, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = enable_selective_attention(family(name, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(padded[0], labels=padded[0]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_lora_model_trains_and_decodes_selectively(family, padded) -> None:
    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    enable_selective_attention(model)
    ids, mask = padded
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), uncached)


def test_auto_takes_the_head_that_would_select_least(family, padded) -> None:
    model = family("llama")
    with torch.no_grad():
        for layer, head in zip(model.model.layers, (4, 1)):
            layer.self_attn.q_proj.weight.view(6, 4, -1)[head] *= 0.01
    enable_selective_attention(model, "auto", inputs=padded[0])
    assert model.config.selective_attention["selector_head"] == [4, 1]


def test_sampling_with_a_cache_draws_the_tokens_that_sampling_without_draws(family, padded) -> None:
    model, (ids, mask) = enable_selective_attention(family("llama")), padded
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {**GREEDY, "do_sample": True, "temperature": 3.0}
        drawn.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*drawn)


def test_assisted_generation_equals_plain_greedy_generation(family, padded) -> None:
    model, ids = enable_selective_attention(family("llama")), padded[0][:1]
    assistant = enable_selective_attention(family("llama"))
    with torch.no_grad():  # agrees often, and not always
        assistant.lm_head.weight.add_(torch.randn(assistant.lm_head.weight.shape) * 0.15)
    expected = model.generate(ids, **{**GREEDY, "max_new_tokens": 30})
    assisted = model.generate(ids, assistant_model=assistant, **{**GREEDY, "max_new_tokens": 30})
    assert torch.equal(assisted, expected)


REFUSED = {
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=37, d_model=24, d_ff=40, d_kv=4, num_layers=1, num_heads=2)
        ),
        "needs a causal decoder",
    ),
    "encoder": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
            )
        ),
        "is not causal",
    ),
    "own attention code": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=37, hidden_size=24, n_layer=1, n_head=2)
        ),
        "attention interface of transformers",
    ),
    "soft cap": (lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)), "soft-caps"),
    "sliding window": (
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8)),
        "sliding window of 8 tokens",
    ),
    "some sliding layers": (
        lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
            )
        ),
        r"pass layers=\[1\]",
    ),
    "cross attention": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=37, n_embd=24, n_layer=1, n_head=2, add_cross_attention=True)
        ),
        "cross attention is not supported",
    ),
}


@pytest.mark.parametrize(("build", "words"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_swapped_are_refused_with_words(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        enable_selective_attention(build())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"selector_head": 6}, "the model has heads 0 to 5"),
        ({"selector_head": [0, 1, 2]}, "names 3 heads for 2 layers"),
        ({"selector_head": "auto"}, "pass token ids as inputs="),
        ({"selector_head": "best"}, 'one head a layer, or "auto"'),
        ({"layers": [0, 7]}, r"layers \[7\] are not attention layers"),
        ({"layers": [1, 1]}, r"layers is \[1, 1\], which names a layer twice"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_the_model_untouched(family, padded, arguments, words: str) -> None:
    model = family("llama")
    before = model(padded[0]).logits
    with pytest.raises(ValueError, match=words):
        enable_selective_attention(model, **arguments)
    assert torch.equal(model(padded[0]).logits, before)


def test_full_layer_of_a_model_with_sliding_layers_can_be_chosen(padded) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    sharpen(model)
    ids, mask = padded
    before = model(ids, attention_mask=mask).logits
    enable_selective_attention(model, layers=[1])
    assert (model(ids, attention_mask=mask).logits - before)[mask.bool()].abs().max() > 0.01
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


def test_enabling_twice_is_refused(family) -> None:
    with pytest.raises(ValueError, match="enabled already"):
        enable_selective_attention(enable_selective_attention(family("llama")))


@pytest.mark.slow
def test_swapped_model_compiles_without_graph_break_and_computes_the_same(family, padded) -> None:
    model, ids = enable_selective_attention(family("llama")), padded[0]
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.asset
def test_a_real_instruct_model_decodes_selectively_with_and_without_cache() -> None:
    pytest.importorskip("gguf")
    try:
        model = load_model("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ids = torch.randint(3, 40000, (1, 40), generator=torch.Generator().manual_seed(0))
    enable_selective_attention(model, "auto", inputs=ids)
    uncached = model.generate(ids, use_cache=False, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), uncached)
