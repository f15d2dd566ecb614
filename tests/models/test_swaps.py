from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models.conftest import GREEDY, SIZES
from trialist.models import grow_experts, load_model, model_digest, peer_metrics, selected_logprobs, swap_ffn
from trialist.models.swaps import SwappedPEER

SETTINGS = {"num_experts": 49, "num_heads": 3, "top_k": 4, "key_dim": 6}
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "smollm3", "gpt2", "gptneox"]
families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def swapped(family):
    def build(name: str = "llama", layers=(1,), **settings):
        model = family(name)
        torch.manual_seed(3)
        swap_ffn(model, layers, "peer", **{**SETTINGS, **settings})
        for module in model.modules():
            if isinstance(module, SwappedPEER):
                module.query_norm.running_mean.normal_()  # as after training
        return model.eval()

    return build


def layers_of(model) -> list[SwappedPEER]:
    return [module for module in model.modules() if isinstance(module, SwappedPEER)]


@families
def test_the_feed_forward_of_the_named_layer_alone_is_replaced(family, padded, name: str) -> None:
    model = family(name)
    before = {key for key in model.state_dict() if ".1." in key}
    untouched = {key: value.clone() for key, value in model.state_dict().items() if ".0." in key}
    swap_ffn(model, [1], **SETTINGS)
    after = model.state_dict()
    gone = before - set(after)
    assert len(gone) in (2, 3, 4)
    assert all("mlp" in key for key in gone)
    assert all(torch.equal(after[key], value) for key, value in untouched.items())
    assert len(layers_of(model)) == 1
    assert torch.isfinite(model(padded[0]).logits).all()


@families
def test_cached_greedy_generation_of_left_padded_rows_equals_uncached(swapped, padded, name: str) -> None:
    model, (ids, mask) = swapped(name), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


@families
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_padding_reaches_the_layer_in_training_also_when_it_is_recomputed(
    swapped, padded, name: str, checkpointing: bool
) -> None:
    ids, mask = padded
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # the first real token of this row is predicted from padding
    found = []
    for content in (0, 9):
        model = swapped(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        tokens = torch.where(mask.bool(), ids, content)
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        model(tokens[:1])  # a pass in between, without padding, must not be what is recomputed
        loss.backward()
        layer = layers_of(model)[0]
        found.append([loss, layer.query_proj.weight.grad, layer.up[0].grad])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_checkpointing_changes_no_gradient_and_no_statistic(swapped, padded) -> None:
    ids, mask = padded
    found = []
    for checkpointing in (False, True):
        model = swapped().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append([*(p.grad for p in model.parameters()), *layers_of(model)[0].buffers()])
    torch.testing.assert_close(*found)


@families
def test_a_saved_model_is_loaded_with_its_swapped_layers(swapped, padded, tmp_path, name: str) -> None:
    model = swapped(name, glu=True)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert loaded.config.swapped_ffn == model.config.swapped_ffn
    assert torch.equal(loaded(padded[0]).logits, model(padded[0]).logits)
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    loaded.save_pretrained(tmp_path / "again")
    assert model_digest(str(tmp_path / "again")) == model_digest(str(tmp_path))


def test_a_grown_model_is_loaded_with_its_generations(swapped, padded, tmp_path) -> None:
    model = swapped(layers=(0, 1))
    grow_experts(model, 9)
    with torch.no_grad():
        layers_of(model)[0].up[1].normal_()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="auto")
    assert [layer.sides for layer in layers_of(loaded)] == [[7, 9], [7, 9]]
    assert torch.equal(loaded(padded[0]).logits, model(padded[0]).logits)


def test_selective_attention_and_swapped_layers_are_loaded_together(swapped, padded, tmp_path) -> None:
    from trialist.models import enable_selective_attention

    model = enable_selective_attention(swapped())
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(padded[0]).logits, model(padded[0]).logits)


def test_the_new_layer_starts_as_large_as_the_old_one(family) -> None:
    model = family("llama", hidden_size=64, intermediate_size=176, head_dim=10)
    old = model.model.layers[1].mlp
    x = torch.randn(2000, 64)
    expected = old(x).std().item()
    swap_ffn(model, [1], num_experts=1024, num_heads=4, top_k=8, key_dim=16)
    assert model.model.layers[1].mlp(x).std().item() == pytest.approx(expected, rel=0.15)


def test_precision_and_mode_of_the_old_layer_are_kept(family) -> None:
    model = family("llama").to(torch.bfloat16).train()
    swap_ffn(model, [0], **SETTINGS)
    assert {p.dtype for p in layers_of(model)[0].parameters()} == {torch.bfloat16}
    assert layers_of(model)[0].training


def test_adapters_leave_the_tables_alone_and_train(swapped, padded) -> None:
    model = get_peft_model(swapped(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {n for n in model.base_model.targeted_module_names if "layers.1.mlp" in n} == {
        "model.layers.1.mlp.query_proj"
    }
    ids, mask = padded
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_scores_and_metrics_of_a_padded_batch_leave_padding_out(swapped, padded) -> None:
    model, (ids, mask) = swapped(), padded
    noisy = torch.where(mask.bool(), ids, 9)
    scores = [selected_logprobs(model, tokens, mask) for tokens in (ids, noisy)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    metrics = [peer_metrics(model, [{"input_ids": tokens, "attention_mask": mask}]) for tokens in (ids, noisy)]
    assert metrics[0]["model.layers.1.mlp"] == pytest.approx(metrics[1]["model.layers.1.mlp"])


def test_copies_of_a_swapped_model_are_independent(swapped, padded) -> None:
    model = swapped()
    twin = copy.deepcopy(model)
    expected = model(padded[0], attention_mask=padded[1]).logits
    with torch.no_grad():
        layers_of(model)[0].up[0].zero_()
    assert torch.equal(twin(padded[0], attention_mask=padded[1]).logits, expected)


def test_layers_that_cannot_be_swapped_are_refused_and_nothing_is_changed(family) -> None:
    model = family("llama")
    before = set(model.state_dict())
    for layers in ([], [2], [-1], [1, 1]):
        with pytest.raises(ValueError, match="0 to 1"):
            swap_ffn(model, layers, **SETTINGS)
    with pytest.raises(ValueError, match="num_experts is 50"):
        swap_ffn(model, [0, 1], **{**SETTINGS, "num_experts": 50})
    with pytest.raises(ValueError, match="swapped to peer, not 'moe'"):
        swap_ffn(model, [0], "moe")
    assert set(model.state_dict()) == before
    swap_ffn(model, [0], **SETTINGS)
    with pytest.raises(ValueError, match=r"layers \[0\] were swapped already"):
        swap_ffn(model, [1], **SETTINGS)


def test_models_without_a_dense_feed_forward_are_refused_in_words(family) -> None:
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    mixture = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**sizes))
    with pytest.raises(
        ValueError, match=r"layer 0 of MixtralForCausalLM has 0 parts.*mixtures of experts cannot be swapped"
    ):
        swap_ffn(mixture, [0], **SETTINGS)
    seq2seq = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        swap_ffn(seq2seq, [0], **SETTINGS)
    adapted = get_peft_model(family("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="swap before wrapping"):
        swap_ffn(adapted, [0], **SETTINGS)


@pytest.mark.parametrize("kind", ["Gemma2", "Mistral", "Phi3", "Olmo2", "StableLm"])
def test_further_families_are_recognised_by_structure(kind: str, padded) -> None:
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    swap_ffn(model, [0, 1], **SETTINGS)
    ids, mask = padded
    assert torch.isfinite(model(ids, attention_mask=mask).logits[mask.bool()]).all()
