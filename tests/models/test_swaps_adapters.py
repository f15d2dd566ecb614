"""Adapters of PEFT on models whose feed-forward was swapped."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.models.conftest import swapped_layers
from trialist.models import enable_selective_attention, grow_experts, load_model, model_digest, peer_metrics
from trialist.models.loading import model_context
from trialist.models.selective_attention.swap import is_selective


def test_adapters_leave_the_tables_alone_and_train(swapped, padded) -> None:
    model = get_peft_model(swapped(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {n for n in model.base_model.targeted_module_names if "layers.1.mlp" in n} == {
        "model.layers.1.mlp.query_proj"
    }
    ids, mask = padded
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def adapted_by(swapped, **options):
    return get_peft_model(swapped(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], **options))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_padding_reaches_a_layer_that_peft_trains_as_a_whole(swapped, padded, checkpointing: bool) -> None:
    ids, mask = padded
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100
    found = []
    for content in (0, 9):
        model = adapted_by(swapped, modules_to_save=["layers.1.mlp"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=torch.where(mask.bool(), ids, content), attention_mask=mask, labels=labels).loss
        loss.backward()
        (layer,) = (layer for layer in swapped_layers(model) if layer.up[0].requires_grad)
        found.append([loss, layer.query_proj.weight.grad, layer.up[0].grad, layer.query_norm.running_var])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_metrics_are_those_of_the_copy_that_runs(swapped, padded) -> None:
    model = adapted_by(swapped, modules_to_save=["layers.1.mlp"]).eval()
    batch = {"input_ids": padded[0], "attention_mask": padded[1]}
    (expected,) = peer_metrics(swapped(), [batch]).values()
    copies = [layer for layer in swapped_layers(model) if layer.up[0].requires_grad]
    with torch.no_grad():
        copies[0].keys[0].mul_(-1)
    with model.disable_adapter():
        assert list(peer_metrics(model, [batch]).values()) == [pytest.approx(expected)]
    assert list(peer_metrics(model, [batch]).values()) != [pytest.approx(expected)]


def test_growth_after_wrapping_is_refused(swapped) -> None:
    for options in ({}, {"modules_to_save": ["layers.1.mlp"]}):
        with pytest.raises(ValueError, match="grow before wrapping"):
            grow_experts(adapted_by(swapped, **options), 9)


@pytest.mark.parametrize("modules_to_save", [None, ["layers.1.mlp"]], ids=["adapters alone", "with the new layer"])
def test_an_adapter_folder_is_loaded_onto_the_swapped_model_it_was_trained_on(
    swapped, padded, tmp_path, modules_to_save
) -> None:
    ids, mask = padded
    swapped().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, modules_to_save=modules_to_save)
    model = get_peft_model(load_model(str(tmp_path / "base")), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, swapped()(ids).logits)
    assert model_context(str(tmp_path / "adapter")) == 64
    before = model_digest(str(tmp_path / "adapter"))
    swapped(glu=True).save_pretrained(tmp_path / "base")
    assert model_digest(str(tmp_path / "adapter")) != before


def test_an_adapter_without_its_model_or_with_weights_missing_is_refused(swapped, tmp_path) -> None:
    swapped().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_model(str(tmp_path / "base")), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 of the weights of an adapter of LlamaForCausalLM"):
        load_model(str(tmp_path / "adapter"))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "keys" not in n}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"is an adapter of .*lacks 1 of the weights of a LlamaForCausalLM: .*keys.0"):
        load_model(str(tmp_path / "adapter"))
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"is an adapter of .*base.* does not exist"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_of_a_selective_model_is_loaded_onto_a_selective_model(family, padded, tmp_path) -> None:
    enable_selective_attention(family("llama")).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(str(tmp_path / "base")), lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"))
    assert is_selective(loaded)
    assert torch.equal(loaded(padded[0]).logits, model(padded[0]).logits)
