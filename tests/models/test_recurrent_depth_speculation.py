"""Self-speculation: drafts of fewer steps, and where checking them would not be what plain decoding writes."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import DynamicCache

from tests.models.recurrent import GREEDY, recurrent
from trialist.models import deterministic_scoring, with_steps
from trialist.models.recurrent_depth.steps import depth_of

LOSSY = {
    "warm start": ({"warm_start": True}, "starts from the final state of the token before"),
    "shared slots": ({"kv_slots": 2}, "kv_slots=2 of 5 steps"),
    "kl": ({"exit_criterion": "kl", "exit_threshold": 0.3}, "looks through the coda"),
    "minp_kl": ({"exit_criterion": "minp_kl"}, "looks through the coda"),
    "entropy_diff": ({"exit_criterion": "entropy_diff"}, "looks through the coda"),
    "argmax": ({"exit_criterion": "argmax"}, "looks through the coda"),
}
REPEATED = [5, 9, 3, 21, 5, 9, 3, 21, 5, 9]


@pytest.mark.parametrize(("options", "words"), LOSSY.values(), ids=LOSSY)
def test_speculation_that_would_change_the_text_is_refused_with_the_reason(
    decoder, padded, options: dict, words: str
) -> None:
    model, ids = recurrent(decoder), padded[0][:1]
    for speculation in ({"assistant_model": model.with_steps(2)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=f"would not write what plain decoding writes.*{words}"):
            model.generate(ids, **speculation, **options, **GREEDY)
    configured = recurrent(decoder, **options)
    with pytest.raises(ValueError, match=words):
        configured.generate(ids, assistant_model=configured.with_steps(2, exit_criterion=None, kv_slots=None), **GREEDY)


@pytest.mark.parametrize(
    "options",
    [{"kv_slots": 5}, {"exit_criterion": "cosine", "exit_threshold": 0.1}, {"num_steps": 7}],
    ids=["a slot for every step", "latent exit", "deeper"],
)
def test_drafts_and_prompt_lookup_write_what_plain_decoding_writes(decoder, options: dict) -> None:
    model, ids = recurrent(decoder), torch.tensor([REPEATED])
    expected = model.generate(ids, **options, **GREEDY)
    for speculation in ({"assistant_model": model.with_steps(2)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **speculation, **options, **GREEDY), expected)


def test_without_coda_the_kl_exit_may_speculate(decoder) -> None:
    model, ids = recurrent(decoder, prelude_layers=2, coda_layers=0), torch.tensor([REPEATED])
    options = {"exit_criterion": "kl", "exit_threshold": 0.1}
    expected = model.generate(ids, **options, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=model.with_steps(2), **options, **GREEDY), expected)


def test_a_draft_may_decode_in_ways_that_the_full_model_may_not(decoder) -> None:
    model, ids = recurrent(decoder), torch.tensor([REPEATED])
    draft = model.with_steps(3, kv_slots=1, warm_start=True)
    assert torch.equal(model.generate(ids, assistant_model=draft, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("where", ["forward", "whole", "core"])
def test_the_draft_of_a_compiled_model_runs_its_own_steps(decoder, padded, where: str) -> None:
    model, ids = recurrent(decoder), padded[0]
    expected = model(ids, num_steps=2).logits
    wrapped = model
    if where == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif where == "core":
        depth_of(model).core.compile(backend="eager")
    else:
        wrapped = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(disable=True):  # what is looked at is which module runs
        output = with_steps(wrapped, 2)(ids)
    assert output.num_steps.unique().tolist() == [2]
    torch.testing.assert_close(output.logits, expected)


def test_a_model_behind_hooks_of_accelerate_gives_no_draft(decoder) -> None:
    model = recurrent(decoder)
    add_hook_to_module(model.model.norm, AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ValueError, match="run through hooks of accelerate"):
        model.with_steps(2)


def test_a_draft_made_while_scores_are_held_runs_its_own_steps(decoder, padded) -> None:
    model = recurrent(decoder)
    with deterministic_scoring(model, 4):
        draft = model.with_steps(2)
        assert draft(padded[0]).num_steps.unique().tolist() == [2]
    assert draft(padded[0]).num_steps.unique().tolist() == [2]


@torch.no_grad()
def test_drafted_tokens_are_scored_as_they_are_one_by_one(decoder) -> None:
    """The property that speculation rests on, without `generate`."""
    model, ids = recurrent(decoder), torch.tensor([REPEATED])
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    together = copy.deepcopy(cache)
    one_by_one = [model(token, past_key_values=cache).logits for token in ids[:, 6:].split(1, dim=1)]
    found = model(ids[:, 6:], past_key_values=together).logits
    torch.testing.assert_close(found, torch.cat(one_by_one, 1), rtol=1e-4, atol=1e-4)
