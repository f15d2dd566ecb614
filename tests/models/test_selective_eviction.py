"""Context pruning: whatever the way of computing it, the result is the definition, one token after the other."""

from __future__ import annotations

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import DynamicCache

from tests.models.conftest import GREEDY, brought, layout, states
from trialist.models import ModularDecoderConfig, enable_selective_attention
from trialist.models.eviction.cache import UNDO_WINDOW, cache_bytes
from trialist.models.masks import visible_columns
from trialist.models.selective_attention import mixer, swap
from trialist.models.selective_attention.cache import SelectiveCacheLayer, StaticSelectiveCacheLayer
from trialist.models.selective_attention.mixer import attend_selectively


def by_steps(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, budget: int | None, scaling: float, head: int = 0,
    protect_bos: bool = True,
) -> tuple[Tensor, list[list[int]]]:  # fmt: skip
    """The definition, one number at a time: output (B, T, H, D) in float64, and the tokens alive at the end of each row."""
    B, H, T, D = query.shape
    shared = H // key.shape[1]
    q, k, v = (x.detach().double() for x in (query, key, value))
    output, ends = torch.zeros(B, T, H, D, dtype=torch.float64), []
    for b in range(B):
        alive: list[int] = []
        F = [0.0] * T
        for i in range(T):
            if not visible[b, i, i]:
                continue  # padding
            look = [j for j in alive if visible[b, i, j]] + [i]
            for h in range(H):
                weights = [math.exp(float(q[b, h, i] @ k[b, h // shared, j]) * scaling - F[j]) for j in look]
                for j, weight in zip(look, weights):
                    output[b, i, h] += weight / sum(weights) * v[b, h // shared, j]
            first = look[0] if protect_bos else None
            for j in look[:-1]:
                if j != first:
                    F[j] += max(0.0, float(q[b, head, i] @ k[b, head // shared, j]) * scaling)
            alive.append(i)
            while budget is not None and sum(bool(visible[b, i, j]) for j in alive) > budget:
                may_go = [j for j in alive if visible[b, i, j] and j not in (first, i)]
                alive.remove(max(may_go, key=lambda j: (F[j], -j)))
        ends.append([j for j in alive if visible[b, T - 1, j]])
    return output, ends


LAYOUTS = ["plain", "left padding", "right padding", "a hole", "packed"]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("budget", [2, 3, 5, 9])
@pytest.mark.parametrize("mask", ["bool", "float", "none"])
def test_a_full_pass_is_the_step_by_step_definition(kind: str, budget: int, mask: str) -> None:
    if mask == "none" and kind != "plain":
        pytest.skip("a layout needs a mask")
    query, key, value = states()
    visible = layout(kind)
    expected, _ = by_steps(query, key, value, visible, budget, 0.5)
    given = None if mask == "none" else visible[:, None]
    if mask == "float":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, torch.finfo(torch.float64).min)
    output = attend_selectively(query, key, value, given, scaling=0.5, budget=budget)
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(output[real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pieces", [[13], [1] * 13, [6, 1, 5, 1], [2, 4, 7], [12, 1]], ids=str)
@pytest.mark.parametrize("kind", ["plain", "left padding", "a hole"])
@pytest.mark.parametrize("budget", [2, 4, 7])
def test_pieces_give_the_definition_and_keep_its_survivors(pieces: list[int], kind: str, budget: int) -> None:
    query, key, value = states(seed=1)
    visible = layout(kind)
    expected, ends = by_steps(query, key, value, visible, budget, 0.5)
    layer, outputs, start = SelectiveCacheLayer(), [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        mask = visible[:, None, part, : part.stop]
        keys, values = brought(layer, key[:, :, part], value[:, :, part])
        outputs.append(
            attend_selectively(query[:, :, part], keys, values, mask, scaling=0.5, layer=layer, budget=budget)
        )
        start += piece
    real = visible.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(torch.cat(outputs, 1)[real], expected[real], rtol=1e-10, atol=1e-10)
    layer._drop()
    assert layer.keys.shape[2] == layer.values.shape[2] == layer.columns.shape[2] == layer.penalty.shape[1] == budget
    for row, end in enumerate(ends):
        columns = layer.columns[row, 0].long()
        stored = [j for j in columns.tolist() if visible[row, -1, j]]
        assert stored == end
        assert torch.equal(layer.keys[row], key[row][:, columns])
    assert layer.get_seq_length() == 13


def test_the_first_token_stays_unless_it_is_not_protected() -> None:
    query, key, value = states(B=1)
    query[:, 0], key[:, 0] = query[:, 0].abs(), key[:, 0].abs()  # every earlier token is selected, the first most often
    for protect, survives in ((True, True), (False, False)):
        layer = SelectiveCacheLayer()
        keys, values = brought(layer, key, value)
        output = attend_selectively(query, keys, values, None, scaling=0.5, layer=layer, budget=4, protect_bos=protect)
        expected, ends = by_steps(query, key, value, layout("plain", 1), 4, 0.5, protect_bos=protect)
        torch.testing.assert_close(output, expected)
        layer._drop()
        assert (0 in layer.columns[0, 0]) is survives
        assert layer.columns[0, 0].tolist() == ends[0]


def test_without_selections_the_oldest_token_behind_the_first_goes() -> None:
    query, key, value = states(B=1)
    query[:, 0], key[:, 0] = -query[:, 0].abs(), key[:, 0].abs()
    layer = SelectiveCacheLayer()
    attend_selectively(query, *brought(layer, key, value), None, scaling=0.5, layer=layer, budget=4)
    layer._drop()
    assert layer.columns.tolist() == [[[0, 10, 11, 12]]]


@pytest.mark.parametrize("budget", [13, 14, None])
def test_a_budget_that_holds_everything_changes_no_bit(budget: int | None) -> None:
    query, key, value = states()
    mask = layout("left padding")[:, None]
    full, pruned = SelectiveCacheLayer(), SelectiveCacheLayer()
    expected = attend_selectively(query, *brought(full, key, value), mask, scaling=0.5, layer=full)
    output = attend_selectively(query, *brought(pruned, key, value), mask, scaling=0.5, layer=pruned, budget=budget)
    assert torch.equal(output, expected)
    assert torch.equal(pruned.penalty, full.penalty)
    assert pruned.columns is None
    assert pruned.kept is None


def test_gradients_pass_through_pruned_attention() -> None:
    inputs = [state.requires_grad_() for state in states(B=1, H=2, G=1, T=6, D=2)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_selectively(q, k, v, None, scaling=0.7, budget=3), inputs)


# --- models ---------------------------------------------------------------------------------------------------------

MODELS = ["decoder", "llama", "qwen2", "gpt2"]
BUDGETS = [3, 6]


@pytest.fixture
def pruned(decoder, family):
    def build(name: str, budgets=BUDGETS, **changes):  # type: ignore[no-untyped-def]
        if name == "decoder":
            settings = {"selector_head": 2, "budgets": budgets}
            return decoder("selective_attention", "selective_attention", selective=settings, **changes)
        return enable_selective_attention(family(name, **changes), selector_head=2, budgets=budgets)

    return build


def naive(query, key, value, mask, *, scaling, selector_head, protect_bos, budget, **_):  # type: ignore[no-untyped-def]
    B, _, T, _ = query.shape
    visible = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    if mask is not None:
        visible = visible_columns(mask)[:, 0].expand(B, T, T)
    return by_steps(query, key, value, visible, budget, scaling, selector_head, protect_bos)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model_are_those_of_the_definition_in_every_layer(pruned, padded, monkeypatch, name: str) -> None:
    model, (ids, mask) = pruned(name).double(), padded
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for module in (mixer, swap):
        monkeypatch.setattr(module, "attend_selectively", naive)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 4, 3], [9, 1, 1]], ids=str)
def test_cached_logits_of_a_padded_batch_equal_the_full_pass(pruned, padded, name: str, pieces: list[int]) -> None:
    model, (ids, mask) = pruned(name).double(), padded
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        logits.append(model(ids[:, part], past_key_values=cache, **given).logits)
        start += piece
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == 11
    for layer, budget in zip(cache.layers, BUDGETS):
        assert budget <= layer.keys.shape[2] <= budget + pieces[-1]


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_generating_equals_generating_without_a_cache(pruned, padded, name: str) -> None:
    model, (ids, mask) = pruned(name).double(), padded  # in float32, rounding may decide between penalties almost equal
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=cached, **GREEDY)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        options = {**GREEDY, "do_sample": True, "temperature": 3.0, "num_return_sequences": 2}
        drawn.append(model.generate(ids, attention_mask=mask, use_cache=cached, **options))
    assert torch.equal(*drawn)
    lookup = model.generate(ids[:1], prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY)
    assert torch.equal(lookup, uncached[:1])


@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_pruning_changes_what_is_generated_and_budgets_differ_by_layer(pruned, padded, name: str) -> None:
    ids, mask = padded
    results = [
        pruned(name, budgets)(ids, attention_mask=mask).logits[mask.bool()] for budgets in (None, [3, 6], [6, 3])
    ]
    assert (results[0] - results[1]).abs().max() > 0.1
    assert (results[1] - results[2]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["decoder", "gpt2"])
def test_large_budgets_leave_every_logit_bit_and_the_generated_text_unchanged(pruned, padded, name: str) -> None:
    ids, mask = padded
    full, large = pruned(name, None), pruned(name, 20)
    assert torch.equal(full(ids, attention_mask=mask).logits, large(ids, attention_mask=mask).logits)
    tokens = [model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY)
              for model in (full, large)]  # fmt: skip
    assert torch.equal(tokens[0].sequences, tokens[1].sequences)
    assert all(map(torch.equal, tokens[0].logits, tokens[1].logits))


def test_assisted_generation_with_a_pruned_target_equals_greedy_generation(pruned, padded) -> None:
    ids, options = padded[0][:1], {**GREEDY, "max_new_tokens": 25}
    for name in ("decoder", "llama"):
        model, assistant = pruned(name).double(), pruned(name, None).double()  # no near ties decided by rounding
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


def test_a_pruned_assistant_is_refused_where_it_would_have_to_take_back_an_eviction(pruned, padded) -> None:
    model = pruned("llama", None)
    with pytest.raises(RuntimeError, match="an assistant of assisted decoding must have no budgets"):
        model.generate(padded[0][:1], assistant_model=pruned("llama", 3), **{**GREEDY, "max_new_tokens": 25})


@pytest.mark.parametrize("pieces", [[9], [7, 2], [2, 2, 5], [8, 1]], ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_crop_within_the_latest_call_takes_evictions_back(pieces: list[int], pad: int) -> None:
    query, key, value = states(T=12)
    visible = layout("plain", T=12)
    visible[1, :, :pad] = False

    def feed(layer: SelectiveCacheLayer, pieces: list[int], start: int = 0) -> Tensor:
        output = query
        for piece in pieces:
            part = slice(start, start + piece)
            keys, values = brought(layer, key[:, :, part], value[:, :, part])
            mask = visible[:, None, part, : part.stop]
            output = attend_selectively(query[:, :, part], keys, values, mask, scaling=0.5, layer=layer, budget=4)
            start += piece
        return output

    for removed in range(1, pieces[-1] + 1):
        cropped, fresh = SelectiveCacheLayer(), SelectiveCacheLayer()
        feed(cropped, pieces)
        cropped.crop(-removed)
        left = [*pieces[:-1], pieces[-1] - removed]
        feed(fresh, [piece for piece in left if piece])
        assert cropped.get_seq_length() == fresh.get_seq_length() == 9 - removed
        start = 9 - removed
        torch.testing.assert_close(feed(cropped, [2, 1], start), feed(fresh, [2, 1], start))
        torch.testing.assert_close(cropped.penalty, fresh.penalty)
        assert cropped.columns is None or torch.equal(cropped.columns, fresh.columns)


def test_crop_beyond_an_eviction_is_refused_with_the_reach() -> None:
    query, key, value = states()
    layer = SelectiveCacheLayer()
    for part in (slice(0, 10), slice(10, 11), slice(11, 13)):
        attend_selectively(
            query[:, :, part], *brought(layer, key[:, :, part], value[:, :, part]), None,
            scaling=0.5, layer=layer, budget=4,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="take back its last 2 tokens, 3 were asked for"):
        layer.crop(-3)


def test_memory_of_evicted_tokens_is_free() -> None:
    T, B, G, D = 300, 2, 2, 8
    query, key, value = (state.float() for state in states(B, 4, G, T + 1, D))
    layer, full = SelectiveCacheLayer(), SelectiveCacheLayer()
    for held, budget in ((layer, 10), (full, None)):
        for part in (slice(0, T), slice(T, T + 1)):
            brought_in = brought(held, key[:, :, part], value[:, :, part])
            attend_selectively(query[:, :, part], *brought_in, None, scaling=0.1, layer=held, budget=budget)
            if held is layer and part.start == 0:
                assert layer.keys.shape[2] == 10 + UNDO_WINDOW  # until the next call
    assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == B * G * 11 * D * 4
    entry = B * (G * D * 4 * 2 + 4 + 4)  # keys, values, the penalty, and the penalty before the latest token
    assert cache_bytes(cache_of(layer)) == 11 * (entry + B * 4) + 10 * B * 4  # columns, and what stays
    window = UNDO_WINDOW - 1
    kept_to_replay = B * (window * D * 4 + (T - 1) * (4 + 1))  # selector queries, F before them, first tokens
    assert cache_bytes(cache_of(full)) <= (T + 1) * entry + kept_to_replay + B * T * 4  # and F before the window


def cache_of(layer: SelectiveCacheLayer) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(layer)
    return cache


def test_generation_holds_one_token_more_than_its_budgets(pruned, padded) -> None:
    model, (ids, mask) = pruned("llama"), padded
    result = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    cache = result.past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [budget + 1 for budget in BUDGETS]
    assert cache.get_seq_length() == 11 + 9 - 1


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_rows_keep_their_own_tokens_when_the_batch_moves(operation: str) -> None:
    query, key, value = states(seed=3)
    layer = SelectiveCacheLayer()
    part = slice(0, 12)
    attend_selectively(
        query[:, :, part], *brought(layer, key[:, :, part], value[:, :, part]), None, scaling=0.5, layer=layer, budget=4
    )
    if operation == "reorder":
        rows = [1, 1]
        layer.reorder_cache(torch.tensor(rows))
    elif operation == "repeat":
        rows = [0, 0, 0, 1, 1, 1]
        layer.batch_repeat_interleave(3)
    else:
        rows = [1]
        layer.batch_select_indices(torch.tensor(rows))
    last = slice(12, 13)
    keys, values = brought(layer, key[rows][:, :, last], value[rows][:, :, last])
    output = attend_selectively(query[rows][:, :, last], keys, values, None, scaling=0.5, layer=layer, budget=4)
    expected, _ = by_steps(query, key, value, layout("plain"), 4, 0.5)
    torch.testing.assert_close(output, expected[rows][:, last])


def test_budgets_survive_saving_and_loading(pruned, padded, tmp_path) -> None:
    from trialist.models import load_model

    ids, mask = padded
    for name in ("decoder", "llama"):
        model = pruned(name)
        model.save_pretrained(tmp_path / name)
        loaded = load_model(str(tmp_path / name))
        assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_a_static_cache_is_refused_with_the_reason_unless_nothing_can_be_evicted(pruned, padded) -> None:
    ids, mask = padded
    options = {"attention_mask": mask, "cache_implementation": "static", **GREEDY}
    with pytest.raises(ValueError, match="static cache holds all"):
        pruned("llama").generate(ids, **options)
    assert torch.equal(pruned("llama", 40).generate(ids, **options), pruned("llama", None).generate(ids, **options))
    query, key, value = states()
    layer = StaticSelectiveCacheLayer(max_cache_len=13)
    keys, values = layer.update(key, value)
    with pytest.raises(ValueError, match="a budget of 4 tokens would free nothing"):
        attend_selectively(query, keys, values, None, scaling=0.5, layer=layer, budget=4)


@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_gradient_checkpointing_changes_no_gradient_of_a_pruned_model(pruned, padded, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = pruned(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(padded[0], labels=padded[0]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_a_compiled_pruned_block_has_no_graph_break_and_computes_the_same(pruned, padded, name: str) -> None:
    model, ids = pruned(name), padded[0]
    expected = model(ids, use_cache=False).logits
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ([4, 4, 4], "names 3 budgets for 2 layers that can evict"),
        (1, "the budget of layer 0 of 2 is 1; give at least 2 tokens"),
        ([4, 0.5], "the budget of layer 1 of 2 is 0.5"),
        ([True, 4], "the budget of layer 0 of 2 is True"),
    ],
)
def test_budgets_that_cannot_work_are_refused(family, budgets, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        enable_selective_attention(family("llama"), budgets=budgets)
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        ModularDecoderConfig(
            num_hidden_layers=3, layer_types=["selective_attention", "full_attention", "selective_attention"],
            selective={"budgets": budgets},
        )  # fmt: skip
