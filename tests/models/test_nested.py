"""Nested layers within models: precision, round trips, casts, training, adapters, compilation."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trialist.models import (
    NestedLinear,
    NestedQuantConfig,
    available_bits,
    get_precision,
    load_model,
    nested_lora,
    precision,
    precision_dials,
    selected_logprobs,
    set_precision,
    train_around,
)
from trialist.models.nested.precision import nested_layers
from trialist.weights.nested import quantize_nested

from .conftest import GREEDY, tokens


@pytest.fixture
def nested(family):
    def build(name="llama", **settings):
        model = family(name)
        quantize_nested(model, NestedQuantConfig(sensitivity="none", **settings))
        return model

    return build


def logits(model, bits=None):
    with torch.no_grad():
        if bits is None:
            return model(tokens()).logits
        with precision(model, bits):
            return model(tokens()).logits


def test_a_layer_reads_the_precision_of_the_call_or_of_its_dial():
    layer = NestedLinear(70, 5, (2, 4), bias=True)
    layer.qweight.random_(generator=torch.Generator().manual_seed(0))
    layer.lut2.normal_()
    layer.lut4.normal_()
    x = torch.randn(3, 70)
    with torch.no_grad():
        layer.eval().bias.normal_()
        for bits in (2, 4):
            expected = x @ layer.dequantize(bits).T + layer.bias
            torch.testing.assert_close(layer(x, bits=bits), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(layer(x), layer(x, bits=4))
        layer.dial.set(2)
        assert torch.equal(layer(x), layer(x, bits=2))
        assert torch.equal(layer.weight, layer.dequantize(2))
    with pytest.raises(ValueError, match="cannot be read at 3 bits; they can at 2 or 4"):
        layer(x, bits=3)


def test_a_block_reads_at_its_precision_and_gives_the_former_one_back(nested):
    model = nested()
    before = logits(model)
    assert get_precision(model) == 4
    with precision(model, 2):
        assert get_precision(model) == 2
        with pytest.raises(RuntimeError), precision(model, 3):
            raise RuntimeError
        assert get_precision(model) == 2
    assert torch.equal(logits(model), before)
    set_precision(model, 3)
    assert torch.equal(logits(model), logits(model, 3))
    assert not torch.equal(logits(model), before)


def test_one_dial_serves_a_whole_model_and_a_copy_has_its_own(nested):
    model = nested()
    (dial,) = precision_dials(model)
    other = copy.deepcopy(model)
    dial.set(2)
    assert get_precision(model) == 2
    assert get_precision(other) == 4
    assert available_bits(model) == (2, 3, 4)


def test_unknown_precisions_name_those_that_there_are(nested, family):
    model = nested()
    for call in (set_precision, lambda model, bits: precision(model, bits).__enter__()):
        with pytest.raises(ValueError, match="cannot be read at 5 bits; they can at 2, 3 or 4"):
            call(model, 5)
    assert get_precision(model) == 4
    with pytest.raises(ValueError, match="trialist apply quantize --model MODEL --method nested --bits 2-4"):
        set_precision(family("llama"), 3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gptneox"])
def test_a_saved_model_is_the_same_at_every_precision(nested, name, tmp_path):
    model = nested(name, nesting="joint")
    model.save_pretrained(tmp_path)
    back, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert set(nested_layers(back)) == set(nested_layers(model))
    for bits in (2, 3, 4):
        assert torch.equal(logits(back.eval(), bits), logits(model, bits))
    back.save_pretrained(tmp_path / "again")
    again = load_model(str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))
    assert get_precision(again) == 4
    assert len(precision_dials(again)) == 1
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "nested"
    assert stored["nesting"] == "joint"


def test_a_head_with_codes_of_its_own_is_saved_apart_from_the_embedding(family, tmp_path):
    model = family("gpt2")
    quantize_nested(model, NestedQuantConfig(sensitivity="none", modules_to_not_convert=[]))
    assert isinstance(model.lm_head, NestedLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


def test_a_model_for_another_task_takes_the_same_body(nested, tmp_path):
    model = nested()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    assert len(nested_layers(classifier)) == len(nested_layers(model))
    with torch.no_grad():
        states = [m.model(tokens()).last_hidden_state for m in (classifier, model)]
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_reach_activations_and_never_tables(nested, dtype, tmp_path):
    model = nested()
    model.save_pretrained(tmp_path)
    for cast in (copy.deepcopy(model).to(getattr(torch, dtype)), load_model(str(tmp_path), dtype=dtype)):
        layer = next(iter(nested_layers(cast).values()))
        assert layer.lut3.dtype == torch.float16
        assert layer.qweight.dtype == torch.int64
        found = logits(cast)
        assert found.dtype == getattr(torch, dtype)
        torch.testing.assert_close(found.float(), logits(model), atol=0.6, rtol=0.1)
    twice = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(next(iter(nested_layers(twice).values())).lut4, next(iter(nested_layers(model).values())).lut4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_dequantised_model_is_an_ordinary_one_with_the_weights_of_its_precision(nested, name, tmp_path):
    model = nested(name)
    set_precision(model, 3)
    expected = logits(model)
    dense = copy.deepcopy(model).dequantize()
    assert not nested_layers(dense)
    torch.testing.assert_close(logits(dense), expected, atol=1e-3, rtol=1e-3)
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(str(tmp_path))), logits(dense))


def test_log_probabilities_through_a_nested_head_are_those_of_its_logits(family):
    model = family("llama")
    quantize_nested(model, NestedQuantConfig(sensitivity="none", modules_to_not_convert=[]))
    ids = tokens()
    expected = logits(model).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    with torch.no_grad():
        torch.testing.assert_close(selected_logprobs(model, ids), expected, atol=1e-4, rtol=1e-4)


def test_training_mode_is_refused_with_what_to_do(nested):
    model = nested().train()
    with pytest.raises(RuntimeError, match=r"train LoRA adapters over them .* or say train_around"):
        model(tokens())
    with torch.no_grad():
        model(tokens())  # measuring in training mode is harmless
    train_around(model)
    model(tokens()).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(not buffer.requires_grad for buffer in model.buffers())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_over_nested_layers_learn_save_and_load(nested, name, tmp_path):
    model = nested(name)
    model.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj"] if name == "llama" else ["c_attn", "mlp.c_proj"]
    base = load_model(str(tmp_path / "base"))
    tuned = get_peft_model(base, nested_lora(LoraConfig(r=2, target_modules=targets)))
    assert torch.equal(logits(tuned.eval()), logits(model))  # a new adapter adds nothing
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 0.05)
    tuned.train()
    losses = []
    for _ in range(4):
        loss = tuned(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    tuned.eval()
    tuned.save_pretrained(tmp_path / "adapter")
    back = load_model(str(tmp_path / "adapter"))
    for bits in (2, 4):
        torch.testing.assert_close(logits(back, bits), logits(tuned, bits))
    assert not torch.equal(logits(tuned), logits(model))
    with pytest.raises(ValueError, match="cannot be merged into nested weights"):
        tuned.merge_and_unload()


def test_adapters_that_need_dense_weights_are_refused(nested):
    with pytest.raises(ValueError, match="DoRA scales the weights themselves"):
        get_peft_model(nested(), nested_lora(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)))
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(nested(), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generation_runs_at_the_precision_of_its_block(nested, more):
    model = nested()
    ids = tokens(1, 6)
    found = []
    for bits in (2, 4):
        with precision(model, bits):
            torch.manual_seed(0)
            found.append(model.generate(ids, **{**GREEDY, **more}))
        dense = copy.deepcopy(model)
        set_precision(dense, bits)
        torch.manual_seed(0)
        assert torch.equal(found[-1], dense.dequantize().generate(ids, **{**GREEDY, **more}))
    assert not torch.equal(*found)


@pytest.mark.slow
def test_a_compiled_model_follows_its_dial(nested):
    model = nested()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for bits in (4, 2, 4):
            with precision(model, bits):
                torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits)


def test_a_configuration_without_layers_is_refused(family, tmp_path):
    model = family("llama")
    model.config.quantization_config = NestedQuantConfig().to_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no nested layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
