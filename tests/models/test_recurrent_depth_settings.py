"""What a call may say, what a configuration may hold, and that what is refused leaves nothing behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tests.models.recurrent import GREEDY, recurrent
from trialist.models import deterministic_scoring, set_mean_recurrence, set_num_steps, with_steps
from trialist.models.recurrent_depth.cache import RecurrentDepthCache
from trialist.models.recurrent_depth.steps import depth_of


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))


def steps_of(output) -> list[int]:
    return output.num_steps.unique().tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_mean_recurrence(model, 0),
        lambda model: set_num_steps(model, -3),
        lambda model: set_num_steps(model, None),
        lambda model: with_steps(model, 2, prelude_layers=2),
        lambda model: with_steps(model, 2, exit_criterion="latent_diff", min_steps=3),
        lambda model: deterministic_scoring(model, 0).__enter__(),
    ],
)
def test_a_refused_change_leaves_the_model_as_it_was(decoder, ids, change) -> None:
    model = recurrent(decoder)
    before = dict(model.config.recurrent)
    with pytest.raises(ValueError, match=r"must be a whole number|no call option|min_steps is 3"):
        change(model)
    assert model.config.recurrent == before
    assert steps_of(model(ids)) == [5]
    assert steps_of(model.train()(ids, num_steps=3)) == [3]


def test_whole_numbers_of_numpy_are_numbers_of_steps(decoder, ids, tmp_path) -> None:
    model = recurrent(decoder)
    assert steps_of(model(ids, num_steps=np.int64(3))) == [3]
    assert steps_of(model(ids, num_steps=(np.int64(1), np.int32(2)))) == [3]
    set_num_steps(model, np.int64(4))
    assert steps_of(model(ids)) == [4]
    model.save_pretrained(tmp_path)  # as JSON


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exit_criterion": "latent_diff", "min_steps": 9}, "min_steps is 9, more than num_steps, which is 5"),
        ({"exit_threshold": 0.5}, "a threshold belongs to a criterion"),
        ({"exit_criterion": "kl", "exit_threshold": "low"}, "recurrent.exit_threshold is 'low'"),
        ({"recurrence_sigma": math.inf}, "recurrent.recurrence_sigma is inf; it must be a finite number"),
        ({"warm_start": "no"}, "recurrent.warm_start is 'no'; it must be True or False"),
        ({"core_norm": "false"}, "recurrent.core_norm is 'false'; it must be True or False"),
        ({"embedding_scale": math.nan}, "recurrent.embedding_scale is nan"),
        ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
    ],
)
def test_configurations_that_cannot_work_are_refused_when_they_are_made(decoder, settings: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):  # strict configurations wrap the ValueError
        recurrent(decoder, **settings)


def test_none_in_a_call_switches_a_configured_exit_off(decoder, ids) -> None:
    model = recurrent(decoder, exit_criterion="latent_diff", exit_threshold=math.inf, min_steps=2)
    assert steps_of(model(ids)) == [2]
    assert steps_of(model(ids, exit_criterion=None)) == [5]


def test_none_in_a_call_switches_configured_shared_slots_off(decoder, ids) -> None:
    model = recurrent(decoder, kv_slots=2)
    assert len(model(ids, use_cache=True).past_key_values.layers) == 1 + 2 * 2 + 1
    assert len(model(ids, use_cache=True, kv_slots=None).past_key_values.layers) == 1 + 5 * 2 + 1


def test_another_criterion_than_the_configured_one_brings_its_own_threshold(decoder, ids) -> None:
    model = recurrent(decoder, exit_criterion="latent_diff", exit_threshold=math.inf)
    assert steps_of(model(ids)) == [1]
    alone = recurrent(decoder)(ids, exit_criterion="cosine")
    assert torch.equal(model(ids, exit_criterion="cosine").num_steps, alone.num_steps)
    assert steps_of(alone) != [1]
    draft = model.with_steps(4, exit_criterion="cosine")
    assert draft.config.recurrent["exit_threshold"] is None


@pytest.mark.parametrize("option", [{"exit_threshold": 0.5}, {"min_steps": 50}, {"check_every": 2}])
def test_options_of_an_exit_without_a_criterion_are_refused(decoder, ids, option: dict) -> None:
    model = recurrent(decoder)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* says when tokens exit, and in this pass none does"):
        model(ids, **option)
    with pytest.raises(ValueError, match="give exit_criterion too"):
        model.generate(ids, **option, **GREEDY)
    with pytest.raises(ValueError, match="give exit_criterion too"):
        model.with_steps(2, **option)


def test_generation_configurations_choose_the_steps_and_calls_have_the_last_word(decoder, padded) -> None:
    model, (ids, mask) = recurrent(decoder), padded

    def taken(**options) -> list[int]:
        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        return output.past_key_values.num_steps[0].unique().tolist()

    assert taken(generation_config=GenerationConfig(num_steps=2, **GREEDY)) == [2]
    model.generation_config.num_steps = 3
    assert taken(**GREEDY) == [3]
    assert taken(num_steps=4, **GREEDY) == [4]
    assert taken(generation_config=GenerationConfig(num_steps=2, **GREEDY)) == [2]


@pytest.mark.parametrize(
    ("types", "options", "words"),
    [
        ("full_attention", {"exit_criterion": "latent_diff", "min_steps": 9}, "min_steps is 9"),
        (
            "full_attention",
            {"exit_criterion": "latent_diff", "output_hidden_states": True},
            "take output_latent_states",
        ),
        ("min_gru", {"num_steps": 2}, "cannot stand in for the others"),
        ("selective_attention", {"num_steps": 2}, "cannot stand in for the others"),
        ("min_gru", {"num_steps": 7}, "Go on with the same numbers, or start from an empty cache"),
        ("full_attention", {"num_steps": 7}, r"fewer steps may follow more"),
    ],
)
def test_a_refused_call_leaves_the_cache_as_it_was(decoder, ids, types: str, options: dict, words: str) -> None:
    model = recurrent(decoder, "full_attention", types, types, "full_attention")
    cache, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for each in (cache, alone):
        model(ids[:, :4], past_key_values=each)
    with pytest.raises(ValueError, match=words):
        model(ids[:, 4:], past_key_values=cache, **options)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {4}
    found, wanted = (model(ids[:, 4:], past_key_values=each).logits for each in (cache, alone))
    assert torch.equal(found, wanted)


def test_shared_slots_of_a_recurrent_mixer_are_refused_before_anything_is_written(decoder, ids) -> None:
    model = recurrent(decoder, "full_attention", "min_gru", "full_attention", "full_attention")
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="cannot take a token back"):
        model(ids, past_key_values=cache, kv_slots=2)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {0}
    with pytest.raises(ValueError, match="cannot take a token back"):
        model.generate(ids, kv_slots=2, **GREEDY)


def test_a_refused_training_pass_draws_no_number_of_steps(decoder, ids) -> None:
    model = recurrent(decoder).train()
    with pytest.raises(ValueError, match="belongs to evaluation"):
        model(ids, exit_criterion="kl")
    with pytest.raises(ValueError, match="num_steps is 0"):
        model(ids, num_steps=0)
    assert int(depth_of(model).passes) == 0


def test_a_cache_made_by_hand_has_a_slot_for_every_step_or_as_many_as_said(decoder) -> None:
    config = recurrent(decoder, kv_slots=3).config
    assert RecurrentDepthCache(config).slots == 5
    assert RecurrentDepthCache(config, kv_slots=2).slots == 2
