"""Recency and heavy hitters in layers with selective attention: whatever the way of computing it, the result is the definition,
one token after the other, in which F grows over the tokens that are alive."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models.conftest import GREEDY, assert_left, brought, layout, states
from trialist.models import (
    calibrate_budgets,
    disable_eviction,
    disable_selective_attention,
    enable_eviction,
    enable_selective_attention,
    get_budgets,
    kv_bytes,
    load_model,
    memory_profile,
    set_budgets,
)
from trialist.models.eviction.policies import HeavyHitters, Recency
from trialist.models.masks import visible_columns
from trialist.models.selective_attention import mixer, swap
from trialist.models.selective_attention.cache import SelectiveCacheLayer
from trialist.models.selective_attention.mixer import attend_selectively


def by_steps(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, budget: int, scaling: float, policy, head: int = 0,
    protect_bos: bool = True,
) -> tuple[Tensor, list[list[list[int]]]]:  # type: ignore[no-untyped-def]  # fmt: skip
    """The definition, one number at a time: output (B, T, H, D) in float64, and what is alive at the end of each row and
    key/value head."""
    B, H, T, D = query.shape
    G = key.shape[1]
    shared, selector = H // G, head * G // H
    q, k, v = (x.detach().double() for x in (query, key, value))
    output, ends = torch.zeros(B, T, H, D, dtype=torch.float64), []
    for b in range(B):
        alive: list[list[int]] = [[] for _ in range(G)]
        received = [[0.0] * T for _ in range(G)]
        F = [0.0] * T
        for i in range(T):
            if not visible[b, i, i]:
                continue  # padding
            document = [j for j in range(T) if visible[b, i, j]]
            looks = [[j for j in alive[g] if visible[b, i, j]] + [i] for g in range(G)]
            for h in range(H):
                g = h // shared
                weights = [math.exp(float(q[b, h, i] @ k[b, g, j]) * scaling - F[j]) for j in looks[g]]
                for j, weight in zip(looks[g], weights):
                    output[b, i, h] += weight / sum(weights) * v[b, g, j]
                    received[g][j] += weight / sum(weights)
            for j in looks[selector][:-1]:
                if not (protect_bos and j == document[0]):
                    F[j] += max(0.0, float(q[b, head, i] @ k[b, selector, j]) * scaling)
            for g in range(G):
                alive[g].append(i)
                here = looks[g]
                while len(here) > budget:
                    if isinstance(policy, Recency):
                        gone = next(j for j in here if j not in document[: policy.sinks])
                    else:
                        recent = max(1, round(budget * policy.recent_share))
                        gone = min(here[: len(here) - recent], key=lambda j: (received[g][j], j))
                    alive[g].remove(gone)
                    here.remove(gone)
        ends.append([[j for j in alive[g] if visible[b, T - 1, j]] for g in range(G)])
    return output, ends


POLICIES = [Recency(2), Recency(0), HeavyHitters(), HeavyHitters(0.0), HeavyHitters(1.0)]
policies = pytest.mark.parametrize("policy", POLICIES, ids=str)


@policies
@pytest.mark.parametrize("kind", ["plain", "left padding", "right padding", "a hole", "packed"])
@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("head", [0, 3])
def test_a_full_pass_is_the_step_by_step_definition(policy, kind: str, mask: str, head: int) -> None:
    query, key, value = states()
    visible = layout(kind)
    expected, _ = by_steps(query, key, value, visible, 4, 0.5, policy, head)
    given = visible[:, None]
    if mask == "float":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, torch.finfo(torch.float64).min)
    options = {"scaling": 0.5, "budget": 4, "policy": policy, "selector_head": head}
    output = attend_selectively(query, key, value, given, **options)
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)


@policies
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [6, 1, 5, 1], [2, 4, 7]], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole"])
@pytest.mark.parametrize("protect_bos", [True, False])
def test_pieces_give_the_definition_and_keep_its_survivors(
    policy, pieces: list[int], kind: str, protect_bos: bool
) -> None:
    query, key, value = states(seed=1)
    visible, budget, head = layout(kind), 5, 2
    expected, ends = by_steps(query, key, value, visible, budget, 0.5, policy, head, protect_bos)
    layer, outputs, start = SelectiveCacheLayer(), [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        mask = visible[:, None, part, : part.stop]
        if kind == "plain" and start == 0:
            mask = None  # type: ignore[assignment]
        given = brought(layer, key[:, :, part], value[:, :, part])
        options = {
            "scaling": 0.5,
            "budget": budget,
            "policy": policy,
            "selector_head": head,
            "protect_bos": protect_bos,
        }
        outputs.append(attend_selectively(query[:, :, part], *given, mask, layer=layer, **options))
        start += piece
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], expected[real], rtol=1e-10, atol=1e-10)
    assert_left(layer, key, visible, ends)
    assert layer.keys.shape[2] == budget


@policies
@pytest.mark.parametrize("removed", [1, 3])
def test_crop_within_the_latest_call_takes_evictions_and_selections_back(policy, removed: int) -> None:
    query, key, value = states(T=12)

    def feed(layer: SelectiveCacheLayer, pieces: list[int], start: int = 0) -> Tensor:
        output = query
        for piece in pieces:
            part = slice(start, start + piece)
            given = brought(layer, key[:, :, part], value[:, :, part])
            mask = layout("plain", T=12)[:, None, part, : part.stop]
            options = {"scaling": 0.5, "budget": 4, "policy": policy}
            output = attend_selectively(query[:, :, part], *given, mask, layer=layer, **options)
            start += piece
        return output

    cropped, fresh = SelectiveCacheLayer(), SelectiveCacheLayer()
    feed(cropped, [6, 3])
    cropped.crop(-removed)
    feed(fresh, [6, 3 - removed] if removed < 3 else [6])
    torch.testing.assert_close(feed(cropped, [2, 1], 9 - removed), feed(fresh, [2, 1], 9 - removed))
    assert torch.equal(cropped.columns, fresh.columns)


@policies
def test_gradients_equal_finite_differences(policy) -> None:
    inputs = [state.requires_grad_() for state in states(B=1, H=2, G=2, T=6, D=2)]
    options = {"scaling": 0.7, "budget": 3, "policy": policy}
    assert torch.autograd.gradcheck(lambda q, k, v: attend_selectively(q, k, v, None, **options), inputs)


# --- models ---------------------------------------------------------------------------------------------------------

MODELS = ["decoder", "llama", "gpt2"]
BUDGETS = [4, 6]
SETTINGS = {"recency": {"policy": "recency", "sinks": 1}, "h2o": {"policy": "h2o"}}
setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def selective(decoder, family):
    def build(name: str, **changes):  # type: ignore[no-untyped-def]
        if name == "decoder":
            return decoder("selective_attention", "selective_attention", selective={"selector_head": 2}, **changes)
        return enable_selective_attention(family(name, **changes), selector_head=2)

    return build


def naive(query, key, value, mask, *, scaling, selector_head, protect_bos, budget, policy, **_):  # type: ignore[no-untyped-def]
    B, _, T, _ = query.shape
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    if mask is not None:
        visible = visible_columns(mask)[:, 0].expand(B, T, T)
    return by_steps(query, key, value, visible, budget, scaling, policy, selector_head, protect_bos)[0]


@setting
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_are_those_of_the_definition_in_every_layer(
    selective, padded, monkeypatch, name: str, options: dict
) -> None:
    model, (ids, mask) = enable_eviction(selective(name).double(), budgets=BUDGETS, **options), padded
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for module in (mixer, swap):
        monkeypatch.setattr(module, "attend_selectively", naive)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@setting
@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_generating_equals_generating_without_a_cache(selective, padded, name: str, options: dict) -> None:
    model, (ids, mask) = enable_eviction(selective(name).double(), budgets=BUDGETS, **options), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for chunks in ({}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **chunks, **GREEDY), uncached), chunks
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=cached, **GREEDY) for cached in (True, False)
    ]
    assert torch.equal(*beams)
    lookup = model.generate(ids[:1], prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY)
    assert torch.equal(lookup, uncached[:1])


@setting
@pytest.mark.parametrize("budgets", [None, 30])
@pytest.mark.parametrize("name", MODELS)
def test_budgets_that_hold_everything_change_no_bit(selective, padded, name: str, budgets, options: dict) -> None:
    model, (ids, mask) = selective(name), padded
    full = {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    logits, tokens = model(ids, attention_mask=mask).logits, model.generate(ids, **full)
    enable_eviction(model, budgets=budgets, **options)
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    again = model.generate(ids, **full)
    assert torch.equal(again.sequences, tokens.sequences)
    assert all(map(torch.equal, again.logits, tokens.logits))


@pytest.mark.parametrize("name", MODELS)
def test_penalty_recency_and_heavy_hitters_evict_differently_and_disabling_restores_the_penalty(
    selective, padded, name: str
) -> None:
    model, (ids, mask) = selective(name), padded
    set_budgets(model, BUDGETS)
    logits = [model(ids, attention_mask=mask).logits]
    for options in SETTINGS.values():
        enable_eviction(model, budgets=BUDGETS, **options)
        logits.append(model(ids, attention_mask=mask).logits)
        set_budgets(model, 5)
        disable_eviction(model)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (logits[one] - logits[other])[mask.bool()].abs().max() > 0.1
    assert get_budgets(model) == BUDGETS
    assert torch.equal(model(ids, attention_mask=mask).logits, logits[0])
    assert not hasattr(model.config, "eviction")


@setting
@pytest.mark.parametrize("name", MODELS)
def test_settings_survive_saving_and_loading(selective, padded, tmp_path, name: str, options: dict) -> None:
    model, (ids, mask) = selective(name), padded
    set_budgets(model, [7, None])
    set_budgets(enable_eviction(model, **options), [5, None])
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert get_budgets(loaded) == [5, None]
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert get_budgets(disable_eviction(loaded)) == [7, None]


@setting
@pytest.mark.parametrize("name", MODELS)
def test_budgets_are_calibrated_and_memory_is_measured(selective, name: str, options: dict) -> None:
    model = enable_eviction(selective(name), **options)
    rows = torch.randint(3, 37, (4, 20), generator=torch.Generator().manual_seed(1))
    everything = kv_bytes(model, rows)
    assert sum(calibrate_budgets(model, rows, total=14, step=2, progress=False)) == 14
    assert kv_bytes(model, rows) < 0.7 * everything
    for layer, budget in zip(memory_profile(model, rows), get_budgets(model)):
        assert layer.seen_max == budget + 1
        assert layer.remembered_mean < layer.seen_mean


def test_chosen_layers_of_a_hybrid_go_on_evicting_by_their_penalty(decoder, padded) -> None:
    model, (ids, mask) = decoder("full_attention", "selective_attention").double(), padded
    set_budgets(model, 5)
    enable_eviction(model, "recency", 4, layers=[0], sinks=1)
    assert get_budgets(model) == [4, 5]
    assert model.config.selective["budgets"] == [5]
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)
    enable_eviction(disable_eviction(model), "h2o", [4, 6])
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_a_cache_filled_under_another_policy_is_refused(selective, padded, name: str) -> None:
    model, ids = selective(name), padded[0]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    enable_eviction(model, "h2o", 4)
    with pytest.raises(
        ValueError, match="was filled while Penalty decided what is evicted, and now it is HeavyHitters"
    ):
        model(ids[:, :1], past_key_values=cache)


def test_selective_attention_stays_while_another_policy_evicts(selective) -> None:
    model = enable_eviction(selective("llama"), "recency", 8)
    with pytest.raises(ValueError, match="call disable_eviction first"):
        disable_selective_attention(model)
