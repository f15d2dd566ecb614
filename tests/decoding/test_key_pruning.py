"""Options that store less in the cache, through the model's own `generate`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from trialist.decoding import KeyPruning, TokenEviction, ValueQuantization, generate, prepare
from trialist.decoding.compact_cache.flags import CompactCacheFlags
from trialist.models import HeavyHitters, SnapKV, compact_attention, initialize_, load_model

from ..models.conftest import FAMILIES, GREEDY, SIZES, VOCABULARY, sharpen
from .test_options import Collect, Watch

KEYS = KeyPruning(keep=0.5, recent=2, every=3)
VALUES = ValueQuantization(bits=8, group=4, recent=2, every=3)
TOKENS = TokenEviction(budget=8, policy=SnapKV(window=3, kernel=3), every=2)
OPTIONS = {
    "keys": [KEYS],
    "values": [VALUES],
    "tokens": [TOKENS],
    "all": [KEYS, VALUES, TokenEviction(budget=8, policy="h2o", every=2)],
}
NEUTRAL = [KeyPruning(), ValueQuantization(), TokenEviction()]


@pytest.fixture(scope="module")
def llama():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**{**SIZES, "head_dim": 8, "hidden_size": 48})
    )
    initialize_(model, 0)
    sharpen(model, 6.0)
    return model.eval()


def prompt(B=2, T=15, padded=4):
    ids = torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(model, options, inputs, tokens):
    """Greedy search with the cache that the options make, one forward pass after another."""
    from trialist.models import CompactCache

    names = {KeyPruning: "keys", ValueQuantization: "values", TokenEviction: "eviction"}
    cache = CompactCache(model, **{names[type(option)]: option for option in options})
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    new = ids
    with torch.no_grad(), compact_attention(model):
        for _ in range(tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
            logits = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
            new = logits.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return ids


@pytest.mark.parametrize("name", OPTIONS)
def test_generate_is_greedy_search_by_hand_and_the_model_is_as_before(llama, name):
    inputs = prompt()
    plain = llama.generate(**inputs, **GREEDY)
    found = generate(llama, OPTIONS[name], **inputs, **GREEDY)
    assert torch.equal(found, by_hand(llama, OPTIONS[name], inputs, 9))
    assert llama.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert torch.equal(llama.generate(**inputs, **GREEDY), plain)


def test_neutral_settings_leave_the_arguments_as_they_are(llama):
    inputs = prompt()
    assert prepare(llama, NEUTRAL, inputs) == inputs
    assert torch.equal(generate(llama, NEUTRAL, **inputs, **GREEDY), llama.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_that_loses_nothing_gives_the_tokens_of_plain_generate(llama, name, more):
    """The whole machinery runs, and what it stores is whole: 8 of 8 channels, 8 bits, room for all tokens."""
    lossless = {
        "keys": KeyPruning(keep=0.99, recent=2, every=3),
        "tokens": TokenEviction(budget=12, policy=HeavyHitters(1.0), every=2),
    }
    lossless = [lossless["keys"], TokenEviction(budget=100, policy="h2o")] if name != "keys" else [lossless["keys"]]
    inputs, options = prompt(), {**GREEDY, **more}
    torch.manual_seed(0)
    plain = llama.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(llama, lossless, **inputs, **options), plain)
    rows = plain.shape[0]
    torch.manual_seed(0)
    assert generate(llama, OPTIONS[name], **inputs, **options).shape[0] == rows


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_in_a_batch_is_the_row_alone(llama, name):
    inputs = prompt()
    together = generate(llama, OPTIONS[name], **inputs, **GREEDY)
    alone = generate(llama, OPTIONS[name], inputs["input_ids"][:1, 4:], **GREEDY)
    assert torch.equal(together[:1, 4:], alone)


def test_the_cache_comes_back_and_goes_on_in_the_next_turn(llama):
    inputs = prompt(padded=0)
    first = generate(llama, [KEYS], **inputs, **GREEDY, return_dict_in_generate=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 15 + 9 - 1
    assert cache.layers[0].pruned > 0
    again = torch.cat([first.sequences, torch.tensor([[4, 8, 5], [9, 9, 3]])], 1)
    second = generate(llama, [KEYS], again, past_key_values=cache, **GREEDY)
    assert second.shape[1] == 15 + 9 + 3 + 9
    assert cache.get_seq_length() == second.shape[1] - 1
    with pytest.raises(ValueError, match="start from an empty cache"):
        generate(llama, [dataclasses.replace(KEYS, keep=0.25)], second, past_key_values=cache, **GREEDY)


def test_prepared_arguments_may_be_used_again(llama):
    inputs = prompt()
    prepared = prepare(llama, [KEYS], {**inputs, **GREEDY})
    assert torch.equal(llama.generate(**prepared), llama.generate(**prepared))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_prompt_in_chunks_is_the_prompt(llama, name):
    inputs = prompt()
    expected = generate(llama, OPTIONS[name], **inputs, **GREEDY)
    found = generate(llama, OPTIONS[name], **inputs, **GREEDY, prefill_chunk_size=6)
    assert torch.equal(found, expected)


def test_drafts_are_verified_against_the_pruned_cache(llama):
    ids = prompt(padded=0)["input_ids"][:1]
    for more in ({"assistant_model": llama}, {"prompt_lookup_num_tokens": 3}):
        whole = [KeyPruning(keep=0.99, recent=2, every=3)]
        assert torch.equal(generate(llama, whole, ids, **more, **GREEDY), llama.generate(ids, **GREEDY))
        assert generate(llama, [KEYS, VALUES], ids, **more, **GREEDY).shape[1] == 24
        with pytest.raises(ValueError, match="drafts tokens and takes some back"):
            generate(llama, [TOKENS], ids, **more, **GREEDY)


def test_a_streamer_gets_every_token(llama):
    ids, streamer = prompt(padded=0)["input_ids"][:1], Collect()
    found = generate(llama, [KEYS], ids, streamer=streamer, **GREEDY)
    assert streamer.tokens[:-1] == found[0].tolist()


def test_other_loops_stand_around_it(llama):
    inputs, watch = prompt(), Watch([])
    expected = generate(llama, [KEYS], **inputs, **GREEDY)
    assert torch.equal(generate(llama, [watch, KEYS], **inputs, **GREEDY), expected)
    assert len(watch.seen) == 1


def test_an_adapter_generates_as_its_merged_model(llama):
    import copy

    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    inputs = prompt()
    found = generate(model, [KEYS, VALUES], **inputs, **GREEDY)
    assert torch.equal(found, generate(model.merge_and_unload(), [KEYS, VALUES], **inputs, **GREEDY))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_generates(name):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    sharpen(model)
    inputs = prompt()
    plain = model.generate(**inputs, **GREEDY)
    whole = [KeyPruning(keep=0.99, recent=2, every=3)]
    assert torch.equal(generate(model, whole, **inputs, **GREEDY), plain)
    found = generate(model, [KEYS], **inputs, **GREEDY, return_dict_in_generate=True)
    assert all(report.key_channels == 2 for report in found.past_key_values.report())


def test_the_model_is_as_before_after_an_error(llama):
    def fail(*args):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        generate(llama, [KEYS], **prompt(), stopping_criteria=[fail], **GREEDY)
    assert llama.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_a_second_owner_of_a_part_is_refused_with_both_names(llama):
    @dataclasses.dataclass(frozen=True)
    class Other(KeyPruning):
        pass

    with pytest.raises(ValueError, match="KeyPruning and Other both decide which channels of the keys are kept"):
        prepare(llama, [KEYS, Other(keep=0.3)], prompt())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"use_cache": False}, "use_cache is False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache is False"),
    ],
    ids=["no cache", "static", "configuration"],
)
def test_arguments_that_leave_no_such_cache_are_refused(llama, more, words):
    with pytest.raises(ValueError, match=words):
        generate(llama, [KEYS], **prompt(), **more)


def test_caches_that_were_filled_otherwise_are_refused(llama):
    cache = DynamicCache(config=llama.config)
    inputs = prompt(padded=0)
    with torch.no_grad():
        llama(inputs["input_ids"][:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="5 tokens in the given cache"):
        generate(llama, [KEYS], **inputs, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="here is a StaticCache"):
        generate(llama, [KEYS], **inputs, past_key_values=transformers.StaticCache(llama.config, 40), **GREEDY)


def test_flags_are_neutral_by_default_and_make_the_options_that_they_name(llama):
    assert CompactCacheFlags().options(llama, None, ["a"]) == []
    flags = CompactCacheFlags(
        key_keep=0.6, key_score="random", key_recent=5, value_bits=4, cache_budget=40, cache_policy="h2o"
    )
    assert flags.options(llama, None, ["a"]) == [
        KeyPruning(keep=0.6, score="random", recent=5),
        ValueQuantization(bits=4, group=8),
        TokenEviction(budget=40, policy="h2o"),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"key_keep": 0.0}, "--key-keep 0.0"),
        ({"key_keep": 1.5}, "--key-keep 1.5"),
        ({"key_recent": -1}, "--key-recent -1"),
        ({"cache_budget": -3}, "--cache-budget -3"),
        ({"cache_budget": 5}, "--cache-budget 5: budget is 5; give at least 33"),
    ],
)
def test_flags_out_of_range_are_named(llama, flags, words):
    with pytest.raises(ValueError, match=words):
        CompactCacheFlags(**flags).options(llama, None, ["a"])


@pytest.mark.asset
def test_a_real_model_stores_fewer_bytes_and_goes_on_in_words():
    try:
        model = load_model("smollm2-135m-instruct")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ids = torch.randint(1000, 40_000, (1, 300), generator=torch.Generator().manual_seed(0))
    found = generate(
        model, [KeyPruning(keep=0.5)], ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    cache = found.past_key_values
    dense = sum(report.dense_bytes for report in cache.report())
    assert 0.75 < cache.nbytes() / dense < 0.85  # a quarter of what is not recent
    whole = generate(model, [KeyPruning(keep=0.999, recent=0)], ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(whole, model.generate(ids, max_new_tokens=4, do_sample=False))
