"""Names, shapes, dtypes and vocabularies that do not fit: each is named, or left as it is in the new base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.weights.conftest import configure, llama, perturbed, rewrite, tensors
from trialist.data.tokenizers import byte_tokenizer
from trialist.weights import apply_param_delta


def apply(members, out, **options):
    return apply_param_delta(members["new"], [(members["post"], members["base"], 1.0)], out, **options)


def test_missing_extra_and_misshapen_tensors_are_listed_with_their_number(own, tmp_path):
    gone = [f"model.layers.{n}.mlp.{name}_proj.weight" for n in (0, 1) for name in ("up", "down", "gate")]
    rewrite(own["post"], lambda t: {name: value for name, value in t.items() if name not in gone})
    rewrite(own["base"], lambda t: t | {"extra.weight": torch.ones(2), "lm_head.weight": torch.ones(259, 11)})
    rewrite(own["new"], lambda t: {name: value for name, value in t.items() if "q_proj" not in name})
    with pytest.raises(ValueError, match=r"^12 tensors do not match: ") as error:
        apply(own, tmp_path / "out")
    words = str(error.value)
    assert f"lm_head.weight is [259, 12] in {own['new']} and [259, 11] in {own['base']}" in words
    assert f"{gone[0]} is missing in {own['post']}" in words
    assert f"model.layers.0.self_attn.q_proj.weight of {own['post']} is not in {own['new']}" in words
    assert words.count(";") == 11  # ten names, the dots, and the advice
    assert not (tmp_path / "out").exists()


def test_skip_leaves_what_does_not_fit_as_it_is_and_says_so(own, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(own["post"], lambda t: t | {name: torch.ones(3, 4)})
    report = apply(own, tmp_path / "out", on_mismatch="skip", tokenizer="base-new")
    found, new = tensors(tmp_path / "out"), tensors(own["new"])
    assert {key for key in new if torch.equal(found[key], new[key])} == {name}
    assert report.skipped == [f"{name} is [20, 12] in {own['new']} and [3, 4] in {own['post']}"]
    assert json.loads((tmp_path / "out" / "param_delta.json").read_text())["skipped"] == report.skipped


def test_post_and_base_of_different_dtypes_are_refused_unless_forced(own, half_family, tmp_path):
    rewrite(own["post"], lambda t: {name: value.bfloat16() for name, value in t.items()})
    with pytest.raises(
        ValueError, match=r"post and base are stored in different dtypes.*lm_head.weight is torch.bfloat16"
    ):
        apply(own, tmp_path / "out")
    report = apply(own, tmp_path / "out", force=True)
    assert "different dtypes" in report.overridden[0]


@pytest.mark.parametrize("member", ["new", "base"])
def test_whole_numbers_where_the_class_has_weights_are_refused(own, tmp_path, member):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(own[member], lambda t: t | {name: torch.ones(20, 12, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf"{member}' is quantised: it stores {name} \(int8\) as whole numbers"):
        apply(own, tmp_path / "out", on_mismatch="skip", tokenizer="base-new")


def grow(folder: str, tokens: list[str], seed: int) -> None:
    """Adds tokens to the tokenizer, and rows to embedding and head."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def grown(own):
    """post has learned two more tokens, of which the new base has one, in another place, and one of its own."""
    grow(own["post"], ["<|end|>", "<|user|>"], 5)
    grow(own["new"], ["<|own|>", "<|end|>"], 6)
    configure(own["post"], "generation_config.json", eos_token_id=[257, 259], pad_token_id=258)
    return own


def rows_of(folder: str, name: str) -> dict[str, torch.Tensor]:
    """Row of each token."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    weight = tensors(folder)[name]
    return {token: weight[number] for token, number in vocabulary.items()}


def test_differing_vocabularies_are_an_error_that_names_rows(grown, tmp_path):
    with pytest.raises(ValueError, match=r"differ in 2 rows: row 259: '<\|own\|>' and '<\|end\|>', row 260") as error:
        apply(grown, tmp_path / "out")
    assert "--on-mismatch by-token" in str(error.value)


@pytest.mark.parametrize("blocks", ["whole", "small"])
def test_by_token_every_row_is_that_of_its_token(grown, tmp_path, blocks, request):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    report = apply(grown, tmp_path / "out", on_mismatch="by-token")
    out = str(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new, post, base, found = (rows_of(folder, name) for folder in (grown["new"], grown["post"], grown["base"], out))
        assert found.keys() == post.keys()
        for token, row in found.items():
            if token in base:
                expected = new[token] + (post[token] - base[token])
            elif token in new:
                expected = new[token]  # there is no base to take a difference from
            else:
                expected = post[token]
            assert torch.equal(row, expected), token
    assert report.notes == [
        "1 rows that the new base lacks are copied from the post-trained model: '<|user|>'",
        "1 tokens of the new base are not in the output: '<|own|>'",
    ]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 261
    assert model.generation_config.eos_token_id == [257, 259]
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|end|>") == 259


def test_with_the_tokenizer_of_the_new_base_rows_and_generation_settings_are_in_its_order(grown, tmp_path):
    apply(grown, tmp_path / "out", on_mismatch="by-token", tokenizer="base-new")
    out = str(tmp_path / "out")
    new, post, base, found = (
        rows_of(folder, "lm_head.weight") for folder in (grown["new"], grown["post"], grown["base"], out)
    )
    assert found.keys() == new.keys()
    assert torch.equal(found["<|own|>"], new["<|own|>"])
    assert torch.equal(found["A"], new["A"] + (post["A"] - base["A"]))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
    assert settings["eos_token_id"] == [vocabulary["<eos>"], vocabulary["<|end|>"]] == [257, 260]
    configure(grown["post"], "generation_config.json", eos_token_id=260)
    with pytest.raises(
        ValueError, match=r"eos_token_id of .*post' is '<\|user\|>', which the tokenizer of the output lacks"
    ):
        apply(grown, tmp_path / "refused", on_mismatch="by-token", tokenizer="base-new")
    assert not (tmp_path / "refused").exists()


def test_rows_in_another_order_are_found_by_token(own, tmp_path):
    """The new base has the same tokens in the reverse order."""
    tokenizer = json.loads((Path(own["new"]) / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 255 - number for token, number in vocabulary.items()}
    (Path(own["new"]) / "tokenizer.json").write_text(json.dumps(tokenizer))
    order = torch.cat([torch.arange(255, -1, -1), torch.arange(256, 259)])
    plain = tmp_path / "plain"
    apply_param_delta(
        own["new"], [(own["post"], own["base"], 1.0)], plain, exclude=["*embed*", "lm_head*"], on_mismatch="by-token"
    )
    apply(own, tmp_path / "out", on_mismatch="by-token")
    new, post, base, found, left = (
        tensors(folder)["lm_head.weight"] for folder in (own["new"], own["post"], own["base"], tmp_path / "out", plain)
    )
    assert torch.equal(found, new[order] + (post - base))
    assert torch.equal(left, new[order])


def renamed(folder: str, row: int, token: str) -> None:
    """The token of a row gets another name, as reserved tokens do between releases."""
    file = Path(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    for entry in content["added_tokens"]:
        if entry["id"] == row:
            entry["content"] = token
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token if number == row else name: number for name, number in vocabulary.items()}
    file.write_text(json.dumps(content))
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    configure(folder, "tokenizer_config.json", **{k: token if v == "<pad>" else v for k, v in settings.items()})


def test_a_renamed_token_of_equal_row_is_added_by_row_and_named(own, tmp_path):
    renamed(own["new"], 258, "<|reserved|>")
    with pytest.raises(ValueError, match=r"differ in 1 rows: row 258: .*--on-mismatch by-row by number"):
        apply(own, tmp_path / "out")
    report = apply(own, tmp_path / "out", on_mismatch="by-row")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new, post, base, found = (
            tensors(folder)[name] for folder in (own["new"], own["post"], own["base"], tmp_path / "out")
        )
        assert torch.equal(found, new + (post - base))
    words = "1 rows stand for different tokens and are added by number: row 258: '<|reserved|>' and '<pad>'"
    assert words in report.notes
    assert words in json.loads((tmp_path / "out" / "param_delta.json").read_text())["notes"]


def test_rows_of_different_number_are_not_added_by_row(grown, tmp_path):
    grow(grown["new"], ["<|one more|>"], 7)
    with pytest.raises(ValueError, match=r"by-row wants embeddings of one length, not \[262, 261, 259\]"):
        apply(grown, tmp_path / "out", on_mismatch="by-row")


@pytest.mark.parametrize("choice", ["by-token", "skip"])
def test_a_chat_template_whose_markers_the_new_base_lacks_needs_the_other_tokenizer(grown, tmp_path, choice):
    tokenizer = AutoTokenizer.from_pretrained(grown["post"])
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(grown["post"])
    with pytest.raises(
        ValueError, match=r"writes <\|user\|>, which the tokenizer of .*new lacks; take --tokenizer post"
    ):
        apply(grown, tmp_path / "out", on_mismatch=choice, tokenizer="base-new")
    assert not (tmp_path / "out").exists()
    apply(grown, tmp_path / "out", on_mismatch="by-token")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_alpha_zero_by_token_keeps_the_new_rows_bit_for_bit(grown, tmp_path):
    apply_param_delta(
        grown["new"],
        [(grown["post"], grown["base"], 0.0)],
        tmp_path / "out",
        on_mismatch="by-token",
        tokenizer="base-new",
    )
    for name, value in tensors(grown["new"]).items():
        assert torch.equal(tensors(tmp_path / "out")[name], value)


def test_a_token_beyond_the_rows_is_no_difference(own, tmp_path):
    """As where a padding token was named and the embedding left as it was."""
    tokenizer = AutoTokenizer.from_pretrained(own["post"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    tokenizer.save_pretrained(own["post"])
    apply(own, tmp_path / "out")
    assert "<|late|>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_skip_with_other_vocabularies_needs_the_tokenizer_of_the_new_base(grown, tmp_path):
    with pytest.raises(ValueError, match="--tokenizer base-new"):
        apply(grown, tmp_path / "out", on_mismatch="skip")
    report = apply(grown, tmp_path / "out", on_mismatch="skip", tokenizer="base-new")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], tensors(grown["new"])["lm_head.weight"])
    assert sorted(report.skipped) == [
        f"{name}: the vocabularies differ" for name in ("lm_head.weight", "model.embed_tokens.weight")
    ]


def test_tokenizer_template_and_generation_settings_are_those_of_the_post_trained_model(own, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(own["post"])
    configure(own["post"], "generation_config.json", eos_token_id=65, temperature=0.5, do_sample=True)
    configure(own["post"], eos_token_id=65)
    for choice in ("post", "base-new"):
        apply(own, tmp_path / choice, tokenizer=choice)
        loaded = AutoTokenizer.from_pretrained(tmp_path / choice)
        assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / choice)
        assert model.generation_config.eos_token_id == 65
        assert model.generation_config.temperature == 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "post").config.eos_token_id == 65


def test_models_without_tokenizers_are_taken_to_share_their_rows_and_it_is_said(own, tmp_path):
    for name in ("base", "post", "new"):
        for file in Path(own[name]).glob("tokenizer*"):
            file.unlink()
    report = apply(own, tmp_path / "out")
    assert any("no tokenizer in" in note for note in report.notes)
    assert any("so the output has none" in note for note in report.notes)


def test_a_model_saved_without_its_head_prefix_is_read_by_its_own_names(tmp_path):
    from transformers import AutoModel

    for name, seed in (("base", 0), ("post", 1), ("new", 2)):
        model = perturbed(llama(tie_word_embeddings=True), 1e-3 * seed, seed)
        model.model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        configure(tmp_path / name, architectures=["LlamaModel"])
    members = {name: str(tmp_path / name) for name in ("base", "post", "new")}
    assert "embed_tokens.weight" in tensors(members["base"])
    apply(members, tmp_path / "out")
    new, post, base = (tensors(members[name])["norm.weight"] for name in ("new", "post", "base"))
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "out").norm.weight, new + (post - base))
