from __future__ import annotations

import json
import zipfile

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trialist.evaluation.blimp import Blimp, sentence_logprobs

PAIRS = [
    ("island", 0, "who slept", "who the slept"),
    ("island", 1, "a rather longer sentence that stands first.", "a rather longer sentence that stand first."),
    ("binding", 0, "ö", "o"),
    ("binding", 1, "she likes herself", "she likes himself"),
    ("binding", 2, "it is the same", "it is the same"),
]


def rows(paradigm: str) -> list[dict]:
    return [
        {"sentence_good": good, "sentence_bad": bad, "UID": name, "pairID": str(number), "linguistics_term": f"{name}s"}
        for name, number, good, bad in PAIRS
        if name == paradigm
    ]


@pytest.fixture
def folder(tmp_path):
    """One file, and one in an archive beside what a Mac puts there."""
    data = tmp_path / "blimp"
    data.mkdir()
    (data / "binding.jsonl").write_text("\n".join(map(json.dumps, rows("binding"))) + "\n")
    with zipfile.ZipFile(data / "more.zip", "w") as archive:
        archive.writestr("data/island.jsonl", "\n".join(map(json.dumps, rows("island"))))
        archive.writestr("__MACOSX/data/._island.jsonl", b"\x00\x05")
        archive.writestr("data/.DS_Store", b"\x00")
    return data


def naive(model, tokenizer, sentence: str) -> float:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(sentence)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(log_p[place - 1, ids[0, place]]) for place in range(1, ids.shape[1]))


@pytest.mark.parametrize(("batch", "row"), [(1, 47), (2, 47), (16, 512)])
def test_it_equals_the_sum_of_log_probabilities_sentence_by_sentence(folder, scored_model, monkeypatch, batch, row):
    monkeypatch.setattr("trialist.evaluation.blimp.ROW", row)  # short rows: sentences stand in another order than asked
    model, tokenizer = scored_model
    result = Blimp(str(folder))(model, tokenizer, batch=batch)
    ordered = [pair for name in ("binding", "island") for pair in PAIRS if pair[0] == name]
    expected = [naive(model, tokenizer, good) - naive(model, tokenizer, bad) for _, _, good, bad in ordered]
    assert result.scores["difference"] == pytest.approx(expected, abs=1e-3)
    assert result.scores["accuracy"] == tuple(float(d > 0) for d in expected[:2]) + (0.0,) + tuple(
        float(d > 0) for d in expected[3:]
    )
    assert result.metrics["accuracy"] == pytest.approx(sum(result.scores["accuracy"]) / 5)
    assert result.metrics["accuracy/islands"] == pytest.approx(sum(result.scores["accuracy"][3:]) / 2)
    assert [name.partition("#")[0] for name in result.ids][:4] == ["binding 0", "binding 1", "binding 2", "island 0"]


def test_a_model_that_ignores_restarting_positions_scores_each_sentence_alone(folder, scored_model):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=12, n_layer=1, n_head=2, initializer_range=0.5)
    model, tokenizer = GPT2LMHeadModel(config).eval(), scored_model[1]
    sentences = [text for pair in PAIRS for text in pair[2:]]
    found, tokens = sentence_logprobs(model, tokenizer, sentences)
    assert found == pytest.approx([naive(model, tokenizer, sentence) for sentence in sentences], abs=1e-3)
    assert tokens == sum(len(sentence.encode()) for sentence in sentences)


def test_a_limit_takes_the_first_pairs_of_each_paradigm(folder):
    assert [pair.name for pair in Blimp(str(folder), limit=1).pairs()] == ["binding 0", "island 0"]


def test_the_digest_follows_the_content(folder):
    before = Blimp(str(folder)).digest()
    (folder / "binding.jsonl").write_text(json.dumps(rows("binding")[0]))
    assert Blimp(str(folder)).digest() != before


def test_a_sentence_longer_than_the_context_is_refused(folder, scored_model):
    with pytest.raises(ValueError, match=r"the longest sentence \(island 1\) takes 44 tokens .* context is 30"):
        Blimp(str(folder)).check_fit(scored_model[1], 30)
    Blimp(str(folder)).check_fit(scored_model[1], 44)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"sentence_good": "x"}',
            r"a\.jsonl line 1: a minimal pair has the texts .*the row has sentence_good",
        ),
        ("a.jsonl", "\n{", r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", "[1]", r"a\.jsonl line 1: a JSON object is expected, not list"),
        ("a.jsonl", "", "holds no minimal pair"),
        ("a.zip", "no zip", r"a\.zip is not a whole zip archive"),
        ("a.txt", "", r"holds neither a \.jsonl nor a \.zip"),
    ],
)
def test_damaged_data_are_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Blimp(str(tmp_path / "d")).check()
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Blimp(str(tmp_path / "none.jsonl")).check()
    with pytest.raises(ValueError, match="--limit"):
        Blimp(str(tmp_path / "d"), limit=0).check()
