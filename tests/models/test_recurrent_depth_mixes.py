"""Every mixer with every feed-forward inside the loop."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.recurrent import GREEDY, recurrent

PEER = {"num_experts": 64, "num_heads": 2, "top_k": 3, "key_dim": 8}
mixers = pytest.mark.parametrize("mixer", ["full_attention", "selective_attention", "min_gru", "min_lstm"])
feed_forwards = pytest.mark.parametrize("ffn", ["swiglu", "peer"])


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
