from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.weights.conftest import configure, gpt2, llama, perturbed, rewrite, save_family, tensors
from trialist.data.tokenizers import byte_tokenizer
from trialist.weights import apply_param_delta, extract_delta
from trialist.weights.low_rank import decompose

IDS = torch.randint(259, (2, 9), generator=torch.Generator().manual_seed(0))


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def put_on(base: str, adapter) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


@pytest.mark.parametrize("rank", [3, 12], ids=["randomised", "exact"])
def test_the_factors_are_the_closest_of_their_rank(rank):
    """Eckart and Young: the error is the rest of the singular values."""
    left, _ = torch.linalg.qr(torch.randn(90, 80, generator=chance()))
    right, _ = torch.linalg.qr(torch.randn(130, 80, generator=chance()))
    values = 0.8 ** torch.arange(80)
    matrix = (left * values) @ right.T
    found = decompose(matrix, rank, 0.9, chance())
    assert (found.up.shape, found.down.shape) == ((90, rank), (rank, 130))
    best = float(values[rank:].square().sum().sqrt())
    assert float((matrix - found.up @ found.down).norm()) == pytest.approx(best, rel=1e-3)
    assert found.kept == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["wide", "tall"])
def test_ranks_above_that_of_the_matrix_give_it_back_with_zeros(shape):
    matrix = torch.randn(shape[0], 2, generator=chance()) @ torch.randn(2, shape[1], generator=chance())
    found = decompose(matrix, 4, 0.9, chance())
    assert found.up.shape[1] == 4
    torch.testing.assert_close(found.up @ found.down, matrix, atol=1e-6, rtol=1e-5)
    assert found.kept == pytest.approx(1)


def test_without_a_rank_the_smallest_that_keeps_the_energy_is_taken():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0]))  # squares 9, 4, 1, 1 of 15
    for energy, rank in ((0.5, 1), (9 / 15, 1), (0.61, 2), (13 / 15, 2), (0.9, 3), (1.0, 4)):
        assert decompose(matrix, None, energy, chance()).up.shape[1] == rank


@pytest.fixture(scope="module")
def low(tmp_path_factory) -> dict[str, str]:
    """A post-trained model that differs from its base by rank 2 in two layers."""
    folder = tmp_path_factory.mktemp("low")
    base, post = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    with torch.no_grad():
        for layer in (post.model.layers[0].mlp.up_proj, post.model.layers[1].self_attn.q_proj):
            m, n = layer.weight.shape
            layer.weight += 0.01 * torch.randn(m, 2, generator=chance()) @ torch.randn(2, n, generator=chance())
    for name, model in (("base", base), ("post", post)):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("base", "post")}


def test_an_adapter_of_the_delta_s_own_rank_is_the_post_trained_model(low, tmp_path):
    record = extract_delta(low["post"], low["base"], tmp_path / "adapter", rank=2)
    assert [layer["name"] for layer in record["layers"]] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert record["kept_of_linear_layers"] == pytest.approx(1, abs=1e-5)
    assert record["left_out"] == []
    adapted = put_on(low["base"], tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(AutoModelForCausalLM.from_pretrained(low["post"])))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(AutoModelForCausalLM.from_pretrained(low["post"])))


def test_an_adapter_on_another_base_is_param_delta_of_low_rank(low, tmp_path):
    new = perturbed(AutoModelForCausalLM.from_pretrained(low["base"]), 3e-3, 5)
    new.save_pretrained(tmp_path / "new")
    byte_tokenizer().save_pretrained(tmp_path / "new")
    extract_delta(low["post"], low["base"], tmp_path / "adapter", rank=2)
    apply_param_delta(str(tmp_path / "new"), [(low["post"], low["base"], 1.0)], tmp_path / "sum")
    adapted = put_on(str(tmp_path / "new"), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sum")))


@pytest.mark.parametrize(
    "build", [lambda: llama(tie_word_embeddings=False), lambda: llama(tie_word_embeddings=True)], ids=["untied", "tied"]
)
def test_full_ranks_and_the_rest_saved_are_the_post_trained_model(build, tmp_path):
    members = save_family(tmp_path, build)
    record = extract_delta(members["post"], members["base"], tmp_path / "adapter", energy=1.0, rest="save")
    assert record["share_left_out"] == 0
    assert record["kept_of_linear_layers"] == pytest.approx(1, abs=1e-5)
    adapted = put_on(members["base"], tmp_path / "adapter")
    post = AutoModelForCausalLM.from_pretrained(members["post"])
    torch.testing.assert_close(logits(adapted), logits(post), atol=2e-6, rtol=1e-4)


def test_transposed_layers_and_ranks_of_their_own_load(tmp_path):
    members = save_family(tmp_path, gpt2)
    record = extract_delta(members["post"], members["base"], tmp_path / "adapter", energy=0.8)
    ranks = {layer["name"]: layer["rank"] for layer in record["layers"]}
    assert len(set(ranks.values())) > 1
    left_out = set(record["left_out"])
    assert "transformer.wte.weight" in left_out
    adapted = put_on(members["base"], tmp_path / "adapter").merge_and_unload()
    base, post = tensors(members["base"]), tensors(members["post"])
    for name, parameter in adapted.named_parameters():
        if name in ranks:
            delta = post[name] - base[name]
            best = torch.linalg.svdvals(delta)[ranks[name] :].square().sum().sqrt()
            error = (parameter.detach() - post[name]).norm()
            assert float(error) == pytest.approx(float(best), rel=1e-3, abs=1e-6)
        else:
            assert torch.equal(parameter, base[name])


def test_biases_of_adapted_layers_are_left_out_by_name_and_norms_are_saved(tmp_path):
    members = save_family(tmp_path, gpt2)
    record = extract_delta(members["post"], members["base"], tmp_path / "adapter", rank=2, rest="save")
    assert record["left_out"] == [
        f"transformer.h.{n}.{layer}.bias"
        for n in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    post = tensors(members["post"])
    name = "transformer.h.1.ln_2.bias"
    assert torch.equal(stored[f"base_model.model.{name}"], post[name])
    assert json.loads((tmp_path / "adapter" / "low_rank_delta.json").read_text())["rank"] == 2


def test_a_bias_that_changed_where_the_weight_did_not_is_saved(tmp_path):
    members = save_family(tmp_path, gpt2)
    base = tensors(members["base"])
    layer = "transformer.h.0.mlp.c_fc"
    rewrite(members["post"], lambda t: t | {f"{layer}.weight": base[f"{layer}.weight"]})
    record = extract_delta(members["post"], members["base"], tmp_path / "adapter", rank=2, rest="save")
    assert f"{layer}.bias" not in record["left_out"]
    merged = put_on(members["base"], tmp_path / "adapter").merge_and_unload()
    assert torch.equal(merged.state_dict()[f"{layer}.bias"], tensors(members["post"])[f"{layer}.bias"])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("member", ["post", "base"])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(own, tmp_path, name, member):
    rewrite(own[member], lambda t: t | {name: torch.full_like(t[name], torch.nan)})
    with pytest.raises(ValueError, match=rf"{name} of .*{member} holds values that are not finite"):
        extract_delta(own["post"], own["base"], tmp_path / "adapter", rank=2, rest="save", force=True)
    assert not (tmp_path / "adapter").exists()


def chat(folder: str, tokens: list[str], marker: str = "[") -> None:
    """A chat template, and new tokens with rows of their own."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}" + marker + "{{ m['content'] }}{% endfor %}"
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    configure(folder, "generation_config.json", eos_token_id=65)


def test_an_adapter_answers_with_the_post_trained_model_s_template_and_settings(own, tmp_path, monkeypatch):
    chat(own["post"], [])
    monkeypatch.chdir(tmp_path)
    extract_delta("own/post", "own/base", "adapter", rank=2)
    monkeypatch.chdir("/")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert adapted.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 11)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi"
    assert json.loads((tmp_path / "adapter" / "generation_config.json").read_text())["eos_token_id"] == 65


@pytest.mark.parametrize("marker", ["[", "<|user|>"], ids=["of old tokens", "of new tokens"])
def test_of_a_model_with_new_tokens_linear_layers_are_taken_and_embeddings_left(own, tmp_path, marker):
    chat(own["post"], ["<|user|>"], marker)
    record = extract_delta(own["post"], own["base"], tmp_path / "adapter", rank=2, rest="save")
    assert sorted(record["not_compared"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert len(record["layers"]) == 14
    adapted = put_on(own["base"], tmp_path / "adapter")
    assert adapted.get_input_embeddings().weight.shape[0] == 259
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert len(tokenizer) == 259
    if marker == "[":
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi"
    else:
        assert tokenizer.chat_template is None
        assert "writes <|user|>, which the base lacks" in " ".join(record["notes"])


def test_models_of_different_size_are_refused_without_advice_for_other_commands(own, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(own["post"], lambda t: {key: value for key, value in t.items() if key != name})
    with pytest.raises(ValueError, match=rf"1 tensors do not match: {name} is missing in .*one architecture") as error:
        extract_delta(own["post"], own["base"], tmp_path / "adapter", rank=2)
    assert "--on-mismatch" not in str(error.value)


def test_a_rank_above_that_of_a_layer_is_told(own, tmp_path):
    record = extract_delta(own["post"], own["base"], tmp_path / "adapter", rank=8)
    assert record["notes"] == [
        "4 layers are smaller than rank 8 and are held whole: model.layers.0.self_attn.k_proj.weight, "
        "model.layers.0.self_attn.v_proj.weight, model.layers.1.self_attn.k_proj.weight, ... (4 in all)"
    ]


def test_nothing_to_decompose_foreign_models_and_wrong_options_are_refused(low, family, tmp_path):
    out = tmp_path / "adapter"
    with pytest.raises(ValueError, match="agree in every linear layer"):
        extract_delta(low["base"], low["base"], out, rank=1)
    llama(9, tie_word_embeddings=False).save_pretrained(tmp_path / "foreign")
    byte_tokenizer().save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="not of one lineage"):
        extract_delta(str(tmp_path / "foreign"), family["base"], out, rank=1)
    with pytest.raises(ValueError, match=r"--rank is at least 1, not 0"):
        extract_delta(low["post"], low["base"], out, rank=0)
    with pytest.raises(ValueError, match=r"--energy is a share"):
        extract_delta(low["post"], low["base"], out, energy=0.0)
    assert not out.exists()
