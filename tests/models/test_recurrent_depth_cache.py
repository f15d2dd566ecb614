from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.models.recurrent import GREEDY, recurrent
from trialist.models.recurrent_depth.cache import RecurrentDepthCache
from trialist.models.recurrent_depth.steps import depth_of

VARIANTS = {
    "sandwich": {},
    "pre": {"changes": {"norm_style": "pre"}},
    "zero-add": {"state_init": "zero", "injection": "add"},
    "no-coda": {"prelude_layers": 2, "coda_layers": 0},
    "no-prelude": {"prelude_layers": 0, "coda_layers": 2},
    "few-steps": {"num_steps": 1},
}
MIXES = {
    "selective-core": ("full_attention", "selective_attention", "full_attention", "full_attention"),
    "selective-outside": ("selective_attention", "full_attention", "full_attention", "selective_attention"),
    "min_gru-core": ("full_attention", "min_gru", "full_attention", "full_attention"),
    "min_lstm-everywhere": ("min_lstm", "min_lstm", "min_lstm", "min_lstm"),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_cached_greedy_generation_equals_uncached(decoder, padded, settings: dict) -> None:
    model, (ids, mask) = recurrent(decoder, **settings), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options


@pytest.mark.parametrize("layer_types", MIXES.values(), ids=MIXES)
def test_other_mixers_keep_a_state_for_every_step(decoder, padded, layer_types: tuple) -> None:
    model, (ids, mask) = recurrent(decoder, *layer_types), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


def test_cached_logits_equal_those_of_the_whole_text_in_any_chunks(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    expected = model(ids, use_cache=False).logits
    cache, parts = DynamicCache(), []
    for part in ids.split([4, 1, 3, 1, 2], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(cache, RecurrentDepthCache)
    assert isinstance(cache, DynamicCache)
    assert len(cache.layers) == 1 + 5 * 2 + 1
    assert torch.equal(cache.num_steps, torch.full((3, 11), 5))


@pytest.mark.parametrize("fill", [None, 0, 1], ids=["no positions", "padding at 0", "padding at 1"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
def test_left_padding_in_chunks_of_any_size_equals_the_text_without_padding(decoder, padded, size: int, fill) -> None:
    model, (ids, mask) = recurrent(decoder), padded  # the second row has four tokens of padding
    positions = None if fill is None else (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
    cache, states, logits = DynamicCache(), [], []
    for start in range(0, 11, size):
        end = min(start + size, 11)
        given = {} if positions is None else {"position_ids": positions[:, start:end]}
        output = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, output_latent_states=True, **given
        )
        states.append(output.latent_states[0])
        logits.append(output.logits)
    alone = model(ids[1:2, 4:], output_latent_states=True)
    assert torch.equal(torch.cat(states, 1)[1, 4:], alone.latent_states[0][0])
    torch.testing.assert_close(torch.cat(logits, 1)[1, 4:], alone.logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(cache.num_steps, 5 * mask)


def test_a_warm_start_after_padding_starts_anew(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder, warm_start=True), padded
    cache, alone = DynamicCache(), DynamicCache()
    for at in range(11):
        found = model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
        if at >= 4:
            expected = model(ids[1:2, at : at + 1], past_key_values=alone).logits
            torch.testing.assert_close(found[1:2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_steps": 3}, {"kv_slots": 2}], ids=["plain", "fewer steps", "shared slots"]
)
def test_beam_search_reorders_every_slot(decoder, padded, options: dict) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    found = model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, **options, **GREEDY)
    if "kv_slots" not in options:
        again = model.generate(
            ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=False, **options, **GREEDY
        )
        assert torch.equal(found, again)
        return
    # by definition not equal to a pass over the whole text; each row must not depend on the others
    for row in range(3):
        own = ids[row : row + 1, int((mask[row] == 0).sum()) :]
        alone = model.generate(own, num_beams=3, num_return_sequences=2, **options, **GREEDY)
        assert torch.equal(found[2 * row : 2 * row + 2, -8:], alone[:, -8:])


def test_sampling_with_and_without_cache_draws_the_same_tokens(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, "do_sample": True}))
    assert torch.equal(*samples)


class SharedSlots:
    """Decoding with shared slots, as the definition has it: one dictionary of keys and values per slot, layer and token."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        self.model, self.slots, self.entries = model, slots, {}

    def attend(self, mixer: nn.Module, x: torch.Tensor, where: tuple, position: int) -> torch.Tensor:
        heads = [
            projection(x).view(1, 1, -1, 4).transpose(1, 2) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        ]
        q, k = apply_rotary_pos_emb(heads[0], heads[1], *self.model.model.rotary_emb(x, torch.tensor([[position]])))
        self.entries[(*where, position)] = k, heads[2]
        pairs = [self.entries[(*where, other)] for other in range(position + 1)]
        keys, values = (torch.cat(part, 2).repeat_interleave(2, 1) for part in zip(*pairs, strict=True))
        weights = (q @ keys.transpose(2, 3) / 2.0).softmax(-1)
        return mixer.o_proj((weights @ values).transpose(1, 2).reshape(1, 1, -1))

    def block(self, block: nn.Module, x: torch.Tensor, where: tuple, position: int) -> torch.Tensor:
        x = block.mixer_stream_norm(x + self.attend(block.mixer, block.mixer_norm(x), where, position))
        return block.ffn_stream_norm(x + block.ffn(block.ffn_norm(x)))

    def __call__(self, token: torch.Tensor, position: int, steps: int) -> torch.Tensor:
        depth, norm = depth_of(self.model), self.model.model.norm
        e = self.block(depth.prelude[0], self.model.model.embed_tokens(token), ("prelude",), position)
        s = torch.zeros_like(e)
        for step in range(steps):
            s = depth.core.adapter(torch.cat([s, e], -1))
            for j, block in enumerate(depth.core.blocks):
                s = self.block(block, s, (step % self.slots, j), position)
        y = self.block(depth.coda[0], norm(s), ("coda",), position)
        return self.model.lm_head(norm(y))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_shared_slots_equal_a_simulation_with_a_dictionary(decoder, slots: int) -> None:
    model = recurrent(decoder, state_init="zero")
    ids = torch.randint(3, 37, (1, 6), generator=torch.Generator().manual_seed(2))
    simulation, cache = SharedSlots(model, slots), DynamicCache()
    for position in range(6):
        token = ids[:, position : position + 1]
        found = model(token, past_key_values=cache, kv_slots=slots).logits
        torch.testing.assert_close(found, simulation(token, position, 5), rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 1 + slots * 2 + 1


def test_as_many_slots_as_steps_are_exact(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache, kv_slots=5)
    found = model(ids[:, 6:], past_key_values=cache, kv_slots=5).logits
    torch.testing.assert_close(found, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_shared_slots_generate_with_dynamic_and_static_caches(decoder, padded, implementation) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    found = model.generate(ids, attention_mask=mask, kv_slots=2, cache_implementation=implementation, **GREEDY)
    cache = DynamicCache()
    token, written = ids, []
    for _ in range(8):
        output = model(token, attention_mask=mask, past_key_values=cache, kv_slots=2)
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        written.append(token)
    assert torch.equal(found[:, 11:], torch.cat(written, 1))


def test_bytes_of_keys_and_values_grow_with_the_slots_and_not_with_the_steps(decoder, padded) -> None:
    def numbers(**options) -> int:
        cache = recurrent(decoder)(padded[0], use_cache=True, **options).past_key_values
        return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)

    per_layer = 2 * 3 * 3 * 4 * 11  # keys and values, B, G, D, S
    assert numbers(num_steps=7) == (2 + 2 * 7) * per_layer
    assert numbers(num_steps=7, kv_slots=2) == (2 + 2 * 2) * per_layer


def test_fewer_steps_may_follow_more_and_then_stand_in_for_the_deeper_ones(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    model(ids[:, 6:7], past_key_values=cache, num_steps=2)
    layers = cache.layers
    for j in (1, 2):  # the two core layers of step 2, and of the steps after it
        for step in (2, 3, 4):
            assert torch.equal(layers[j + 2 * step].keys[..., -1, :], layers[j + 2].keys[..., -1, :])
            assert torch.equal(layers[j + 2 * step].values[..., -1, :], layers[j + 2].values[..., -1, :])
    assert torch.isfinite(model(ids[:, 7:], past_key_values=cache).logits).all()
    assert cache.num_steps[0].tolist() == [5] * 6 + [2] + [5] * 4


def test_a_cropped_cache_goes_on_as_if_the_rest_had_not_been(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-5)
    found = model(ids[:, 6:8], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids[:, :8]).logits[:, 6:], rtol=1e-4, atol=1e-4)
    assert cache.num_steps.shape == (3, 8)


def test_rows_can_be_selected_and_repeated(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    found = model(ids[rows, -1:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids).logits[rows, -1:], rtol=1e-4, atol=1e-4)


def test_steps_last_states_and_offsets_move_with_their_rows(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded
    options = {"warm_start": True, "exit_criterion": "latent_diff", "exit_threshold": 0.5}
    rows = torch.tensor([2, 0, 1])
    before, moved = DynamicCache(), DynamicCache()
    for cache in (before, moved):
        model(ids, attention_mask=mask, past_key_values=cache, **options)
    assert not torch.equal(before.num_steps, before.num_steps[rows])
    moved.reorder_cache(rows)
    for name in ("num_steps", "last_state", "offset"):
        assert torch.equal(getattr(moved, name), getattr(before, name)[rows])
    moved.reset()
    assert moved.num_steps is moved.last_state is moved.offset is None


def test_warm_start_goes_on_from_the_last_state_of_the_token_before(decoder, padded) -> None:
    model, ids = recurrent(decoder, warm_start=True), padded[0]
    cache = DynamicCache()
    first = model(ids[:, :6], past_key_values=cache, output_latent_states=True).latent_states[-1]
    second = model(ids[:, 6:7], past_key_values=cache, output_latent_states=True).latent_states
    assert torch.equal(second[0], first[:, -1:])
    with pytest.raises(ValueError, match="warm_start: the cache holds the states of 3 rows and 1 rows are decoded"):
        model(ids[:1, 7:8], past_key_values=cache)


def test_warm_start_without_a_state_to_go_on_from_starts_anew(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    cache = DynamicCache()
    model(ids, past_key_values=cache, warm_start=True)
    cache.crop(-1)
    found = model(ids[:, -1:], past_key_values=cache, warm_start=True).logits
    torch.testing.assert_close(found, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_greedy_self_speculation_equals_plain_greedy_decoding(decoder, padded, draft_steps: int) -> None:
    model, ids = recurrent(decoder), padded[0][:1]
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=model.with_steps(draft_steps), **GREEDY), expected)
    deeper = model.generate(ids, num_steps=7, **GREEDY)  # the draft keeps its own number of steps
    assert torch.equal(
        model.generate(ids, num_steps=7, assistant_model=model.with_steps(draft_steps), **GREEDY), deeper
    )


def test_a_draft_shares_every_weight_and_keeps_its_steps(decoder, padded) -> None:
    model = recurrent(decoder)
    draft = model.with_steps(2, exit_criterion=None)
    assert all(one is other for one, other in zip(model.parameters(), draft.parameters(), strict=True))
    assert draft(padded[0], num_steps=9).num_steps.unique().tolist() == [2]
    assert model(padded[0]).num_steps.unique().tolist() == [5]
    assert depth_of(model).config.recurrent.get("num_steps") is None
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(draft(padded[0]).logits, model(padded[0], num_steps=2).logits)


@pytest.mark.slow
def test_sampled_self_speculation_draws_from_the_distribution_of_the_full_model(decoder) -> None:
    model = recurrent(decoder, changes={"tie_word_embeddings": False})
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # far from one-hot, far from even
    ids, count, draft = torch.tensor([[5, 9, 3]]), 1500, model.with_steps(1)
    p, q = (which(ids).logits[0, -1].softmax(-1).detach() for which in (model, draft))
    drawn = torch.zeros(37)
    for seed in range(count):
        torch.manual_seed(seed)
        drawn[
            model.generate(ids, assistant_model=draft, **{**GREEDY, "do_sample": True, "max_new_tokens": 2})[0, 3]
        ] += 1
    enough = p * count > 5

    def chi_square(expected: torch.Tensor) -> float:
        return float((((drawn - count * expected) ** 2) / (count * expected))[enough].sum())

    assert chi_square(p) < 2 * int(enough.sum())
    assert chi_square(q) > 10 * int(enough.sum())


def test_unknown_arguments_of_generate_are_still_named(decoder, padded) -> None:
    with pytest.raises(ValueError, match="num_stepz"):
        recurrent(decoder).generate(padded[0], num_stepz=3, **GREEDY)
    with pytest.raises(ValueError, match="num_steps"):
        decoder().generate(padded[0], num_steps=3, **GREEDY)


def test_more_slots_than_steps_are_warned_about(decoder, padded) -> None:
    with pytest.warns(UserWarning, match="kv_slots is 9, more than the 5 steps"):
        recurrent(decoder)(padded[0], kv_slots=9)


def test_caches_that_do_not_fit_are_refused(decoder, padded) -> None:
    model, stack, ids = recurrent(decoder), decoder("full_attention", "full_attention"), padded[0]
    foreign = stack(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds tokens but no layers for the steps"):
        model(ids[:, :1], past_key_values=foreign)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled with 5 steps and the call says num_steps=6"):
        model(ids[:, :1], past_key_values=cache, num_steps=6)
    with pytest.raises(ValueError, match="kv_slots=2"):
        model(ids[:, :1], past_key_values=cache, kv_slots=2)


def test_a_recurrent_state_cannot_share_slots(decoder, padded) -> None:
    model = recurrent(decoder, *MIXES["min_gru-core"])
    with pytest.raises(ValueError, match="cannot take a token back, so steps cannot share a slot"):
        model(padded[0], kv_slots=2, use_cache=True)


def test_static_and_built_caches_are_arranged_in_place(decoder, padded) -> None:
    model, ids = recurrent(decoder), padded[0]
    expected = model(ids).logits
    static = StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(model(ids, past_key_values=static).logits, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(static, StaticCache)
    built = RecurrentDepthCache(model.config, num_steps=4)
    model(ids[:, :6], past_key_values=built, num_steps=4)
    found = model(ids[:, 6:], past_key_values=built, num_steps=4).logits
    torch.testing.assert_close(found, model(ids, num_steps=4).logits[:, 6:], rtol=1e-4, atol=1e-4)
