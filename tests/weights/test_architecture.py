"""Checkpoints whose names are not those of the class: single experts, older names, models saved without their head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

from tests.weights.conftest import SIZES, Family, configure, gpt2, rewrite, save_family, tensors
from trialist.weights import apply_param_delta, extract_delta
from trialist.weights.architecture import Place, architecture_of


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))


def gemma3() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text, tokens = (
        {**SIZES, "tie_word_embeddings": True},
        {"image_token_id": 250, "boi_token_id": 251, "eoi_token_id": 252},
    )
    config = Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, Family]:
    folder = tmp_path_factory.mktemp("experts")
    return {build.__name__: save_family(folder / build.__name__, build) for build in (mixtral, qwen3_moe)}


@pytest.fixture
def gemma(tmp_path) -> Family:
    return save_family(tmp_path, gemma3)


def test_a_stored_name_leads_to_the_parameter_that_loading_fills(experts, gemma):
    known = architecture_of(Path(experts["mixtral"]["base"]))
    assert known is not None
    stored = "model.layers.1.block_sparse_moe"
    assert known.place(f"{stored}.gate.weight") == Place("model.layers.1.mlp.gate.weight", whole=True)
    assert known.place(f"{stored}.experts.2.w1.weight") == Place("model.layers.1.mlp.experts.gate_up_proj", whole=False)
    assert known.place("model.layers.7.mlp.gate.weight") is None
    known = architecture_of(Path(gemma["base"]))
    assert known is not None
    assert known.is_by_token("language_model.model.embed_tokens.weight")
    assert not known.is_by_token("language_model.model.norm.weight")


def parameters(folder: str) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_loads_with_the_sum_in_every_weight(experts, tmp_path, name):
    members = experts[name]
    apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], tmp_path / "out")
    new, post, base = (parameters(members[key]) for key in ("new", "post", "base"))
    for key, value in parameters(str(tmp_path / "out")).items():
        assert torch.equal(value, new[key] + (post[key] - base[key])), key


def lacking(members: Family, adapter: Path) -> float:
    """Share of the squared difference that the base with the adapter, as PEFT loads and merges it, still has to post."""
    base, post = parameters(members["base"]), parameters(members["post"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(members["base"]), adapter).merge_and_unload()
    found = {name: value.detach() for name, value in model.named_parameters()}
    assert found.keys() == post.keys()
    whole = sum(float((post[name] - base[name]).double().square().sum()) for name in post)
    return sum(float((post[name] - found[name]).double().square().sum()) for name in post) / whole


@pytest.mark.parametrize("rest", ["leave", "save"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma3"])
def test_what_an_adapter_leaves_out_is_what_a_model_with_it_lacks(experts, gemma, tmp_path, name, rest):
    members = gemma if name == "gemma3" else experts[name]
    record = extract_delta(members["post"], members["base"], tmp_path / "adapter", energy=1.0, rest=rest)
    assert record["share_left_out"] == pytest.approx(lacking(members, tmp_path / "adapter"), abs=1e-5)
    if name != "gemma3":
        assert record["share_left_out"] > 0.1
        left_out = {entry for entry in record["left_out"] if ".experts." in entry}
        assert left_out == {entry for entry in tensors(members["base"]) if ".experts." in entry}
    else:
        assert sum(layer["name"].startswith("language_model.") for layer in record["layers"]) == 14


def test_a_vocabulary_under_an_older_name_is_compared(gemma, tmp_path):
    """The new base has the same tokens in the reverse order."""
    file = Path(gemma["new"]) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {token: 255 - number for token, number in content["model"]["vocab"].items()}
    file.write_text(json.dumps(content))
    deltas = [(gemma["post"], gemma["base"], 1.0)]
    with pytest.raises(ValueError, match=r"the vocabularies of .*new and .*post differ in 256 rows"):
        apply_param_delta(gemma["new"], deltas, tmp_path / "out")
    apply_param_delta(gemma["new"], deltas, tmp_path / "out", on_mismatch="by-token")
    order = torch.cat([torch.arange(255, -1, -1), torch.arange(256, 259)])
    name = "language_model.model.embed_tokens.weight"
    new, post, base, found = (
        tensors(folder)[name] for folder in (gemma["new"], gemma["post"], gemma["base"], tmp_path / "out")
    )
    assert torch.equal(found, new[order] + (post - base))


def test_a_model_whose_embedding_is_not_found_is_refused_unless_forced(own, tmp_path):
    for name in ("base", "post", "new"):
        rewrite(own[name], lambda t: {f"old.{key}": value for key, value in t.items()})
    deltas = [(own["post"], own["base"], 1.0)]
    with pytest.raises(ValueError, match=r"embedding is not found in .*, so that vocabularies cannot be compared"):
        apply_param_delta(own["new"], deltas, tmp_path / "out")
    report = apply_param_delta(own["new"], deltas, tmp_path / "out", force=True)
    assert any("the embedding is not found" in words for words in report.overridden)


def test_code_in_a_model_folder_is_not_run_to_read_its_config(own, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked agrees
    for name in ("base", "post", "new"):
        configure(own[name], model_type="my-own", auto_map={"AutoConfig": "conf.My", "AutoModelForCausalLM": "conf.My"})
        (Path(own[name]) / "conf.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass My: pass\n")
    report = apply_param_delta(own["new"], [(own["post"], own["base"], 1.0)], tmp_path / "out")
    assert any("transformers does not have the class" in note for note in report.notes)
    assert not (tmp_path / "run").exists()


def test_code_in_a_model_folder_is_not_run_to_read_its_tokenizer(own, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    configure(
        own["new"],
        "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["tok.Mine", "tok.Mine"]},
    )
    (Path(own["new"]) / "tok.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ValueError, match="its tokenizer is there but could not be loaded"):
        apply_param_delta(own["new"], [(own["post"], own["base"], 1.0)], tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_names_without_the_prefix_of_the_head_are_found(tmp_path):
    gpt2().transformer.save_pretrained(tmp_path)
    configure(tmp_path, architectures=["GPT2Model"])
    known = architecture_of(tmp_path)
    assert known is not None
    assert known.place("h.1.attn.c_attn.weight") == Place("transformer.h.1.attn.c_attn.weight", whole=True)
    assert known.linear["transformer.h.1.attn.c_attn.weight"].transposed
    assert known.stored_twice(["wte.weight", "lm_head.weight"]) == {"lm_head.weight": "wte.weight"}
