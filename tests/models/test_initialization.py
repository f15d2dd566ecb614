from __future__ import annotations

import pytest
import torch
import transformers

from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM, initialize_

SMALL = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6}


def build(seed: int, **changes) -> ModularDecoderForCausalLM:
    model = ModularDecoderForCausalLM(ModularDecoderConfig(**{**SMALL, "num_hidden_layers": 2, **changes}))
    initialize_(model, seed)
    return model


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(3).state_dict()
    torch.manual_seed(2)
    same, other = build(3).state_dict(), build(4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_an_arm_with_more_parameters_keeps_all_common_ones() -> None:
    small = build(3).state_dict()
    for changes in (
        {"num_hidden_layers": 3},
        {"attention_bias": True, "norm_style": "sandwich"},
        {"layer_types": ["selective_attention"] * 2},
        {"tie_word_embeddings": False},
        {"pad_token_id": None},
    ):
        large = build(3, **changes).state_dict()
        common = [name for name in small if name in large and name != "lm_head.weight"]
        if "num_hidden_layers" in changes:  # residual projections are scaled by depth
            common = [name for name in common if not name.endswith(("o_proj.weight", "down_proj.weight"))]
        assert len(common) > 10
        assert all(torch.equal(small[name], large[name]) for name in common), changes


def test_layers_differ_and_have_the_configured_spread() -> None:
    model = build(0, hidden_size=96, intermediate_size=300, initializer_range=0.05)
    first, second = (layer.ffn.up_proj.weight for layer in model.model.layers)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.05, rel=0.03)
    assert (model.model.norm.weight == 1).all()


@pytest.mark.parametrize("prepare", [initialize_, lambda model, seed: None], ids=["keyed", "as constructed"])
def test_projections_into_the_residual_stream_are_scaled_by_depth(prepare) -> None:
    config = ModularDecoderConfig(**{**SMALL, "hidden_size": 96, "intermediate_size": 300, "num_hidden_layers": 8})
    model = ModularDecoderForCausalLM(config)
    prepare(model, 0)
    for layer in (model.model.layers[0], model.model.layers[7]):
        assert layer.mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
        for weight in (layer.mixer.o_proj.weight, layer.ffn.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


@pytest.mark.parametrize("prepare", [initialize_, lambda model, seed: None], ids=["keyed", "as constructed"])
def test_token_embeddings_have_their_own_spread(prepare, tmp_path) -> None:
    changes = {"embedding_initializer_range": 1.0, "tie_word_embeddings": False, "vocab_size": 500, "pad_token_id": 3}
    model = ModularDecoderForCausalLM(ModularDecoderConfig(**{**SMALL, **changes}))
    prepare(model, 0)
    embedding = model.get_input_embeddings().weight
    assert embedding.std().item() == pytest.approx(1.0, rel=0.03)
    assert not embedding[3].any()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    with torch.no_grad():
        embedding[3] = 5.0
    model.save_pretrained(tmp_path)
    loaded = ModularDecoderForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)


def test_the_global_random_state_is_left_alone() -> None:
    model = build(0)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    initialize_(model, 5)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_of_transformers_keeps_its_own_rule() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=37, n_embd=96, n_layer=8, n_head=6))
    initialize_(model, 0)
    residual = model.transformer.h[0].mlp.c_proj.weight.std().item()
    plain = model.transformer.h[0].mlp.c_fc.weight.std().item()
    assert plain == pytest.approx(0.02, rel=0.03)
    assert residual == pytest.approx(0.02 / (2 * 8) ** 0.5, rel=0.03)  # GPT-2 scales residual projections by depth


def test_the_padding_embedding_stays_zero_and_weights_stay_trainable() -> None:
    model = build(0, pad_token_id=4)
    assert not model.model.embed_tokens.weight[4].any()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_off_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="initialise on the CPU"):
        initialize_(build(0).to("meta"), 0)
