from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from trialist.models import SelectiveCacheLayer, StaticSelectiveCacheLayer, enable_selective_attention
from trialist.models.eviction.cache import UNDO_WINDOW
from trialist.models.selective_attention.cache import selective_layer
from trialist.models.selective_attention.mixer import attend_selectively


def states(T: int, B: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(B, heads, T, 4, generator=generator, dtype=torch.float64) * 2 for heads in (4, 2, 2)]
    return draw[0], draw[1], draw[2]


def feed(
    layer: SelectiveCacheLayer | StaticSelectiveCacheLayer, tokens: tuple[Tensor, ...], pieces: list[int], pad: int = 0
) -> Tensor:
    """Output of all tokens, given in pieces; the second row has `pad` tokens of padding on its left."""
    query, key, value = tokens
    outputs, start = [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        keys, values = layer.update(key[:, :, part], value[:, :, part])
        visible = torch.ones(start + piece, keys.shape[2], dtype=torch.bool).tril()[None, start:].repeat(2, 1, 1)
        visible[1, :, :pad] = False
        outputs.append(attend_selectively(query[:, :, part], keys, values, visible[:, None], scaling=0.5, layer=layer))
        start += piece
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1], [2, 7]], ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_pieces_give_the_output_of_one_pass_in_dynamic_and_static_layers(pieces: list[int], pad: int) -> None:
    query, key, value = states(9)
    visible = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1)
    visible[1, :, :pad] = False
    expected = attend_selectively(query, key, value, visible[:, None], scaling=0.5)
    dynamic, static = SelectiveCacheLayer(), StaticSelectiveCacheLayer(max_cache_len=13)
    torch.testing.assert_close(feed(dynamic, (query, key, value), pieces, pad), expected)
    torch.testing.assert_close(feed(static, (query, key, value), pieces, pad), expected)
    torch.testing.assert_close(static.penalty[:, :9], dynamic.penalty)
    assert not static.penalty[:, 9:].any()


def test_padding_in_the_middle_of_a_cached_row_selects_nothing() -> None:
    query, key, value = states(9, seed=4)
    keep = [0, 1, 2, 5, 6, 7, 8]
    visible = torch.ones(9, 9, dtype=torch.bool).tril().repeat(2, 1, 1)
    visible[:, :, 3:5] = False
    layer = SelectiveCacheLayer()
    for part in (slice(0, 5), slice(5, 9)):
        keys, values = layer.update(key[:, :, part], value[:, :, part])
        mask = visible[:, None, part, : part.stop]
        output = attend_selectively(query[:, :, part], keys, values, mask, scaling=0.5, layer=layer)
    alone = attend_selectively(query[:, :, keep], key[:, :, keep], value[:, :, keep], None, scaling=0.5)
    torch.testing.assert_close(output, alone[:, -4:])


@pytest.mark.parametrize("removed", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [3, 4, 1, 1]], ids=str)
@pytest.mark.parametrize("pad", [0, 3])
def test_crop_takes_the_selections_of_removed_tokens_back(removed: int, pieces: list[int], pad: int) -> None:
    tokens = states(9)
    cropped, fresh = SelectiveCacheLayer(), SelectiveCacheLayer()
    feed(cropped, tokens, pieces, pad)
    cropped.crop(-removed)
    feed(fresh, tuple(state[:, :, : 9 - removed] for state in tokens), [9 - removed], pad)
    assert cropped.get_seq_length() == 9 - removed
    torch.testing.assert_close(cropped.penalty, fresh.penalty)
    if 9 - removed > 2:
        cropped.crop(-1)
        assert cropped.penalty.shape == (2, 8 - removed)


def test_crop_of_everything_leaves_an_empty_layer_that_can_be_used_again() -> None:
    layer, tokens = SelectiveCacheLayer(), states(6)
    expected = feed(layer, tokens, [6])
    layer.crop(-6)
    assert layer.get_seq_length() == 0
    torch.testing.assert_close(feed(layer, tokens, [2, 4]), expected)


def test_crop_by_zero_changes_nothing() -> None:
    layer = SelectiveCacheLayer()
    feed(layer, states(6), [6])
    before = layer.penalty.clone()
    layer.crop(0)
    assert torch.equal(layer.penalty, before)


def test_memory_of_what_crop_may_undo_is_bounded_and_going_further_is_refused() -> None:
    length = UNDO_WINDOW + 30
    layer = SelectiveCacheLayer()
    feed(layer, states(length), [1] * length)
    assert len(layer.calls) <= UNDO_WINDOW + 2
    with pytest.raises(
        RuntimeError, match=f"take back its last {len(layer.calls)} tokens, {length - 1} were asked for"
    ):
        layer.crop(1 - length)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reordered_rows_keep_their_own_penalty(kind: str) -> None:
    layer = SelectiveCacheLayer() if kind == "dynamic" else StaticSelectiveCacheLayer(max_cache_len=8)
    feed(layer, states(7), [7])
    before = layer.penalty.clone()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.penalty, before[[1, 1]])
    assert torch.equal(layer.keys[0], layer.keys[1])


def test_repeated_and_selected_rows_keep_their_own_penalty() -> None:
    layer = SelectiveCacheLayer()
    feed(layer, states(7), [7])
    before = layer.penalty.clone()
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.penalty, before[[0, 0, 0, 1, 1, 1]])
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(layer.penalty, before[[1, 0]])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset_forgets_the_penalty(kind: str) -> None:
    layer = SelectiveCacheLayer() if kind == "dynamic" else StaticSelectiveCacheLayer(max_cache_len=8)
    expected = feed(layer, states(7), [7])
    layer.reset()
    torch.testing.assert_close(feed(layer, states(7), [3, 4]), expected)


def test_caches_built_from_the_configuration_hold_selective_layers(decoder) -> None:
    config = decoder("full_attention", "selective_attention").config
    assert isinstance(DynamicCache(config=config).layers[1], SelectiveCacheLayer)
    assert isinstance(StaticCache(config=config, max_cache_len=9).layers[1], StaticSelectiveCacheLayer)
    assert not isinstance(DynamicCache(config=config).layers[0], SelectiveCacheLayer)


def test_a_cache_without_configuration_is_refused_by_the_decoder(decoder, padded) -> None:
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        decoder()(padded[0], past_key_values=DynamicCache())


def test_an_empty_standard_cache_is_taken_over_by_a_swapped_model(family, padded) -> None:
    model, ids = enable_selective_attention(family("llama")), padded[0]
    expected = model(ids, use_cache=False).logits
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=13),
    ):
        parts = [model(ids[:, part], past_key_values=cache).logits for part in (slice(0, 8), slice(8, 9), slice(9, 11))]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_static_cache_with_early_allocation_is_taken_over(family, padded) -> None:
    model, ids = enable_selective_attention(family("llama")), padded[0]
    cache = StaticCache(config=model.config, max_cache_len=13)
    cache.early_initialization(3, 3, 4, torch.float32, torch.device("cpu"))
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


def test_a_cache_filled_by_standard_attention_is_refused(family, padded) -> None:
    model, ids = family("llama"), padded[0]
    cache = model(ids, use_cache=True).past_key_values
    enable_selective_attention(model)
    with pytest.raises(ValueError, match="filled by standard attention"):
        model(ids, past_key_values=cache)


def test_a_cache_of_another_kind_is_refused() -> None:
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    with pytest.raises(ValueError, match="is a DynamicSlidingWindowLayer"):
        selective_layer(cache, 0)
