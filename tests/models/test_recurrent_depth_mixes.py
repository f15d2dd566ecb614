"""Every mixer with every feed-forward inside the loop."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.recurrent import GREEDY, recurrent
from trialist.models import enable_eviction, enable_selective_attention, kv_bytes, memory_profile, set_budgets
from trialist.models.configuration import FEED_FORWARDS, MIXERS

PEER = {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_dim": 8}
mixers = pytest.mark.parametrize("mixer", MIXERS)
feed_forwards = pytest.mark.parametrize("ffn", FEED_FORWARDS)


def mix(decoder, mixer: str, ffn: str):
    changes = {"ffn_types": ["swiglu", ffn, ffn, "swiglu"], "peer": PEER}
    return recurrent(decoder, "full_attention", mixer, mixer, "full_attention", changes=changes, mean_recurrence=3)


@mixers
@feed_forwards
def test_cached_generation_equals_uncached_in_a_padded_batch(decoder, padded, mixer: str, ffn: str) -> None:
    model, (ids, mask) = mix(decoder, mixer, ffn), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)
    alone = model.generate(ids[1:2, 4:], **GREEDY)
    assert torch.equal(uncached[1, 4:], alone[0])


SWAPS = {
    "native penalty": ("selective_attention", lambda model: set_budgets(model, [4, 6])),
    "penalty": ("full_attention", lambda model: enable_selective_attention(model, budgets=[4, 6, 4, 5])),
    "recency": ("full_attention", lambda model: enable_eviction(model, "recency", 6, sinks=1)),
    "h2o": ("full_attention", lambda model: enable_eviction(model, "h2o", [4, 6, 4, 5])),
    "h2o beside the penalty": ("selective_attention", lambda model: enable_eviction(model, "h2o", 5)),
}
swaps = pytest.mark.parametrize(("mixer", "enable"), SWAPS.values(), ids=SWAPS)


@swaps
def test_under_budgets_cached_generation_equals_uncached_in_a_padded_batch(decoder, padded, mixer: str, enable) -> None:
    model, (ids, mask) = mix(decoder, mixer, "swiglu").double(), padded
    enable(model)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    for options in ({}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), uncached), options
    lookup = model.generate(ids[:1], prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **GREEDY)
    assert torch.equal(lookup, uncached[:1])


@pytest.mark.parametrize("enable", [enable_selective_attention, enable_eviction])
def test_tokens_that_exit_early_cannot_be_evicted_or_selected(decoder, padded, enable) -> None:
    model = recurrent(decoder)
    enable(model, budgets=5)
    with pytest.raises(ValueError, match="tokens that exit early, by exit_criterion, cannot be evicted or selected"):
        model(padded[0], exit_criterion="latent_diff")


def test_profiled_layers_add_up_to_the_cache_of_all_steps(decoder) -> None:
    model = recurrent(decoder, *["selective_attention"] * 4, mean_recurrence=3)
    set_budgets(model, [4, 6, 5, 7])
    rows = torch.randint(3, 37, (2, 20), generator=torch.Generator().manual_seed(1))
    profile = memory_profile(model, rows)
    noted = 8 * (20 + 1)  # how many steps each token ran, and where the row begins
    assert sum(layer.bytes for layer in profile) + noted == kv_bytes(model, rows)
    single = [memory_profile(model.with_steps(1), rows)[index].bytes for index in range(4)]
    assert [layer.bytes for layer in profile] == [single[0], 3 * single[1], 3 * single[2], single[3]]


@mixers
@feed_forwards
def test_saved_and_loaded_model_gives_the_same_bits(decoder, padded, tmp_path, mixer: str, ffn: str) -> None:
    model = mix(decoder, mixer, ffn)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(padded[0]).logits, AutoModelForCausalLM.from_pretrained(tmp_path).eval()(padded[0]).logits)


@mixers
@feed_forwards
def test_training_under_autocast_reaches_every_parameter_of_the_loop(decoder, padded, mixer: str, ffn: str) -> None:
    model = mix(decoder, mixer, ffn).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(padded[0], labels=padded[0], num_steps=(1, 2)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@mixers
def test_gradient_checkpointing_changes_no_gradient(decoder, padded, mixer: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mix(decoder, mixer, "swiglu").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(padded[0], labels=padded[0], num_steps=(1, 2)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_recurrent_mixer_in_the_loop_refuses_speculation(decoder, padded) -> None:
    model = mix(decoder, "min_gru", "swiglu")
    with pytest.raises(ValueError, match=r"(?i)assist|crop|stateful|roll"):
        model.generate(padded[0][:1], assistant_model=model.with_steps(1), **GREEDY)


def test_one_step_of_the_trl_trainer_trains_the_loop(decoder, tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
    datasets = pytest.importorskip("datasets")
    model = recurrent(decoder)
    before = model.model.layers.core.adapter.weight.detach().clone()
    rows = datasets.Dataset.from_dict({"input_ids": [list(range(3, 14))] * 4})
    from trialist.data.tokenizers import byte_tokenizer

    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no", disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer()).train()
    assert not torch.equal(model.model.layers.core.adapter.weight, before)
