"""Ways to use a model of recurrent depth, with every kind of mixer inside the loop."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

from tests.models.recurrent import GREEDY, recurrent
from trialist.models import selected_logprobs

MIXERS = ("full_attention", "selective_attention", "min_gru", "min_lstm", "gru")
mixers = pytest.mark.parametrize("mixer", MIXERS)
EXITS = {"exit_criterion": "latent_diff", "exit_threshold": 0.4, "num_steps": 7}


def looped(decoder, mixer: str):
    return recurrent(decoder, "full_attention", mixer, mixer, "full_attention", mean_recurrence=3)


@mixers
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
@torch.no_grad()
def test_beams_and_samples_with_the_cache_are_those_without(decoder, padded, mixer: str, options: dict) -> None:
    model, (ids, mask) = looped(decoder, mixer), padded
    written = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        written.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **options}))
    assert torch.equal(*written)


@mixers
@torch.no_grad()
def test_a_text_in_chunks_has_the_logits_of_the_whole(decoder, padded, mixer: str) -> None:
    model, (ids, mask) = looped(decoder, mixer), padded
    cache, logits = DynamicCache(config=model.config), []
    for start, end in ((0, 2), (2, 3), (3, 7), (7, 11)):
        logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    expected = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], expected[real], rtol=1e-4, atol=1e-4)


@mixers
def test_scores_are_those_of_the_logits(decoder, padded, mixer: str) -> None:
    model, (ids, mask) = looped(decoder, mixer), padded
    expected = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = expected * (mask[:, 1:] * mask[:, :-1])
    torch.testing.assert_close(selected_logprobs(model, ids, mask), expected, rtol=1e-4, atol=1e-4)


@mixers
@torch.no_grad()
def test_an_adapted_model_generates_with_and_without_cache_and_reloads(decoder, padded, tmp_path, mixer: str) -> None:
    (ids, mask), lora = padded, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(looped(decoder, mixer), lora).eval()
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    adapted = model.generate(**given)
    assert not torch.equal(adapted, looped(decoder, mixer).generate(**given))
    assert torch.equal(adapted, model.generate(**given, use_cache=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(looped(decoder, mixer), tmp_path).eval()
    assert torch.equal(again.generate(**given), adapted)


@pytest.mark.parametrize("options", [{}, EXITS, {"kv_slots": 2}], ids=["plain", "looks", "shared slots"])
@torch.no_grad()
def test_bfloat16_decodes_close_to_float32(decoder, padded, options: dict) -> None:
    ids, logits = padded[0], []
    if options == EXITS:  # rounding may move a stop, which is no small change of the logits
        options = {**EXITS, "exit_threshold": 0.0}
    for dtype in (torch.float32, torch.bfloat16):
        model, cache = recurrent(decoder).to(dtype), DynamicCache()
        logits.append(
            torch.cat([model(part, past_key_values=cache, **options).logits for part in ids.split([6, 1, 1, 3], 1)], 1)
        )
        assert {layer.keys.dtype for layer in cache.layers} == {dtype}
        assert model.generate(ids, **options, **GREEDY).shape == (3, 19)
    similar = torch.nn.functional.cosine_similarity(logits[0], logits[1].float(), dim=-1)
    assert similar.min() > 0.98


@torch.no_grad()
def test_a_selective_core_shares_slots_row_by_row_and_is_exact_with_a_slot_for_every_step(decoder, padded) -> None:
    model, (ids, mask) = looped(decoder, "selective_attention"), padded
    exact = model.generate(ids, attention_mask=mask, kv_slots=3, **GREEDY)
    assert torch.equal(exact, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))
    together = model.generate(ids, attention_mask=mask, kv_slots=2, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, int((mask[row] == 0).sum()) :], kv_slots=2, **GREEDY)
        assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs a GPU to come back to")
@pytest.mark.parametrize("options", [{}, EXITS, {"exit_criterion": "kl", "exit_threshold": 0.3}, {"kv_slots": 2}])
@torch.no_grad()
def test_an_offloaded_cache_decodes_as_one_that_stays(decoder, padded, options: dict) -> None:
    model, ids, mask = recurrent(decoder).to("cuda"), *(tensor.to("cuda") for tensor in padded)
    given = {"attention_mask": mask, **options, **GREEDY}
    expected = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **given), expected)
