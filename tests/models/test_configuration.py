from __future__ import annotations

import pytest
from transformers import AutoConfig

from trialist.models import ModularDecoderConfig


def test_default_slots_are_those_of_a_llama() -> None:
    config = ModularDecoderConfig(num_hidden_layers=3)
    assert config.layer_types == ["full_attention"] * 3
    assert config.ffn_types == ["swiglu"] * 3
    assert (config.depth, config.norm_style, config.num_key_value_heads) == ("stack", "pre", config.num_attention_heads)


def test_saved_configuration_is_loaded_by_the_auto_class_with_all_slots(tmp_path) -> None:
    config = ModularDecoderConfig(
        num_hidden_layers=2,
        layer_types=["selective_attention", "full_attention"],
        norm_style="sandwich",
        selective={"selector_head": 1},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ModularDecoderConfig)
    assert loaded.layer_types == ["selective_attention", "full_attention"]
    assert (loaded.norm_style, loaded.selective) == ("sandwich", {"selector_head": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_types": ["selectiv_attention"] * 2}, "Did you mean 'selective_attention'"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, num_hidden_layers is 2"),
        ({"ffn_types": ["swiglu", "moe"]}, "ffn_types: 'moe' is unknown"),
        ({"depth": "stak"}, "Did you mean 'stack'"),
        ({"norm_style": "post"}, "choose 'pre' or 'sandwich'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        ({"selective": {"budget": 3}}, "unknown keys \\['budget'\\]"),
        ({"layer_types": ["selective_attention"] * 2, "selective": {"selector_head": 4}}, "one of the 4 heads"),
    ],
)
def test_wrong_field_is_refused_with_the_way_out(fields: dict, words: str) -> None:
    with pytest.raises(Exception, match=words):
        ModularDecoderConfig(num_hidden_layers=2, **fields)
