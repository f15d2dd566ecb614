"""What cannot be read as weights is refused with its name, before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.weights.conftest import configure, llama, rewrite, save_family, tensors
from trialist.weights.checkpoint import open_checkpoint, runs


def test_any_stretch_of_any_tensor_is_what_the_safetensors_library_reads(family, half_family):
    for folder in (family["new"], half_family["new"]):
        with open_checkpoint(folder) as checkpoint:
            expected = tensors(folder)
            assert checkpoint.tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert checkpoint.tensors[name].shape == tuple(tensor.shape)
                assert torch.equal(checkpoint.read(name, 3, 10), tensor.flatten()[3:10])
                assert torch.equal(checkpoint.read(name), tensor.flatten())
            ids = torch.tensor([4, 5, 6, 2, 200, 3, 4])
            name = "model.embed_tokens.weight"
            assert torch.equal(checkpoint.rows(name, ids), expected[name][ids])
            assert checkpoint.rows(name, ids[:0]).shape == (0, 12)


def test_runs_are_the_longest_stretches_of_neighbours():
    assert list(runs(torch.tensor([4, 5, 6, 2, 200, 3, 4]).numpy())) == [(0, 3), (3, 4), (4, 5), (5, 7)]
    assert list(runs(torch.tensor([], dtype=torch.long).numpy())) == []


@pytest.fixture
def sharded(tmp_path) -> Path:
    members = save_family(tmp_path, lambda: llama(tie_word_embeddings=False), max_shard_size="9KB")
    return Path(members["base"])


def test_a_missing_shard_and_a_wrong_index_are_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    configure(
        sharded,
        "model.safetensors.index.json",
        weight_map=index["weight_map"] | {"ghost": "model-00001-of-00004.safetensors"},
    )
    with pytest.raises(ValueError, match=r"disagree about 1 tensors: ghost"):
        open_checkpoint(str(sharded))
    configure(sharded, "model.safetensors.index.json", weight_map=index["weight_map"])
    open_checkpoint(str(sharded)).close()
    name = sorted(set(index["weight_map"].values()))[1]
    (sharded / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {name}, which model.safetensors.index.json names"):
        open_checkpoint(str(sharded))


def test_files_of_which_nothing_says_that_they_belong_together_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"4 safetensors files .* but neither model.safetensors nor"):
        open_checkpoint(str(sharded))


def test_weights_in_another_layout_beside_the_index_are_left_alone(sharded):
    """As in repositories that hold a consolidated copy."""
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "consolidated.safetensors")
    with open_checkpoint(str(sharded)) as checkpoint:
        assert all(file.name.startswith("model-") for file in checkpoint.files)


def test_a_file_that_was_cut_off_is_named(own):
    file = Path(own["base"]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"base': model.safetensors is damaged or cut off"):
        open_checkpoint(own["base"])


def test_quantised_models_are_refused(own):
    configure(own["post"], quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"post' is quantised \(gptq\)"):
        open_checkpoint(own["post"])
    rewrite(own["base"], lambda t: t | {"model.norm.weight": torch.ones(12).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"base' is quantised: 1 tensors are stored as F8_E4M3 \(model.norm.weight\)"):
        open_checkpoint(own["base"])
    rewrite(own["new"], lambda t: t | {"model.layers.0.mlp.up_proj.qweight": torch.ones(3, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"new' is quantised: it holds model.layers.0.mlp.up_proj.qweight"):
        open_checkpoint(own["new"])


def test_adapters_are_refused_until_they_are_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter.*merge it into its model first"):
        open_checkpoint(str(tmp_path / "adapter"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    open_checkpoint(str(tmp_path / "merged")).close()


def test_a_hub_id_that_cannot_be_had_is_said_in_words():
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' is no local folder .* could not be had from the Hugging Face Hub"
    ):
        open_checkpoint("nobody/nothing")


def test_of_a_hub_repository_only_the_files_of_its_index_are_fetched(sharded, monkeypatch):
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with open_checkpoint("somebody/model") as checkpoint:
        assert len(checkpoint.files) == 4
    assert "*.safetensors" not in asked[1]
    assert {name for name in asked[1] if name.startswith("model-")} == {file.name for file in checkpoint.files}


def test_a_config_that_is_no_json_is_named(own):
    (Path(own["base"]) / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"base': config.json is no JSON"):
        open_checkpoint(own["base"])
