"""Eviction in existing models: every way of using one under budgets, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from tests.models.conftest import GREEDY, SIZES
from tests.models.test_eviction import by_steps
from trialist.models import (
    calibrate_budgets,
    disable_eviction,
    enable_eviction,
    enable_selective_attention,
    get_budgets,
    load_model,
    set_budgets,
)
from trialist.models.eviction import swap
from trialist.models.eviction.cache import UNDO_WINDOW, cache_bytes
from trialist.models.eviction.policies import Recency
from trialist.models.masks import visible_columns

MODELS = ["decoder", "llama", "qwen2", "gpt2"]
SETTINGS = {"recency": {"policy": "recency", "sinks": 1}, "h2o": {"policy": "h2o"}}
BUDGETS = [4, 6]
setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def standard(decoder, family):
    def build(name: str, **changes):  # type: ignore[no-untyped-def]
        return decoder("full_attention", "full_attention", **changes) if name == "decoder" else family(name, **changes)

    return build


@setting
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_are_those_of_the_definition_in_every_layer(
    standard, padded, monkeypatch, name: str, options: dict
) -> None:
    model = enable_eviction(standard(name).double(), budgets=BUDGETS, **options)
    ids, mask = padded
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    seen = []

    def naive(attend, query, key, attention_mask, *, scaling, policy, budget, layer):  # type: ignore[no-untyped-def]
        B, _, T, _ = query.shape
        visible = visible_columns(attention_mask)[:, 0].expand(B, T, T)
        seen.append(budget)
        value = next(
            cell.cell_contents for cell, name in zip(attend.__closure__, attend.__code__.co_freevars) if name == "value"
        )
        return by_steps(query, key, value, visible, budget, scaling, policy)[0], None

    monkeypatch.setattr(swap, "attend_evicting", naive)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert seen == BUDGETS
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@setting
@pytest.mark.parametrize(("name", "implementation"), [*((name, "sdpa") for name in MODELS), ("llama", "eager")])
def test_every_way_of_generating_equals_generating_without_a_cache(
    standard, padded, name: str, implementation: str, options: dict
) -> None:
    changes = {} if name == "decoder" else {"implementation": implementation}
    model = enable_eviction(standard(name, **changes), budgets=BUDGETS, **options)
    model = model if implementation == "eager" else model.double()  # eager attention takes its softmax in float32
    ids, mask = padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for chunks in ({}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 7}):
        result = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **chunks, **GREEDY)
        assert torch.equal(result.sequences, uncached), chunks
        layers = result.past_key_values.layers
        assert [layer.keys.shape[2] for layer in layers] == [budget + 1 for budget in BUDGETS]
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)
    ]
    assert torch.equal(*beams)
    lookup = model.generate(ids[:1], prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY)
    assert torch.equal(lookup, uncached[:1])


@setting
@pytest.mark.parametrize("budgets", [None, 30])
@pytest.mark.parametrize("name", ["decoder", "gpt2"])
def test_budgets_that_hold_everything_change_no_bit(standard, padded, name: str, budgets, options: dict) -> None:
    model, (ids, mask) = standard(name), padded
    full = {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    logits, tokens = model(ids, attention_mask=mask).logits, model.generate(ids, **full)
    enable_eviction(model, budgets=budgets, **options)
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    again = model.generate(ids, **full)
    assert torch.equal(again.sequences, tokens.sequences)
    assert all(map(torch.equal, again.logits, tokens.logits))


@setting
def test_disabling_restores_the_model_bit_for_bit(standard, padded, options: dict) -> None:
    model, (ids, mask) = standard("llama"), padded
    before = model(ids, attention_mask=mask).logits
    enable_eviction(model, budgets=4, **options)
    assert (model(ids, attention_mask=mask).logits - before)[mask.bool()].abs().max() > 0.1
    disable_eviction(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert not hasattr(model.config, "eviction")


@setting
def test_settings_survive_saving_and_loading(standard, padded, tmp_path, options: dict) -> None:
    model, (ids, mask) = enable_eviction(standard("llama"), budgets=[None, 4], **options), padded
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert loaded.config.eviction == model.config.eviction


@setting
def test_memory_of_evicted_tokens_is_free(standard, options: dict) -> None:
    model = enable_eviction(standard("llama", max_position_embeddings=200), budgets=[8, None], **options)
    ids = torch.randint(3, 37, (2, 151), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == 8 + UNDO_WINDOW  # until the next call
        model(ids[:, 150:], past_key_values=cache)
    assert cache.get_seq_length() == 151
    B, G, D = 2, 3, 4
    rows = G if options["policy"] == "h2o" else 1
    notes = 2 * 4 if options["policy"] == "h2o" else 0  # the scores, and those before the latest token
    entry = 2 * G * D * 4 + rows * (4 + notes)
    assert cache_bytes(cache) == B * (9 * entry + 8 * rows * 4 + 151 * 2 * G * D * 4)


def test_budgets_belong_to_the_layers_in_the_order_in_which_these_are_named(standard) -> None:
    model = enable_eviction(standard("llama", num_hidden_layers=3), "recency", [12, 6], layers=[2, 0])
    assert get_budgets(model) == [6, 12]
    assert (model.config.eviction["layers"], model.config.eviction["budgets"]) == ([2, 0], [12, 6])
    set_budgets(model, [7, 9])
    assert model.config.eviction["budgets"] == [9, 7]


def test_no_layers_is_the_untouched_model(standard, padded) -> None:
    model = standard("llama")
    before = model(padded[0]).logits
    enable_eviction(model, "h2o", 4, layers=[])
    assert torch.equal(model(padded[0]).logits, before)
    assert not hasattr(model.config, "eviction")
    enable_eviction(model, "h2o", 4)


@pytest.mark.parametrize("enable", [enable_eviction, enable_selective_attention])
def test_another_implementation_of_attention_behind_the_back_of_a_swap_is_refused(standard, padded, enable) -> None:
    model, (ids, mask) = enable(standard("llama"), budgets=4), padded
    logits, name = model(ids, attention_mask=mask).logits, model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="is enabled and the model runs attn_implementation='sdpa'"):
        model(ids, attention_mask=mask)
    model.set_attn_implementation(name.replace("sdpa", "eager"))
    real = mask.bool()
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], logits[real], rtol=1e-4, atol=1e-4)


@setting
def test_budgets_may_be_taken_away_and_given_back_while_a_cache_is_filled(standard, padded, options: dict) -> None:
    model, ids = enable_eviction(standard("llama").double(), budgets=BUDGETS, **options), padded[0]
    cache, parts = DynamicCache(config=model.config), (slice(0, 6), slice(6, 7), slice(7, 9), slice(9, 11))
    with torch.no_grad():
        for part, budgets in zip(parts, (BUDGETS, BUDGETS, None, BUDGETS)):
            set_budgets(model, budgets)
            model(ids[:, part], past_key_values=cache)
            sizes = [layer.keys.shape[2] for layer in cache.layers]
            if budgets is None:  # what is alive stays, and two tokens come
                assert sizes == [budget + 2 for budget in BUDGETS]
    assert sizes == [budget + 4 for budget in BUDGETS]
    for layer in cache.layers:
        layer._drop()
    assert [layer.keys.shape[2] for layer in cache.layers] == BUDGETS
    assert all(bool((score >= 0).all()) for layer in cache.layers for score in layer.scores)


@setting
@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_from_which_tokens_were_evicted_is_refused_once_eviction_is_disabled(
    standard, padded, options: dict, new: int
) -> None:
    model, ids = enable_eviction(standard("llama"), budgets=4, **options), padded[0]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    disable_eviction(model)
    with pytest.raises(
        ValueError, match="tokens were evicted from the given cache and its model does not evict any more"
    ):
        model(ids[:, :new], past_key_values=cache)


@setting
def test_a_static_cache_that_the_budget_holds_is_as_good_as_any(standard, padded, options: dict) -> None:
    model, (ids, mask) = standard("llama"), padded
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    enable_eviction(model, budgets=[30, None], **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY), expected)


@setting
@pytest.mark.parametrize("operation", ["repeat", "select", "reorder"])
def test_rows_keep_their_own_tokens_when_the_batch_moves(standard, options: dict, operation: str) -> None:
    model = enable_eviction(standard("llama").double(), budgets=BUDGETS, **options)
    ids = torch.randint(3, 37, (2, 11), generator=torch.Generator().manual_seed(4))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, 9:10], past_key_values=cache)
        rows = {"repeat": [0, 0, 1, 1], "select": [1], "reorder": [1, 1]}[operation]
        if operation == "repeat":
            cache.batch_repeat_interleave(2)
        elif operation == "select":
            cache.batch_select_indices(torch.tensor(rows))
        else:
            cache.reorder_cache(torch.tensor(rows))
        logits = model(ids[rows, 10:], past_key_values=cache).logits
        expected = model(ids[rows], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@setting
def test_sampling_with_a_cache_draws_the_tokens_that_sampling_without_draws(standard, padded, options: dict) -> None:
    model, (ids, mask) = enable_eviction(standard("llama").double(), budgets=BUDGETS, **options), padded
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        sampling = {**GREEDY, "do_sample": True, "temperature": 3.0, "num_return_sequences": 2}
        drawn.append(model.generate(ids, attention_mask=mask, use_cache=cached, **sampling))
    assert torch.equal(*drawn)


@setting
@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_a_lora_model_decodes_under_budgets_as_it_scores(standard, padded, name: str, options: dict) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model, (ids, mask) = get_peft_model(standard(name).double(), lora).eval(), padded
    with torch.no_grad():
        for index, parameter in enumerate(p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
    enable_eviction(model, budgets=BUDGETS, **options)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), uncached)
    assert sum(calibrate_budgets(model, ids, total=12, step=2, progress=False)) == 12


@setting
def test_half_precision_keeps_its_scores_in_float32_and_its_budgets(standard, padded, options: dict) -> None:
    model, ids = enable_eviction(standard("llama").bfloat16(), budgets=BUDGETS, **options), padded[0]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert logits.isfinite().all()
    for layer, budget in zip(cache.layers, BUDGETS):
        assert (layer.keys.dtype, layer.keys.shape[2]) == (torch.bfloat16, budget + 1)
        assert all(score.dtype == torch.float32 for score in layer.scores)


@pytest.mark.slow
@setting
def test_a_compiled_block_has_no_graph_break_and_computes_the_same(standard, padded, options: dict) -> None:
    model, ids = enable_eviction(standard("llama"), budgets=BUDGETS, **options), padded[0]
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_the_attention_that_is_left(standard, padded) -> None:
    model = enable_eviction(standard("llama"), budgets=4).train()
    model(padded[0], labels=padded[0]).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "h20"}, "policy 'h20' is unknown; choose one of recency, h2o"),
        ({"policy": "h2o", "sinks": 4}, "policy 'h2o' has no option sinks; it has recent_share"),
        ({"policy": Recency(), "sinks": 4}, "give them to the object"),
        ({"policy": "recency", "budgets": 4}, "sinks is 4; give 0 or more, and fewer than the budget of 4"),
        ({"recent_share": 1.5, "budgets": 4}, "recent_share is 1.5"),
        ({"budgets": [4]}, "names 1 budgets for 2 layers"),
        ({"layers": [7], "budgets": 4}, r"layers \[7\] are not attention layers"),
        ({"layers": [0, 0], "budgets": [4, 8]}, r"layers is \[0, 0\], which names a layer twice"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_the_model_untouched(standard, padded, arguments, words: str) -> None:
    model = standard("llama")
    before = model(padded[0]).logits
    with pytest.raises(ValueError, match=words):
        enable_eviction(model, **arguments)
    assert torch.equal(model(padded[0]).logits, before)


def test_what_cannot_be_evicted_from_is_refused_with_words(standard, padded) -> None:
    import transformers

    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        enable_eviction(
            transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8)), budgets=4
        )
    with pytest.raises(ValueError, match=r"beside the standard attention of layers \[0\]; pass layers=\[1\]"):
        enable_eviction(enable_selective_attention(standard("llama"), layers=[1]), layers=[0, 1], budgets=4)
    model = enable_eviction(standard("llama"), budgets=4)
    with pytest.raises(ValueError, match="enabled already"):
        enable_eviction(model, budgets=4)
    with pytest.raises(ValueError, match="a budget of 4 tokens would free nothing"):
        model.generate(padded[0], cache_implementation="static", **GREEDY)
