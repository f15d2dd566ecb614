"""Every mixer with every feed-forward in a plain stack; the same inside the loop of recurrent depth stands in
`test_recurrent_depth_mixes`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trialist.models import enable_eviction, selected_logprobs, set_budgets
from trialist.models.configuration import FEED_FORWARDS, MIXERS, RECURRENT_MIXERS
from trialist.models.documents import keeps_documents_apart

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PEER = {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_dim": 8}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
every_feed_forward = pytest.mark.parametrize("ffn", FEED_FORWARDS)


@pytest.fixture
def mix(decoder):
    """Two layers of the mixer and one of full attention between them, so that layers of different kinds share a cache."""

    def build(mixer: str, ffn: str, **changes):
        return decoder(mixer, "full_attention", mixer, ffn_types=[ffn, "swiglu", ffn], peer=PEER, **changes)

    return build


@every_mixer
@every_feed_forward
def test_every_way_of_decoding_gives_the_tokens_of_full_passes(mix, padded, mixer: str, ffn: str) -> None:
    model, (ids, mask) = mix(mixer, ffn), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    assert torch.equal(model.generate(ids[1:2, 4:], **GREEDY)[0], uncached[1, 4:]), "padding on the left changes tokens"
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=2, use_cache=cache, **GREEDY)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)
    sampled = []
    for cache in (True, False):
        torch.manual_seed(3)
        sampled.append(model.generate(ids, attention_mask=mask, use_cache=cache, **{**GREEDY, "do_sample": True}))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("mixer", ["full_attention", "selective_attention", *RECURRENT_MIXERS])
@pytest.mark.parametrize("policy", ["penalty", "recency", "h2o"])
def test_under_budgets_every_way_of_decoding_gives_the_tokens_of_full_passes(
    mix, padded, mixer: str, policy: str
) -> None:
    """Policies act on all layers with attention, the penalty on selective ones; recurrent mixers stand between them."""
    model, (ids, mask) = mix(mixer, "swiglu").double(), padded
    if policy != "penalty":
        enable_eviction(model, policy, 5)
    elif mixer == "selective_attention":
        set_budgets(model, [4, 6])
    else:
        pytest.skip("no selective layer")
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=cache, **GREEDY) for cache in (True, False)
    ]
    assert torch.equal(*beams)


@every_mixer
@every_feed_forward
def test_packed_documents_are_scored_as_if_they_stood_alone(mix, mixer: str, ffn: str) -> None:
    with torch.no_grad():
        assert keeps_documents_apart(mix(mixer, ffn), 3, torch.device("cpu"))


@every_mixer
@every_feed_forward
def test_saved_and_loaded_model_gives_the_same_bits(mix, padded, tmp_path, mixer: str, ffn: str) -> None:
    model = mix(mixer, ffn)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(padded[0]).logits, loaded(padded[0]).logits)


@every_mixer
@every_feed_forward
def test_training_in_bfloat16_autocast_reaches_every_parameter(mix, padded, mixer: str, ffn: str) -> None:
    model = mix(mixer, ffn).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(padded[0], attention_mask=padded[1], labels=padded[0]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_mixer
def test_lora_on_every_linear_layer_decodes_as_it_scores(mix, padded, mixer: str) -> None:
    model = get_peft_model(mix(mixer, "peer"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    ids, mask = padded
    generated = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(generated, uncached)


@every_mixer
@every_feed_forward
def test_scored_log_probabilities_are_those_of_the_logits(mix, padded, mixer: str, ffn: str) -> None:
    model, (ids, mask) = mix(mixer, ffn), padded
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    log_p = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(-1, ids[:, 1:, None])[..., 0] * (mask[:, 1:] & mask[:, :-1])
    torch.testing.assert_close(selected_logprobs(model, ids, mask), expected, rtol=1e-4, atol=1e-4)


@every_mixer
@every_feed_forward
def test_gradient_checkpointing_changes_no_gradient(mix, padded, mixer: str, ffn: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mix(mixer, ffn).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(padded[0], attention_mask=padded[1], labels=padded[0]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@every_mixer
@every_feed_forward
def test_weights_in_bfloat16_decode_what_they_score_highest(mix, padded, mixer: str, ffn: str) -> None:
    """Up to the rounding of logits, by which another order of the same sums may differ."""
    model, (ids, mask) = mix(mixer, ffn).bfloat16(), padded
    found = model.generate(ids, attention_mask=mask, **GREEDY)
    everything = torch.cat([mask, torch.ones_like(found[:, 11:])], 1)
    positions = (everything.cumsum(-1) - 1).clamp(min=0)
    logits = model(found, attention_mask=everything, position_ids=positions).logits[:, 10:-1].float()
    chosen = logits.gather(-1, found[:, 11:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()


@pytest.mark.slow
@every_mixer
def test_the_compiled_model_gives_the_logits_of_the_plain_one(mix, padded, mixer: str) -> None:
    model, (ids, mask) = mix(mixer, "swiglu"), padded
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, model(ids, attention_mask=mask).logits, rtol=1e-4, atol=1e-4)
