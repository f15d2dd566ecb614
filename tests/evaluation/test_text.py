from __future__ import annotations

import json
import math

import pytest
import torch

from trialist.evaluation.text import Text

TEXTS = ["a first document", "ein zweites — länger, mit Umlaut ü", "3"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    return str(path)


def test_the_mean_of_the_items_is_all_bits_over_all_bytes_and_equals_a_naive_sum(file, scored_model):
    model, tokenizer = scored_model
    result = Text(file, columns="text=body")(model, tokenizer)
    expected = []
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        expected.append(-sum(float(log_p[i - 1, ids[0, i]]) for i in range(1, ids.shape[1])) / math.log(2))
    sizes = [len(text.encode()) for text in TEXTS]
    assert result.scores["bits"] == pytest.approx(expected, rel=1e-4)
    assert result.scores["bytes"] == tuple(map(float, sizes))
    assert result.metrics["bits_per_byte"] == pytest.approx(sum(expected) / sum(sizes), rel=1e-5)
    items = result.scores["bits_per_byte"]
    assert sum(items) / len(items) == pytest.approx(result.metrics["bits_per_byte"], rel=1e-12)
    assert result.tokens == sum(sizes)


def test_an_item_of_other_content_has_another_id(file, scored_model, tmp_path):
    other = tmp_path / "other" / "own.jsonl"
    other.parent.mkdir()
    other.write_text("\n".join(json.dumps({"body": text}) for text in ["another", *TEXTS[1:]]))
    first, second = (Text(data, columns="text=body")(*scored_model).ids for data in (file, str(other)))
    assert first[0] != second[0]
    assert first[1:] == second[1:]


def test_progress_ends_at_the_whole(file, scored_model):
    seen = []
    Text(file, columns="text=body", length=8)(*scored_model, batch=2, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] > 1
    assert seen == sorted(seen)


def test_windows_longer_than_the_context_are_refused(file, scored_model):
    with pytest.raises(ValueError, match=r"--length 4096\) takes 4,096 tokens .* context is 2,048"):
        Text(file, columns="text=body", length=4096)(*scored_model)
    with pytest.raises(ValueError, match="--length must be at least 2"):
        Text(file, length=1).check()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Text(file + "l").check()
