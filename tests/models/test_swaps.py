from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models.conftest import EXPERTS, GREEDY, SIZES, swapped_layers
from trialist.models import (
    PEER,
    grow_experts,
    initialize_,
    load_model,
    model_digest,
    peer_metrics,
    selected_logprobs,
    swap_ffn,
    to_recurrent,
)
from trialist.models.swaps import SwappedPEER

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "smollm3", "gpt2", "gptneox"]
families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_the_feed_forward_of_the_named_layer_alone_is_replaced(family, padded, name: str) -> None:
    model = family(name)
    before = {key for key in model.state_dict() if ".1." in key}
    untouched = {key: value.clone() for key, value in model.state_dict().items() if ".0." in key}
    swap_ffn(model, [1], **EXPERTS)
    after = model.state_dict()
    gone = before - set(after)
    assert len(gone) in (2, 3, 4)
    assert all("mlp" in key for key in gone)
    assert all(torch.equal(after[key], value) for key, value in untouched.items())
    assert len(swapped_layers(model)) == 1
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
        layer = swapped_layers(model)[0]
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
        found.append([*(p.grad for p in model.parameters()), *swapped_layers(model)[0].buffers()])
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
        swapped_layers(model)[0].up[1].normal_()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="auto")
    assert [layer.sides for layer in swapped_layers(loaded)] == [[7, 9], [7, 9]]
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
    swap_ffn(model, [0], **EXPERTS)
    assert {p.dtype for p in swapped_layers(model)[0].parameters()} == {torch.bfloat16}
    assert swapped_layers(model)[0].training


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
        swapped_layers(model)[0].up[0].zero_()
    assert torch.equal(twin(padded[0], attention_mask=padded[1]).logits, expected)


def test_layers_that_cannot_be_swapped_are_refused_and_nothing_is_changed(family) -> None:
    model = family("llama")
    before = set(model.state_dict())
    for layers in ([], [2], [-1], [1, 1]):
        with pytest.raises(ValueError, match="0 to 1"):
            swap_ffn(model, layers, **EXPERTS)
    for layers in (1, "1", [1.0], None):
        with pytest.raises(ValueError, match=r"give a list of layers, as \[1\]"):
            swap_ffn(model, layers, **EXPERTS)
    with pytest.raises(ValueError, match="num_experts is 50"):
        swap_ffn(model, [0, 1], **{**EXPERTS, "num_experts": 50})
    with pytest.raises(ValueError, match="swapped to peer, not 'moe'"):
        swap_ffn(model, [0], "moe")
    assert set(model.state_dict()) == before
    swap_ffn(model, [0], **EXPERTS)
    with pytest.raises(ValueError, match=r"layers \[0\] were swapped already"):
        swap_ffn(model, [1], **EXPERTS)


def test_models_without_a_dense_feed_forward_are_refused_in_words(family) -> None:
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    mixture = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**sizes))
    with pytest.raises(
        ValueError, match=r"layer 0 of MixtralForCausalLM has 0 parts.*mixtures of experts cannot be swapped"
    ):
        swap_ffn(mixture, [0], **EXPERTS)
    seq2seq = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        swap_ffn(seq2seq, [0], **EXPERTS)
    adapted = get_peft_model(family("llama"), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="swap before wrapping"):
        swap_ffn(adapted, [0], **EXPERTS)


FURTHER = [
    "Apertus", "Arcee", "BitNet", "Cohere", "Cohere2", "Ernie4_5", "Exaone4", "Gemma2", "Gemma3Text", "Glm", "Glm4",
    "GPTBigCode", "Granite", "Helium", "HunYuanDenseV1", "Lfm2", "Ministral", "Mistral", "Nemotron", "Olmo", "Olmo2", "Olmo3",
    "Persimmon", "Phi", "Phi3", "StableLm", "Starcoder2", "VaultGemma",
]  # fmt: skip


@pytest.mark.parametrize("kind", FURTHER)
def test_further_families_are_recognised_by_structure_and_what_stands_at_padding_changes_no_loss(
    kind: str, padded
) -> None:
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    ids, mask = padded
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 4] = -100  # the first real token of this row is predicted from padding
    losses = []
    for content in (0, 9):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES))
        swap_ffn(model, [0, 1], **EXPERTS)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses.append(model(torch.where(mask.bool(), ids, content), attention_mask=mask, labels=labels).loss.item())
        assert all(layer.query_norm.running_mean.any() for layer in swapped_layers(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class ClosedLayer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A layer as of a model that keeps further arguments for itself."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        return super().forward(hidden_states, attention_mask, position_embeddings=position_embeddings)


class ClosedModel(transformers.LlamaModel):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids, attention_mask, use_cache=kwargs.get("use_cache"))


def test_a_model_that_keeps_arguments_from_its_layers_is_refused_and_unchanged(family, padded) -> None:
    model = family("llama").train()
    model.model.__class__ = ClosedModel
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="LlamaForCausalLM does not pass arguments on to its layers"):
        swap_ffn(model, [1], **EXPERTS)
    assert [type(module) for module in model.modules()] == kinds
    assert not model.model._forward_pre_hooks
    assert all(module.training for module in model.modules())
    assert not hasattr(model.config, "swapped_ffn")


def test_a_layer_that_keeps_further_arguments_for_itself_is_given_the_mask(family, padded) -> None:
    model = family("llama")
    for layer in model.model.layers:
        layer.__class__ = ClosedLayer
    swap_ffn(model, [1], **EXPERTS)
    ids, mask = padded
    seen = []
    swapped_layers(model)[0].query_norm.register_forward_pre_hook(lambda norm, args: seen.append(args[1]))
    model(ids, attention_mask=mask)
    assert torch.equal(seen[0].view(3, 11), mask.bool())


def test_initialize_draws_swapped_layers_by_their_own_rule(family) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = swap_ffn(family("llama"), [1], output_std=0.3, **EXPERTS)
        initialize_(model, 5)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weight = states[0]["model.layers.1.mlp.query_proj.weight"]
    assert weight.abs().max() <= (6 / (24 + 18)) ** 0.5  # Xavier
    assert weight.std().item() == pytest.approx((2 / (24 + 18)) ** 0.5, rel=0.1)


def test_a_loaded_model_is_drawn_anew_as_the_one_that_was_saved(swapped, tmp_path) -> None:
    model = swapped(layers=(0, 1))
    model.save_pretrained(tmp_path)
    drawn = []
    for one in (model, load_model(str(tmp_path))):
        initialize_(one, 5)
        drawn.append(one.state_dict())
    torch.testing.assert_close(*drawn)


def test_a_parameter_that_no_rule_draws_is_named_and_kept(family) -> None:
    model = family("llama")
    model.model.layers[1].own = torch.nn.Linear(24, 5)
    model.model.layers[1].own.scale = torch.nn.Parameter(torch.full((3,), 7.0))
    with pytest.raises(ValueError, match=r"no rule of LlamaForCausalLM draws model.layers.1.own.scale"):
        initialize_(model, 0)
    assert torch.equal(model.model.layers[1].own.scale, torch.full((3,), 7.0))


def test_recurrent_depth_is_made_before_the_swap(family, padded, tmp_path) -> None:
    model = family("llama", num_hidden_layers=4)
    recurrent = swap_ffn(to_recurrent(model, 1, 2, 1, mean_recurrence=3), [2], **EXPERTS)
    assert type(recurrent.model.layers.core.blocks[1].ffn) is SwappedPEER
    recurrent.save_pretrained(tmp_path)
    given = {"input_ids": padded[0], "attention_mask": padded[1]}
    assert torch.equal(load_model(str(tmp_path))(**given).logits, recurrent(**given).logits)
    with pytest.raises(ValueError, match=r"layers \[1\] of LlamaForCausalLM were swapped; call to_recurrent first"):
        to_recurrent(swap_ffn(model, [1], **EXPERTS), 1, 2, 1)


def test_a_model_that_was_loaded_without_its_swapped_layers_says_so(swapped, tmp_path) -> None:
    swapped().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers \[1\] were swapped, and they are dense.*load_model"):
        swap_ffn(AutoModelForCausalLM.from_pretrained(tmp_path), [1], **EXPERTS)


def test_all_settings_of_the_new_layers_are_recorded(swapped) -> None:
    recorded = swapped(layers=(0, 1)).config.swapped_ffn
    assert recorded["settings"] == PEER(24, **EXPERTS).settings
    assert len(recorded["output_std"]) == 2


def test_a_swapped_model_is_pickled(swapped, padded) -> None:
    model = swapped()
    again = pickle.loads(pickle.dumps(model))
    given = {"input_ids": padded[0], "attention_mask": padded[1]}
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert [type(block) for block in again.model.layers] == [type(block) for block in model.model.layers]
