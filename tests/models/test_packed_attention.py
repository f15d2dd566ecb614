"""Packed attention: the same numbers as the standard attention, for every mask, family and type."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from trialist.decoding import KeyPruning, generate
from trialist.models import disable_packed_attention, enable_eviction, enable_packed_attention, packed_attention

from .conftest import FAMILIES, GREEDY, SIZES, VOCABULARY, sharpen

FAMILY_NAMES = ["llama", "qwen2", "qwen3", "gemma", "smollm3", "gpt2", "gptneox"]


def naive(query, key, value, mask, scaling):
    """Head by head, query by query, in float64."""
    B, H, T, _ = query.shape
    output = torch.zeros(B, T, H, value.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // key.shape[1])
            for t in range(T):
                logits = (key[b, g].double() @ query[b, h, t].double()) * scaling
                if mask is not None:
                    row = mask[b % mask.shape[0], h % mask.shape[1], t]
                    logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row.double()
                output[b, t, h] = logits.softmax(-1) @ value[b, g].double()
    return output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "bool by head", "additive"])
@pytest.mark.parametrize("products", [True, False], ids=["products", "fused"])
def test_it_is_the_naive_attention_in_every_type_and_mask(dtype, heads, mask, products, monkeypatch):
    monkeypatch.setattr("trialist.models.packed_attention.by_products", lambda rows: products)
    (H, G), generator = heads, torch.Generator().manual_seed(0)
    T = 1 if mask == "none" else 3
    query, key, value = (
        torch.randn(2, n, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for n, length, width in ((H, T, 8), (G, 11, 8), (G, 11, 8))
    )
    given = None
    if mask != "none":
        given = torch.rand(2, H if mask == "bool by head" else 1, T, 11, generator=generator) > 0.4
        given[..., 0] = True
    if mask == "additive":
        given = torch.zeros_like(given, dtype=dtype).masked_fill(~given, torch.finfo(dtype).min)
    expected = naive(query, key, value, given, 0.3)
    found = packed_attention.packed_attention(query, key, value, given, 0.3)
    assert found.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_generation_is_that_of_sdpa_with_left_padding(family, padded, name):
    ids, mask = padded
    model = family(name)
    plain = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    enable_packed_attention(model)
    packed = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert model.config._attn_implementation == "trialist_packed"
    assert torch.equal(plain.sequences, packed.sequences)
    torch.testing.assert_close(torch.stack(packed.logits), torch.stack(plain.logits), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "more", [{"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_static_caches_beams_and_drafts_go_on_as_ever(family, padded, more):
    ids, mask = padded
    if "prompt_lookup_num_tokens" in more:
        ids, mask = ids[:1], mask[:1]
    model = family("llama")
    plain = model.generate(ids, attention_mask=mask, **more, **GREEDY)
    assert torch.equal(enable_packed_attention(model).generate(ids, attention_mask=mask, **more, **GREEDY), plain)


def test_a_sliding_window_stays_a_window():
    torch.manual_seed(1)
    config = transformers.MistralConfig(**SIZES, sliding_window=5)
    model = transformers.MistralForCausalLM(config).eval()
    sharpen(model)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    plain = model.generate(ids, **GREEDY)
    assert torch.equal(enable_packed_attention(model).generate(ids, **GREEDY), plain)


def test_decoding_takes_the_packed_path_and_prompts_the_standard_one(family, monkeypatch):
    lengths = []
    original = packed_attention.packed_attention
    monkeypatch.setattr(
        packed_attention,
        "packed_attention",
        lambda query, *rest: lengths.append(query.shape[2]) or original(query, *rest),
    )
    model = enable_packed_attention(family("llama"))
    model.generate(torch.tensor([[5, 6, 7, 8]]), **{**GREEDY, "max_new_tokens": 3})
    assert lengths == [1] * 2 * 2  # two layers, two decoded tokens after the prompt


def test_training_with_dropout_is_left_to_sdpa(family):
    model = family("llama", attention_dropout=0.5).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.manual_seed(0)
    plain = model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(enable_packed_attention(model)(ids).logits, plain)


def test_disabling_restores_sdpa_and_enabling_twice_is_once(family):
    model = family("llama")
    assert enable_packed_attention(enable_packed_attention(model)) is model
    assert disable_packed_attention(model).config._attn_implementation == "sdpa"
    assert disable_packed_attention(model).config._attn_implementation == "sdpa"


def test_eviction_and_key_pruning_stand_on_packed_attention(family, padded):
    ids, mask = padded
    model = enable_eviction(family("llama"), "h2o", 6)
    plain = model.generate(ids, attention_mask=mask, **GREEDY)
    packed = enable_eviction(enable_packed_attention(family("llama")), "h2o", 6)
    assert packed.config._attn_implementation == "evicting_trialist_packed"
    assert torch.equal(packed.generate(ids, attention_mask=mask, **GREEDY), plain)
    model = family("llama")
    options = [KeyPruning(keep=0.5, recent=2, every=3)]
    plain = generate(model, options, ids, attention_mask=mask, **GREEDY)
    enable_packed_attention(model)
    assert torch.equal(generate(model, options, ids, attention_mask=mask, **GREEDY), plain)
    assert model.config._attn_implementation == "trialist_packed"


def test_models_that_it_cannot_serve_are_refused(family):
    softcapped = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES))
    with pytest.raises(ValueError, match="soft-caps"):
        enable_packed_attention(softcapped)
    softcapped.config._attn_implementation = "trialist_packed"
    with pytest.raises(ValueError, match=r"soft-capped attention logits.*eager"):
        softcapped(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="stands in for 'sdpa'"):
        enable_packed_attention(family("llama", "eager"))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=37, hidden_size=24, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="nothing to pack"):
        enable_packed_attention(bloom)


def test_adapters_pass_it_on_to_their_base(family):
    import peft

    model = peft.get_peft_model(family("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(input_ids=ids, **GREEDY)
    enable_packed_attention(model)
    assert isinstance(model, nn.Module)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain)


def test_the_families_are_all_tried():
    assert set(FAMILY_NAMES) == set(FAMILIES)
