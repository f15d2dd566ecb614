from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.models.conftest import GREEDY
from trialist.models import (
    PEER,
    ModularDecoderConfig,
    ModularDecoderForCausalLM,
    flops_per_token,
    grow_experts,
    initialize_,
    load_model,
    peer_metrics,
    selected_logprobs,
    swap_ffn,
)
from trialist.optimizers import adamw

SETTINGS = {"num_experts": 49, "num_heads": 3, "top_k": 4, "key_dim": 6}
LAYERS = {"ffn_types": ["peer", "swiglu"], "peer": SETTINGS}


@pytest.fixture
def peer_decoder(decoder):
    def build(*mixers: str, **changes):
        model = decoder(*mixers, **{**LAYERS, **changes})
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, PEER) and module.settings["query_norm"] == "batchnorm":
                module.query_norm.running_mean.normal_()  # as after training
                module.query_norm.running_var.uniform_(0.5, 2)
        return model

    return build


@pytest.mark.parametrize("mixer", ["full_attention", "selective_attention", "min_gru"])
def test_cached_greedy_generation_equals_uncached(peer_decoder, padded, mixer: str) -> None:
    model, (ids, mask) = peer_decoder(mixer, mixer), padded
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), uncached)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_padding_reaches_the_layer_and_changes_no_real_logit(peer_decoder, padded, training: bool) -> None:
    ids, mask = padded
    changed = torch.where(mask.bool(), ids, 5)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    one, other = (
        peer_decoder(attention_dropout=0.0).train(training)(tokens, attention_mask=mask, position_ids=positions).logits
        for tokens in (ids, changed)
    )
    torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=1e-4, atol=1e-4)


def test_future_tokens_change_no_earlier_logit(peer_decoder, padded) -> None:
    model, ids = peer_decoder(), padded[0]
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 37
    torch.testing.assert_close(model(ids).logits[:, :6], model(changed).logits[:, :6])


def test_a_saved_model_gives_the_same_bits_when_loaded(peer_decoder, padded, tmp_path) -> None:
    model = peer_decoder(peer={**SETTINGS, "glu": True})
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_model(str(tmp_path))):
        assert torch.equal(model(padded[0]).logits, loaded(padded[0]).logits)


def test_a_grown_model_is_saved_and_loaded_with_its_generations(peer_decoder, padded, tmp_path) -> None:
    model = peer_decoder()
    grow_experts(model, 9)
    with torch.no_grad():
        model.model.layers[0].ffn.up[1].normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.peer["generations"] == [7, 9]
    assert loaded.config.peer["num_experts"] == 81
    assert torch.equal(model(padded[0]).logits, loaded(padded[0]).logits)


def test_models_that_share_settings_do_not_share_their_growth(decoder) -> None:
    one, other = decoder(**LAYERS), decoder(**LAYERS)
    grow_experts(one, 9)
    assert "generations" not in SETTINGS
    assert "generations" not in other.config.peer


def test_nothing_grows_where_one_layer_cannot(peer_decoder) -> None:
    model = peer_decoder(ffn_types=["peer", "peer"])
    model.model.layers[1].ffn.grow(9)
    with pytest.raises(ValueError, match=r"pool of model.layers.1.ffn has side 9"):
        grow_experts(model, 8)
    assert model.model.layers[0].ffn.side == 7


def test_layers_that_grew_apart_are_not_grown_together(peer_decoder) -> None:
    model = peer_decoder(ffn_types=["peer", "peer"])
    model.model.layers[0].ffn.grow(8)
    with pytest.raises(
        ValueError, match=r"layers.0.ffn grew through the sides \[7, 8\] and model.layers.1.ffn through"
    ):
        grow_experts(model, 9)
    assert [block.ffn.side for block in model.model.layers] == [8, 7]


def test_layers_that_are_recorded_apart_keep_a_growth_of_their_own(peer_decoder, padded, tmp_path) -> None:
    model = swap_ffn(peer_decoder("full_attention", "full_attention"), [1], **{**SETTINGS, "num_experts": 64})
    grow_experts(model, 9)
    assert model.config.peer["generations"] == [7, 9]
    assert model.config.swapped_ffn["settings"]["generations"] == [8, 9]
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(padded[0]).logits, model.eval()(padded[0]).logits)


def test_gradient_checkpointing_changes_no_gradient_and_no_statistic(peer_decoder, padded) -> None:
    ids, mask = padded
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peer_decoder().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[0], found[1])


def test_lora_adapts_the_query_projection_and_no_table(peer_decoder, padded) -> None:
    model = get_peft_model(peer_decoder(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name for name in model.base_model.targeted_module_names if "layers.0.ffn" in name}
    assert targets == {"model.layers.0.ffn.query_proj"}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    ids, mask = padded
    model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_an_adapter_is_loaded_to_the_model_that_was_trained(peer_decoder, padded, tmp_path) -> None:
    (ids, mask), lora = padded, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(peer_decoder(), lora).train()
    for _ in range(3):
        model(input_ids=ids, attention_mask=mask)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(peer_decoder(), tmp_path)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, peer_decoder()(ids).logits)


def test_bfloat16_autocast_gives_finite_loss_and_gradients(peer_decoder, padded) -> None:
    model = peer_decoder().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(padded[0], labels=padded[0]).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_new_layer_starts_as_large_as_the_swiglu_it_replaces() -> None:
    for initializer_range in (0.02, 0.125):
        outputs = []
        for kind in ("swiglu", "peer"):
            config = ModularDecoderConfig(
                vocab_size=11, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2,
                initializer_range=initializer_range, ffn_types=[kind] * 2,
                peer={"num_experts": 1024, "num_heads": 4, "top_k": 8, "key_dim": 16},
            )  # fmt: skip
            model = ModularDecoderForCausalLM(config)
            initialize_(model, 0)
            outputs.append(model.model.layers[1].ffn(torch.randn(2000, 64)).std().item())
        assert outputs[1] == pytest.approx(outputs[0], rel=0.12)


@pytest.mark.parametrize("initialization", ["default", "takase"])
@pytest.mark.parametrize("mean_recurrence", [1, 32])
def test_in_the_loop_a_new_layer_starts_as_large_as_the_swiglu_it_replaces(
    initialization: str, mean_recurrence: int
) -> None:
    outputs = []
    for kind in ("swiglu", "peer"):
        config = ModularDecoderConfig(
            vocab_size=11, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=2,
            ffn_types=["swiglu", kind, "swiglu"], peer={"num_experts": 1024, "num_heads": 4, "top_k": 8, "key_dim": 16},
            depth="recurrent", recurrent={"prelude_layers": 1, "core_layers": 1, "coda_layers": 1,
                                          "mean_recurrence": mean_recurrence, "initialization": initialization},
        )  # fmt: skip
        model = ModularDecoderForCausalLM(config)
        initialize_(model, 0)
        x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
        outputs.append(model.model.layers.core.blocks[0].ffn.eval()(x).std().item())
    assert outputs[1] == pytest.approx(outputs[0], rel=0.12)


def test_an_arm_with_experts_keeps_the_initial_values_of_all_other_parameters() -> None:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    states = []
    for ffn in ("swiglu", "peer"):
        model = ModularDecoderForCausalLM(ModularDecoderConfig(**sizes, ffn_types=["swiglu", ffn], peer=SETTINGS))
        initialize_(model, 3)
        states.append(model.state_dict())
    common = [name for name in states[0] if name in states[1]]
    assert len(common) > 10
    assert all(torch.equal(states[0][name], states[1][name]) for name in common)


def test_flops_of_the_decoder_count_the_layer(peer_decoder) -> None:
    with_peer, dense = peer_decoder(tie_word_embeddings=False), peer_decoder(ffn_types=["swiglu"] * 2)
    layer = 2 * 24 * 18 + 2 * 3 * 6 * (7 + 4) + 4 * 12 * 24
    assert flops_per_token(with_peer, 10) - flops_per_token(dense, 10) == layer - 2 * 3 * 24 * 40


def test_scored_log_probabilities_are_those_of_the_logits(peer_decoder, padded) -> None:
    model, (ids, mask) = peer_decoder(), padded
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0]
    scored = mask[:, 1:].bool() & mask[:, :-1].bool()
    torch.testing.assert_close(selected_logprobs(model, ids, mask)[scored], expected[scored], rtol=1e-4, atol=1e-4)


def test_settings_are_checked_when_the_configuration_is_made() -> None:
    with pytest.raises(Exception, match="num_experts is 50"):
        ModularDecoderConfig(num_hidden_layers=1, ffn_types=["peer"], peer={"num_experts": 50})
    with pytest.raises(Exception, match="peer holds unknown keys"):
        ModularDecoderConfig(num_hidden_layers=1, ffn_types=["peer"], peer={"experts": 49})


def test_adamw_gives_the_tables_of_all_layers_a_group(peer_decoder) -> None:
    model = peer_decoder(ffn_types=["peer", "peer"], peer={**SETTINGS, "learning_rate_scale": 4.0})
    groups = [group for group in adamw(model, 1e-3).param_groups if group.get("name") == "peer_experts"]
    assert [group["lr"] for group in groups] == [4e-3, 4e-3]
    assert sum(p.numel() for group in groups for p in group["params"]) == 2 * 2 * 49 * 24


class Known(nn.Module):
    """A model whose one layer retrieves what it is told."""

    def __init__(self, ids, weights) -> None:
        super().__init__()
        self.layer = PEER(4, 9, num_heads=1, top_k=ids.shape[-1], key_dim=2, score="sigmoid")
        self.layer.retrieve = lambda x, padding_mask=None: (ids, weights)

    def forward(self, x, attention_mask=None):
        return self.layer.forward(x, None if attention_mask is None else attention_mask.bool())


def test_metrics_of_even_use_and_of_a_single_expert_have_their_closed_forms() -> None:
    x = torch.zeros(9, 4)
    even = peer_metrics(Known(torch.arange(9).view(9, 1, 1), torch.full((9, 1, 1), 0.3)), [x])["layer"]
    assert even == pytest.approx(
        {"usage": 1.0, "unevenness": 0.0, "effective_experts": 9.0, "top1_usage": 1.0}, abs=1e-6
    )
    one = peer_metrics(Known(torch.full((9, 1, 1), 4), torch.ones(9, 1, 1)), [x, x])["layer"]
    expected = {"usage": 1 / 9, "unevenness": math.log(9), "effective_experts": 1.0, "top1_usage": 1 / 9}
    assert one == pytest.approx(expected)


def test_metrics_weigh_experts_and_leave_padding_out() -> None:
    ids = torch.tensor([[[[0, 1]], [[2, 3]]]])  # (B, T, H, K): one row of two tokens, the second is padding
    weights = torch.tensor([[[[0.75, 0.25]], [[0.5, 0.5]]]])
    model = Known(ids, weights)
    batch = {"x": torch.zeros(1, 2, 4), "attention_mask": torch.tensor([[1, 0]]), "labels": None}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    measured = peer_metrics(model, [batch])["layer"]
    expected = {"usage": 2 / 9, "unevenness": math.log(9) - entropy, "effective_experts": math.exp(entropy)}
    assert measured == pytest.approx({**expected, "top1_usage": 1 / 9})


def test_measuring_leaves_the_model_as_it_was(peer_decoder, padded) -> None:
    model, (ids, mask) = peer_decoder(), padded
    model.train()
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = peer_metrics(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    assert set(measured) == {"model.layers.0.ffn"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "retrieve" not in vars(model.model.layers[0].ffn)
    assert (model.training, model.model.training, model.lm_head.training) == (True, True, False)


def test_a_model_without_experts_and_batches_without_tokens_are_refused(decoder, peer_decoder) -> None:
    with pytest.raises(ValueError, match="has no PEER layer"):
        peer_metrics(decoder(), [])
    with pytest.raises(ValueError, match="needs batches with tokens"):
        peer_metrics(peer_decoder(), [])


def test_batch_norm_over_queries_evens_out_the_use_of_experts() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 16) * torch.linspace(0.1, 3, 16) + 2
    measured = {}
    for kind in ("batchnorm", "none"):
        peer = PEER(16, 256, 2, 4, 16, query_norm=kind)
        for _ in range(60):
            peer.train()(x)  # the running statistics settle
        measured[kind] = peer_metrics(peer, [x])[""]["unevenness"]
    assert measured["batchnorm"] < 0.7 * measured["none"]


@pytest.mark.slow
def test_the_compiled_block_has_no_graph_break_and_equal_gradients() -> None:
    config = ModularDecoderConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        ffn_types=["peer"] * 2, peer={**SETTINGS, "generations": [4, 7]},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    initialize_(model, 0)
    ids = torch.randint(3, 37, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for attention_mask in (None, mask):
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(ids, labels=ids, attention_mask=attention_mask).loss.backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model.load_state_dict(start, strict=False)
        for block in model.model.layers:
            block.compile(fullgraph=True)
        model(ids, labels=ids, attention_mask=attention_mask).loss.backward()
        for parameter, gradient in zip(model.parameters(), plain):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        model.zero_grad()
        for block in model.model.layers:
            block._compiled_call_impl = None
