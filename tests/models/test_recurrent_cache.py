from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from trialist.models import RecurrentStateLayer

MIXED = ("min_gru", "full_attention", "min_lstm")


@pytest.fixture
def filled(decoder, padded):
    """Model, cache and logits after 7 of 11 tokens, rows of which the second begins with four of padding."""
    model, (ids, mask) = decoder(*MIXED), padded
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions(mask)[:, :7], past_key_values=cache)
    return model, cache


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_every_recurrent_mixer_gets_a_recurrent_layer_in_dynamic_and_static_caches(decoder) -> None:
    config = decoder("gru", "min_gru", "min_lstm", "full_attention").config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
        assert [isinstance(layer, RecurrentStateLayer) for layer in cache.layers] == [True, True, True, False]


def test_layer_counts_tokens_and_keeps_a_state_that_does_not_grow(filled, padded) -> None:
    model, cache = filled
    layer = cache.layers[0]
    assert cache.get_seq_length() == 7
    assert layer.get_mask_sizes(4) == (11, 0)
    shapes = layer.state.shape, layer.conv_tail.shape
    assert shapes == ((3, 24), (3, 3, 24))
    model(padded[0][:, 7:], attention_mask=padded[1], past_key_values=cache)
    assert cache.get_seq_length() == 11
    assert (layer.state.shape, layer.conv_tail.shape) == shapes


def test_a_cached_layer_holds_no_memory_but_its_state_and_the_tail_of_the_convolution(decoder, padded) -> None:
    model = decoder("min_gru", "gru", "conv_attention")
    for rows in (1, 3):
        cache = DynamicCache(config=model.config)
        model(padded[0][:rows], past_key_values=cache)
        for layer in cache.layers:
            for tensor in (getattr(layer, "state", None), layer.conv_tail):
                assert tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("static", [False, True])
def test_causal_mask_is_sized_by_the_attention_layer_behind_the_recurrent_one(decoder, padded, static: bool) -> None:
    model, (ids, mask) = decoder(*MIXED), padded
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    built = create_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(3, 4, 24), attention_mask=mask, past_key_values=cache
    )
    columns = cache.layers[1].get_mask_sizes(4)[0]
    assert columns == (16 if static else 11)
    seen = (torch.arange(columns) <= torch.arange(7, 11)[:, None]) & (torch.arange(columns) < 11)
    real = torch.nn.functional.pad(mask.bool(), (0, columns - 11))
    assert torch.equal(built[:, 0], seen & real[:, None])


def test_reordered_repeated_and_selected_rows_go_on_like_the_rows_they_came_from(filled, padded) -> None:
    model, cache = filled
    ids, mask = padded
    expected = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[:, 7:]
    rows = torch.arange(3)
    for change, moved in (
        (lambda: cache.reorder_cache(torch.tensor([2, 0, 1])), torch.tensor([2, 0, 1])),
        (lambda: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        (lambda: cache.batch_select_indices(torch.tensor([1, 4, 5])), torch.tensor([1, 4, 5])),
    ):
        change()
        rows = rows[moved]
    found = model(
        ids[rows, 7:], attention_mask=mask[rows], position_ids=positions(mask)[rows, 7:], past_key_values=cache
    ).logits
    torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-4)


def test_reset_cache_gives_what_a_fresh_one_gives(filled, padded) -> None:
    model, cache = filled
    cache.reset()
    cache.layers[1] = DynamicLayer()  # the one of full attention keeps zeroed keys in early versions of transformers
    assert cache.get_seq_length() == 0
    again = model(padded[0], past_key_values=cache).logits
    torch.testing.assert_close(again, model(padded[0]).logits, rtol=1e-4, atol=1e-4)


def test_offloaded_states_come_back(filled) -> None:
    layer = filled[1].layers[0]
    before = layer.state
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.state, before)
    assert layer.state.device == layer.device


def test_cropping_is_refused_with_the_reason_unless_nothing_is_removed(filled) -> None:
    layer = filled[1].layers[0]
    for nothing in (0, 7, 12):  # a positive number says how many tokens to keep
        layer.crop(nothing)
    for something in (-1, 3):
        with pytest.raises(RuntimeError, match="its state has absorbed them"):
            layer.crop(something)
    assert not filled[1].is_croppable


def test_attention_behind_a_convolution_goes_on_from_rows_that_were_moved_and_gives_no_token_back(
    decoder, padded
) -> None:
    model, (ids, mask) = decoder("conv_attention", "conv_attention"), padded
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions(mask)[:, :7], past_key_values=cache)
    expected = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[:, 7:]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2, 5]))
    rows = torch.tensor([2, 0, 1])
    found = model(
        ids[rows, 7:], attention_mask=mask[rows], position_ids=positions(mask)[rows, 7:], past_key_values=cache
    ).logits
    torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="cannot give back its last 2 tokens"):
        cache.layers[0].crop(-2)
    cache.reset()
    assert cache.layers[0].conv_tail is None


@pytest.mark.parametrize("mixer", ["min_gru", "conv_attention"])
def test_caches_without_recurrent_layers_are_refused_with_the_way_to_build_one(decoder, padded, mixer: str) -> None:
    model = decoder("full_attention", mixer)
    for cache in (DynamicCache(), DynamicCache(config=decoder("full_attention", "full_attention").config)):
        with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
            model(padded[0], past_key_values=cache)


def test_keys_and_values_are_refused(filled) -> None:
    with pytest.raises(ValueError, match="keeps a state and no keys"):
        filled[1].update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
