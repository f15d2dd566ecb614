"""Recency and heavy hitters on standard attention: a pass over many tokens is decoding them one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models.conftest import GREEDY, SIZES, layout, states
from trialist.models import disable_eviction, enable_eviction, enable_selective_attention, load_model
from trialist.models.eviction import swap
from trialist.models.eviction.cache import EvictingCacheLayer, cache_bytes
from trialist.models.eviction.policies import HeavyHitters, Recency, attend_evicting
from trialist.models.masks import visible_columns


def by_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    budget: int,
    scaling: float,
    policy: Recency | HeavyHitters,
) -> tuple[Tensor, list[list[list[int]]]]:
    """The definition, one number at a time: output (B, T, H, D) in float64, and what is alive at the end of each row and
    key/value head."""
    B, H, T, D = query.shape
    G = key.shape[1]
    q, k, v = (x.detach().double() for x in (query, key, value))
    output, ends = torch.zeros(B, T, H, D, dtype=torch.float64), []
    for b in range(B):
        rows = []
        for g in range(G):
            alive: list[int] = []
            received = [0.0] * T
            for i in range(T):
                if not visible[b, i, i]:
                    continue  # padding
                look = [j for j in alive if visible[b, i, j]] + [i]
                for h in range(g * H // G, (g + 1) * H // G):
                    weights = [math.exp(float(q[b, h, i] @ k[b, g, j]) * scaling) for j in look]
                    for j, weight in zip(look, weights):
                        output[b, i, h] += weight / sum(weights) * v[b, g, j]
                        received[j] += weight / sum(weights)
                alive.append(i)
                here = [j for j in alive if visible[b, i, j]]
                while len(here) > budget:
                    if isinstance(policy, Recency):
                        document = [j for j in range(T) if visible[b, i, j]]
                        gone = next(j for j in here if j not in document[: policy.sinks])
                    else:
                        recent = max(1, round(budget * policy.recent_share))
                        gone = min(here[: len(here) - recent], key=lambda j: (received[j], j))
                    alive.remove(gone)
                    here.remove(gone)
            rows.append([j for j in alive if visible[b, T - 1, j]])
        ends.append(rows)
    return output, ends


def evicting(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, policy, budget: int, layer=None
) -> Tensor:  # type: ignore[no-untyped-def]
    H, G = query.shape[1], keys.shape[1]

    def attend(mask: Tensor | None) -> tuple[Tensor, None]:
        shared = [x.repeat_interleave(H // G, 1) for x in (keys, values)]
        causal = mask is None and query.shape[2] > 1
        if mask is None and causal and keys.shape[2] > query.shape[2]:
            raise AssertionError("past keys need a mask")
        output = torch.nn.functional.scaled_dot_product_attention(query, *shared, mask, is_causal=causal, scale=0.5)
        return output.transpose(1, 2), None

    return attend_evicting(attend, query, keys, mask, scaling=0.5, policy=policy, budget=budget, layer=layer)[0]


POLICIES = [Recency(2), Recency(0), HeavyHitters(), HeavyHitters(0.0), HeavyHitters(1.0)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=str)


@policies
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole", "packed"])
@pytest.mark.parametrize("budget", [3, 6])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_full_pass_is_the_step_by_step_definition(policy, kind: str, budget: int, mask: str) -> None:
    query, key, value = states()
    visible = layout(kind)
    expected, _ = by_steps(query, key, value, visible, budget, 0.5, policy)
    given = visible[:, None]
    if mask == "float":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, torch.finfo(torch.float64).min)
    output = evicting(query, key, value, given, policy, budget)
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)


@policies
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [6, 1, 5, 1], [2, 4, 7]], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole"])
def test_pieces_give_the_definition_and_keep_its_survivors(policy, pieces: list[int], kind: str) -> None:
    query, key, value = states(seed=1)
    visible, budget = layout(kind), 5
    expected, ends = by_steps(query, key, value, visible, budget, 0.5, policy)
    layer, outputs, start = EvictingCacheLayer(), [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        mask = visible[:, None, part, : part.stop]
        keys, values = layer.update(key[:, :, part], value[:, :, part])
        outputs.append(evicting(query[:, :, part], keys, values, mask, policy, budget, layer))
        start += piece
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], expected[real], rtol=1e-10, atol=1e-10)
    layer._drop()
    assert layer.keys.shape[2] == budget
    for row, groups in enumerate(ends):
        for group in range(layer.columns.shape[1]):
            columns = layer.columns[row, group].long()
            assert [j for j in columns.tolist() if visible[row, -1, j]] == groups[group]
            assert torch.equal(layer.keys[row, group], key[row, group, columns])


def test_heavy_hitters_in_small_blocks_of_queries_are_the_same(monkeypatch) -> None:
    from trialist.models.eviction import policies as module

    query, key, value = states()
    mask = layout("left padding")[:, None]
    expected = evicting(query, key, value, mask, HeavyHitters(), 5)
    monkeypatch.setattr(module, "LOGITS", 2 * 4 * 13 * 3)
    torch.testing.assert_close(evicting(query, key, value, mask, HeavyHitters(), 5), expected)


def test_a_token_that_everyone_attends_to_stays_and_others_leave_with_age() -> None:
    query, key, value = states(B=1, H=1, G=1)
    key[...] = 0
    key[:, :, 3], query[...] = 4.0, 1.0
    layer = EvictingCacheLayer()
    evicting(query, *layer.update(key, value), None, HeavyHitters(0.5), 4, layer)
    layer._drop()
    assert layer.columns.tolist() == [[[0, 3, 11, 12]]]  # token 0 gathered attention before token 3 came


@pytest.mark.parametrize("removed", [1, 2, 3])
@policies
def test_crop_within_the_latest_call_takes_evictions_back(policy, removed: int) -> None:
    query, key, value = states(T=12)
    visible = layout("plain", T=12)
    visible[1, :, :3] = False

    def feed(layer: EvictingCacheLayer, pieces: list[int], start: int = 0) -> Tensor:
        output = query
        for piece in pieces:
            part = slice(start, start + piece)
            keys, values = layer.update(key[:, :, part], value[:, :, part])
            mask = visible[:, None, part, : part.stop]
            output = evicting(query[:, :, part], keys, values, mask, policy, 4, layer)
            start += piece
        return output

    cropped, fresh = EvictingCacheLayer(), EvictingCacheLayer()
    feed(cropped, [6, 3])
    cropped.crop(-removed)
    feed(fresh, [6, 3 - removed] if removed < 3 else [6])
    torch.testing.assert_close(feed(cropped, [2, 1], 9 - removed), feed(fresh, [2, 1], 9 - removed))
    assert torch.equal(cropped.columns, fresh.columns)


# --- models ---------------------------------------------------------------------------------------------------------

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
    ids = torch.randint(3, 37, (2, 150), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 150
    B, G, D = 2, 3, 4
    rows = G if options["policy"] == "h2o" else 1
    known = rows * 4 * (2 if options["policy"] == "h2o" else 1)  # columns, and scores of heavy hitters
    assert cache_bytes(cache) == B * (8 * (2 * G * D * 4 + known) + 150 * 2 * G * D * 4)


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
    with pytest.raises(ValueError, match="evicts by itself"):
        enable_eviction(enable_selective_attention(standard("llama")), budgets=4)
    model = enable_eviction(standard("llama"), budgets=4)
    with pytest.raises(ValueError, match="enabled already"):
        enable_eviction(model, budgets=4)
    with pytest.raises(ValueError, match=r"layer 0 of the given cache is a StaticLayer. Use DynamicCache\(\)"):
        model.generate(padded[0], cache_implementation="static", **GREEDY)
