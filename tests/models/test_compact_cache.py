"""The compact cache: what it computes, what it holds in bytes, and what generation does to it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from transformers import DynamicCache

from trialist.models import (
    CompactCache,
    HeavyHitters,
    KeyChannels,
    QuantizedValues,
    Recency,
    SnapKV,
    TokenBudget,
    compact_attention,
    enable_eviction,
    enable_packed_attention,
)
from trialist.models.compact_cache.layer import CompactCacheLayer
from trialist.models.compact_cache.values import dequantize, quantize
from trialist.models.eviction.policies import Block

from .conftest import SIZES, VOCABULARY, sharpen

WIDE = {"head_dim": 8, "hidden_size": 48}
KEYS = KeyChannels(keep=0.5, recent=3, every=4)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **WIDE})).eval()
    sharpen(model, 6.0)
    return model


def text(B=2, T=21, seed=0):
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, cache, ids, split=(), mask=None):
    """Logits `(B, T, V)` of `ids`, in calls that begin at 0 and at each of `split`."""
    cuts, logits, start = [0, *split, ids.shape[1]], [], int(cache.get_seq_length())
    with compact_attention(model):
        for first, last in itertools.pairwise(cuts):
            known = None if mask is None else mask[:, : start + last]
            positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start + first : start + last]
            logits.append(
                model(ids[:, first:last], attention_mask=known, position_ids=positions, past_key_values=cache).logits
            )
    return torch.cat(logits, 1)


def steps(first, T):
    return tuple(range(first, T))


def test_whole_keys_give_the_bits_of_packed_attention(llama):
    ids = text()
    plain = enable_packed_attention(copy.deepcopy(llama))
    dense = DynamicCache(config=llama.config)
    with torch.no_grad():
        expected = [plain(ids[:, :15], past_key_values=dense).logits]
        expected += [plain(ids[:, t : t + 1], past_key_values=dense).logits for t in range(15, 21)]
    cache = CompactCache(plain, keys=KeyChannels(keep=1.0))
    assert torch.equal(read(plain, cache, ids, steps(15, 21)), torch.cat(expected, 1))
    assert all(report.pruned == 0 for report in cache.report())


@pytest.mark.parametrize("recent", [0, 3])
def test_decoding_is_attention_with_the_dropped_channels_set_to_zero(llama, recent):
    ids = text()
    cache = CompactCache(llama, keys=KeyChannels(keep=0.4, recent=recent, every=50))
    found = read(llama, cache, ids, steps(15, 21))
    dense = DynamicCache(config=llama.config)
    with torch.no_grad():
        expected = [llama(ids[:, :15], past_key_values=dense).logits]
        for layer, compact in zip(dense.layers, cache.layers):
            kept = torch.zeros(2, 3, 8, dtype=torch.bool).scatter(-1, compact.kept, True)
            assert kept.sum(-1).unique().tolist() == [4]
            layer.keys[:, :, : 15 - recent] *= kept[:, :, None]
        expected += [llama(ids[:, t : t + 1], past_key_values=dense).logits for t in range(15, 21)]
    torch.testing.assert_close(found, torch.cat(expected, 1), atol=1e-4, rtol=1e-4)


def test_the_tail_is_pruned_again_by_the_channels_chosen_first(llama):
    ids = text(T=30)
    cache = CompactCache(llama, keys=KEYS)
    read(llama, cache, ids[:, :15])
    chosen = cache.layers[1].kept.clone()
    assert [report.pruned for report in cache.report()] == [12, 12]
    lengths = []
    for t in range(15, 30):
        read(llama, cache, ids[:, t : t + 1])
        lengths.append(cache.layers[1].pruned)
    assert lengths == [12] * 3 + [16] * 4 + [20] * 4 + [24] * 4
    assert torch.equal(cache.layers[1].kept, chosen)


def test_recompressed_keys_are_the_chosen_channels_of_whole_ones(llama):
    ids = text(T=30)
    cache, dense = (
        CompactCache(llama, keys=KeyChannels(keep=0.99, recent=3, every=4)),
        DynamicCache(config=llama.config),
    )
    read(llama, cache, ids, steps(15, 30))  # 8 of 8 channels stay, so nothing is lost
    with torch.no_grad():
        llama(ids, past_key_values=dense)
    for layer, other in zip(cache.layers, dense.layers):
        assert layer.pruned == 24
        torch.testing.assert_close(layer.dense_keys(), other.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        {"keys": KEYS},
        {"keys": KeyChannels(keep=0.5, value_keep=0.5, recover="mean", recent=2, every=3)},
        {"keys": KEYS, "values": QuantizedValues(bits=8, group=4, recent=1, every=4)},
        {"eviction": TokenBudget(9, SnapKV(window=3, kernel=3), every=2)},
        {"keys": KEYS, "eviction": TokenBudget(9, HeavyHitters(), every=2)},
        {
            "keys": KEYS,
            "values": QuantizedValues(bits=4, group=4),
            "eviction": TokenBudget(9, Recency(sinks=2), every=2),
        },
    ],
    ids=["keys", "values pruned", "8 bits", "snapkv", "keys h2o", "all recency"],
)
def test_a_padded_row_is_the_row_alone(llama, parts):
    ids = text(B=2, T=24)
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    together, alone = CompactCache(llama, **parts), CompactCache(llama, **parts)
    found = read(llama, together, ids, steps(17, 24), mask)
    # the row alone has six tokens fewer, so tails that fill up at the same step need the same cuts
    expected = read(llama, alone, ids[1:, 6:], steps(11, 18))
    torch.testing.assert_close(found[1:, 6:], expected, atol=2e-4, rtol=2e-4)


def test_bytes_are_those_of_the_formula(llama):
    cache = CompactCache(llama, keys=KeyChannels(keep=0.5, recent=5))
    B, G, D, N, R, C = 2, 3, 8, 21 - 5, 5, 4
    read(llama, cache, text())
    whole = B * G * R * 2 * D * 4
    assert cache.nbytes() == 2 * (B * G * (C * N + D * N) * 4 + whole + B * G * C * 8)
    (report, _) = cache.report()
    assert report.bytes * 2 == cache.nbytes()
    assert (report.tokens, report.stored, report.pruned, report.key_channels) == (21, 21, 16, 4)
    assert report.dense_bytes == B * G * 21 * 2 * D * 4


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bytes_are_those_of_the_formula(llama, bits):
    cache = CompactCache(llama, values=QuantizedValues(bits=bits, group=4, recent=5))
    read(llama, cache, text())
    N, R, D = 16, 5, 8
    assert cache.nbytes() == 2 * 6 * (N * (4 * D + D * bits // 8 + 2 * 2 * D // 4) + R * 2 * D * 4)


def test_decoding_needs_no_new_memory_for_every_token(llama):
    cache = CompactCache(llama, keys=KEYS)
    ids = text(T=80)
    read(llama, cache, ids[:, :40])
    addresses = set()
    for t in range(40, 80):
        read(llama, cache, ids[:, t : t + 1])
        layer = cache.layers[0]
        addresses |= {layer.tail_keys.buffer.data_ptr(), layer.old_keys.buffer.data_ptr()}
    assert len(addresses) <= 5
    assert cache.layers[0].nbytes() < 1.5 * 2 * 3 * 4 * (80 * 12 + 10 * 16)


@pytest.mark.parametrize(("bits", "steps_of_error"), [(4, 15), (8, 255)])
def test_quantised_values_are_within_half_a_step(bits, steps_of_error):
    settings = QuantizedValues(bits=bits, group=4)
    values = torch.randn(2, 3, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, 0, 0] = 2.5  # a group without range
    codes = quantize(values, settings)
    assert codes[0].dtype == torch.uint8
    assert codes[0].shape[-1] == 12 * bits // 8
    error = (dequantize(*codes, settings, torch.float64) - values).abs().unflatten(-1, (-1, 4)).amax(-1)
    groups = values.unflatten(-1, (-1, 4))
    step = (groups.amax(-1) - groups.amin(-1)) / steps_of_error
    assert (error <= 0.5 * step + groups.abs().amax(-1) * 2**-10).all()
    assert error[0, 0, 0].max() == 0.0


def test_recovery_adds_the_mean_of_what_was_dropped(llama):
    ids = text()
    cache = CompactCache(llama, keys=KeyChannels(keep=0.5, recent=3, recover="mean", every=50))
    found = read(llama, cache, ids, (15,))[:, 15:16]
    dense = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids[:, :15], past_key_values=dense)
        for layer, compact in zip(dense.layers, cache.layers):
            kept = torch.zeros(2, 3, 1, 8, dtype=torch.bool).scatter(-1, compact.kept[:, :, None], True)
            old = layer.keys[:, :, :12]
            layer.keys[:, :, :12] = torch.where(kept, old, old.mean(2, keepdim=True))
        expected = llama(ids[:, 15:16], past_key_values=dense).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "policy", [Recency(sinks=2), HeavyHitters(), SnapKV(window=3, kernel=3)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    "keys", [None, KeyChannels(keep=0.99, recent=2, every=2)], ids=["tokens", "tokens and channels"]
)
def test_a_budget_keeps_what_the_policy_keeps(llama, policy, keys):
    ids = text(T=26)
    cache = CompactCache(llama, keys=keys, eviction=TokenBudget(9, policy, every=2))
    found = read(llama, cache, ids, steps(20, 26))
    dense = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=dense)
    for layer in cache.layers:
        assert layer.stored <= 9 + 2
        columns = layer.columns.expand(2, 3, -1)
        assert (columns.diff(dim=-1) > 0).all()
        assert (columns[..., -1] == 25).all()
        if isinstance(policy, Recency):
            assert columns[0, 0].tolist()[:2] == [0, 1]
    # with a whole view of the first layer's entries, what is stored are the keys of the tokens that columns name
    first, index = cache.layers[0], cache.layers[0].columns.long().expand(2, 3, -1)
    expected = dense.layers[0].keys.gather(2, index[..., None].expand(-1, -1, -1, 8))
    torch.testing.assert_close(first.dense_keys(), expected, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_evicted_tokens_are_attended_to_no_more(llama):
    """Against a dense cache whose mask hides what was given up, head by head the same in recency."""
    ids = text(T=20)
    cache = CompactCache(llama, eviction=TokenBudget(9, Recency(sinks=2), every=50))
    found = read(llama, cache, ids, steps(15, 20))
    dense, mask = DynamicCache(config=llama.config), torch.ones(2, 20, dtype=torch.long)
    mask[:, 2 : 15 - 7] = 0
    with torch.no_grad():
        llama(ids[:, :15], past_key_values=dense)
        for t in range(15, 20):
            positions = torch.full((2, 1), t)
            expected = llama(
                ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=positions, past_key_values=dense
            ).logits
            torch.testing.assert_close(found[:, t : t + 1], expected, atol=1e-4, rtol=1e-4)


def test_snapkv_keeps_what_its_window_attends_to():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 6, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 2, 20, 5, generator=generator, dtype=torch.float64)
    _, _, alive = SnapKV(window=3, kernel=1).play(Block(query, key, None, (), 0.5), 8)
    for g in range(2):
        votes = torch.zeros(20, dtype=torch.float64)
        for h in (2 * g, 2 * g + 1):
            for t in (3, 4, 5):
                sees = 20 - 6 + t + 1
                votes[:sees] += (key[0, g, :sees] @ query[0, h, t] * 0.5).softmax(-1)
        expected = {*votes[:17].topk(5).indices.tolist(), 17, 18, 19}
        assert set(alive[0, g].nonzero()[:, 0].tolist()) == expected


def test_snapkv_smooths_over_neighbours():
    query = torch.tensor([[[[10.0]]]])
    key = torch.zeros(1, 1, 12, 1)
    key[0, 0, 5] = 1.0
    kept = SnapKV(window=1, kernel=3).play(Block(query, key, None, (), 1.0), 4)[2]
    assert kept[0, 0].nonzero()[:, 0].tolist() == [4, 5, 6, 11]


def test_chunks_of_a_prompt_are_the_prompt(llama):
    ids = text(T=24)
    for eviction in (None, TokenBudget(9, HeavyHitters(), every=3), TokenBudget(9, SnapKV(window=3), every=3)):
        whole, parts = (CompactCache(llama, keys=KEYS, eviction=eviction) for _ in range(2))
        parts.await_prompt(18)
        expected = read(llama, whole, ids, steps(18, 24))
        found = read(llama, parts, ids, (7, 14, *steps(18, 24)))
        torch.testing.assert_close(found[:, 18:], expected[:, 18:], atol=1e-4, rtol=1e-4)
        for one, other in zip(whole.layers, parts.layers):
            assert torch.equal(one.kept, other.kept)
            assert one.pruned == other.pruned


def test_a_prompt_of_unknown_length_is_cut_once_it_is_declared_whole(llama):
    ids = text(T=24)
    cache = CompactCache(llama, keys=KEYS)
    cache.await_prompt(10**6)
    read(llama, cache, ids, (7, 14, 18, 19))
    assert cache.layers[0].pruned == 0
    cache.finalize_prefill()
    read(llama, cache, ids[:, :1])
    assert cache.layers[0].pruned == 22


@pytest.mark.parametrize(
    "parts",
    [
        {"keys": KEYS},
        {"keys": KEYS, "values": QuantizedValues(bits=8, group=4, recent=3)},
        {"keys": KEYS, "eviction": TokenBudget(12, SnapKV(window=6), every=6)},
    ],
    ids=["keys", "values", "eviction"],
)
def test_a_crop_within_the_whole_tokens_leaves_no_trace(llama, parts):
    ids, wrong = text(T=20), text(T=4, seed=9)
    cache = CompactCache(llama, **parts)
    expected_cache = CompactCache(llama, **parts)
    read(llama, cache, ids[:, :17])
    read(llama, expected_cache, ids[:, :17])
    read(llama, cache, wrong[:, :3])
    cache.crop(-3)
    assert cache.get_seq_length() == 17
    expected = read(llama, expected_cache, ids[:, 17:], steps(1, 3))
    torch.testing.assert_close(read(llama, cache, ids[:, 17:], steps(1, 3)), expected, atol=1e-5, rtol=1e-5)


def test_a_crop_into_the_pruned_tokens_drops_them(llama):
    ids = text(T=20)
    cache = CompactCache(llama, keys=KEYS, values=QuantizedValues(bits=8, group=4, recent=3))
    read(llama, cache, ids)
    before = cache.layers[0].dense_keys().clone()
    cache.crop(-7)
    assert (cache.get_seq_length(), cache.layers[0].pruned, cache.layers[0].stored) == (13, 13, 13)
    assert torch.equal(cache.layers[0].dense_keys(), before[:, :, :13])
    assert read(llama, cache, ids[:, 13:]).isfinite().all()
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


def test_a_crop_beyond_what_was_given_up_is_refused(llama):
    cache = CompactCache(llama, eviction=TokenBudget(8, SnapKV(window=3)))
    read(llama, cache, text())
    cache.layers[0].crop(-8)
    with pytest.raises(RuntimeError, match="take back its last 8 tokens, 9 were asked for"):
        cache.layers[1].crop(-9)


@pytest.mark.parametrize("eviction", [None, TokenBudget(9, HeavyHitters(), every=2)], ids=["keys", "eviction"])
def test_rows_are_reordered_repeated_and_selected_with_all_that_belongs_to_them(llama, eviction):
    ids = text(B=3, T=18)
    parts = {"keys": KeyChannels(keep=0.5, recent=2, every=3, recover="mean"), "eviction": eviction}
    cache = CompactCache(llama, **parts)
    read(llama, cache, ids[:, :15])
    order = torch.tensor([2, 0, 0])
    reordered, repeated, selected = (copy.deepcopy(cache) for _ in range(3))
    expected = read(llama, cache, ids[:, 15:], (1, 2))
    reordered.reorder_cache(order)
    torch.testing.assert_close(read(llama, reordered, ids[order, 15:], (1, 2)), expected[order])
    repeated.batch_repeat_interleave(2)
    twice = ids[:, 15:].repeat_interleave(2, 0)
    torch.testing.assert_close(read(llama, repeated, twice, (1, 2)), expected.repeat_interleave(2, 0))
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(read(llama, selected, ids[1:2, 15:], (1, 2)), expected[1:2])


def test_a_second_turn_reads_its_prompt_against_pruned_keys(llama):
    """What comes in one call is what comes token by token, as long as nothing is cut in between."""
    ids = text(T=26)
    settings = KeyChannels(keep=0.5, recent=3, every=40)
    at_once, by_one = CompactCache(llama, keys=settings), CompactCache(llama, keys=settings)
    found = read(llama, at_once, ids, (15,))
    torch.testing.assert_close(found, read(llama, by_one, ids, steps(15, 26)), atol=1e-4, rtol=1e-4)


def test_long_calls_are_computed_in_parts(llama, monkeypatch):
    ids = text(T=26)
    caches = [CompactCache(llama, keys=KEYS) for _ in range(2)]
    expected = read(llama, caches[0], ids, (12,))
    monkeypatch.setattr("trialist.models.compact_cache.attention.LOGITS", 2 * 6 * 26 * 3)
    torch.testing.assert_close(read(llama, caches[1], ids, (12,)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(dtype):
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **WIDE})).eval()
    ids, parts = text(), {"keys": KEYS, "values": QuantizedValues(bits=8, group=4, recent=3)}
    expected = read(model, CompactCache(model, **parts), ids, steps(15, 21))
    cache = CompactCache(model.to(dtype), **parts)
    found = read(model, cache, ids, steps(15, 21))
    assert cache.layers[0].old_keys.buffer.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.05)


def test_short_prompts_stay_whole(llama):
    cache = CompactCache(llama, keys=KeyChannels(keep=0.5))
    read(llama, cache, text())
    assert [(report.pruned, report.key_channels) for report in cache.report()] == [(0, 8)] * 2
    waiting = sum(layer.asked.nbytes for layer in cache.layers)  # queries by which channels will be chosen
    assert cache.nbytes() - waiting == sum(report.dense_bytes for report in cache.report())


def test_layers_with_a_sliding_window_stay_as_they_are():
    config = transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"]
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    cache = CompactCache(model, keys=KEYS)
    assert [type(layer) is CompactCacheLayer for layer in cache.layers] == [True, False]
    read(model, cache, text(), steps(15, 21))
    assert [report.pruned > 0 for report in cache.report()] == [True, False]
    only = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=6))
    with pytest.raises(ValueError, match="no layer of MistralForCausalLM has full attention"):
        CompactCache(only)


def test_models_that_cannot_store_less_are_refused(llama):
    with pytest.raises(ValueError, match="soft-caps"):
        CompactCache(
            transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, layer_types=["full_attention"] * 2))
        )
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=37, hidden_size=24, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="no layer that uses the attention interface"):
        CompactCache(bloom)
    config = transformers.DeepseekV3Config(
        vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=8, q_lora_rank=8,
        intermediate_size=16, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="MLA"):
        CompactCache(transformers.DeepseekV3ForCausalLM(config))
    with (
        pytest.raises(ValueError, match="attn_implementation='evicting_sdpa'"),
        compact_attention(enable_eviction(copy.deepcopy(llama), "h2o", 5)),
    ):
        pass


def test_each_part_has_one_owner(llama):
    cache = CompactCache(llama, keys=KEYS)
    cache.own("keys", KEYS)
    with pytest.raises(ValueError, match=r"keep=0.5.*decides on the keys.*keep=0.7"):
        cache.own("keys", KeyChannels(keep=0.7))
    with pytest.raises(ValueError, match="groups of channels"):
        CompactCache(llama, keys=KeyChannels(value_keep=0.5), values=QuantizedValues(bits=8, group=4))
    read(llama, cache, text())
    with pytest.raises(ValueError, match="holds tokens"):
        cache.own("values", QuantizedValues(bits=8, group=4))


def test_a_pruned_cache_is_not_read_by_an_attention_that_does_not_know_it(llama):
    cache = CompactCache(llama, keys=KEYS)
    read(llama, cache, text())
    with pytest.raises(ValueError, match="does not know of it"):
        llama(text()[:, :1], past_key_values=cache)


def test_other_caches_are_read_as_ever_within_the_attention(llama):
    ids = text()
    with torch.no_grad():
        expected = llama(ids, past_key_values=DynamicCache(config=llama.config)).logits
        with compact_attention(llama), compact_attention(llama):
            assert torch.equal(llama(ids, past_key_values=DynamicCache(config=llama.config)).logits, expected)
    assert llama.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantizedValues(bits=3), "bits of values is 3"),
        (lambda: QuantizedValues(group=5), "group is 5"),
        (lambda: QuantizedValues(recent=-1), "recent is -1"),
        (lambda: TokenBudget(32, "snapkv"), "budget is 32; give at least 33"),
        (lambda: TokenBudget(8, "snap"), "'snap' is unknown.*snapkv"),
        (lambda: TokenBudget(8, "h2o", every=0), "every is 0"),
        (lambda: SnapKV(kernel=4), "odd number"),
        (lambda: SnapKV(pool="sum"), "'sum' is unknown"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_groups_of_values_must_fit_the_head(llama):
    with pytest.raises(ValueError, match="group is 6, which does not divide the 8 channels"):
        read(llama, CompactCache(llama, values=QuantizedValues(bits=8, group=6)), text())
