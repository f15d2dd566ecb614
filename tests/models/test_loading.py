from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trialist.models import (
    disable_selective_attention,
    enable_selective_attention,
    load_model,
    model_digest,
)


def test_a_saved_folder_loads_in_evaluation_mode_and_in_the_wanted_precision(decoder, padded, tmp_path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(padded[0]).logits, model(padded[0]).logits)
    assert not loaded.training
    assert load_model(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_selective_attention_of_a_saved_model_is_enabled_again(family, padded, tmp_path) -> None:
    model = enable_selective_attention(family("llama"), selector_head=[2, 4])
    expected = model(padded[0]).logits
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert torch.equal(loaded(padded[0]).logits, expected)
    standard = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    disable_selective_attention(loaded)
    assert torch.equal(loaded(padded[0]).logits, standard(padded[0]).logits)


def test_digest_follows_the_content_and_not_the_files(decoder, tmp_path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert model_digest(str(tmp_path / "one")) == model_digest(str(tmp_path / "sharded"))
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert model_digest(str(tmp_path / "changed")) != model_digest(str(tmp_path / "one"))


def test_digest_sees_a_changed_configuration(decoder, tmp_path) -> None:
    decoder().save_pretrained(tmp_path)
    before = model_digest(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert model_digest(str(tmp_path)) != before


def test_digest_of_a_hub_model_is_its_commit(decoder, tmp_path, monkeypatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--a--b" / "snapshots" / commit / "config.json"
    monkeypatch.setattr("trialist.models.loading.cached_file", lambda *_: str(cached))
    assert model_digest("a/b") == f"commit:{commit}"


@pytest.mark.parametrize("function", [load_model, model_digest])
def test_what_is_missing_is_named(function, decoder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json.*it holds: nothing"):
        function(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        function(str(tmp_path / "absent"))
    decoder().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no \*.safetensors weights \(it holds: config.json\)"):
        function(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        function(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="no such model or cannot be reached"):
        function("nobody/nothing-here")


def test_a_folder_that_lacks_weights_is_refused_with_their_names(decoder, tmp_path) -> None:
    decoder().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mixer.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of the weights .*: model\.layers\.1\.mixer\.q_proj\.weight; they would"
    ):
        load_model(str(tmp_path))


def test_unknown_precision_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int4'; choose one of float32"):
        load_model(str(tmp_path), dtype="int4")
