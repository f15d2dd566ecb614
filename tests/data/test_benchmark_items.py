from __future__ import annotations

import json

import pytest

from tests.evaluation.benchmark_asset import write_asset
from trialist.data.benchmark_items import SOURCES, load_items
from trialist.data.benchmarks import benchmark_names, documents


@pytest.fixture
def asset(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path / "cache"))
    return write_asset(tmp_path / "cache")


def test_items_of_the_asset_come_once_each_with_their_question(asset):
    gsm8k = load_items("gsm8k")
    assert gsm8k.fields == ("question",)
    assert [text for (text,) in gsm8k.texts] == [doc["question"] for doc in documents("gsm8k/gold_bpb_5shot")]
    arc = load_items("arc_easy")
    assert len(arc) == len(set(arc.ids)) == 9
    assert not any("Question:" in text or "Answer:" in text for (text,) in arc.texts)
    mmlu = load_items("mmlu")
    assert len(mmlu) == 12
    assert mmlu.ids[0] == "anatomy 1"
    assert load_items("mmlu_virology").texts == mmlu.texts[6:]
    assert load_items("hails/mmlu_no_train/virology/dev", max_items=3).fields == ("question",)


def test_files_serve_as_benchmarks(tmp_path, asset):
    rows = [{"id": "x1", "problem": "p 1", "extra": 1}, {"id": "x2", "problem": None, "extra": 2}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.txt").write_text("first item\n\nsecond item\n")
    items = load_items(str(tmp_path / "own.jsonl"))
    assert (items.fields, items.ids, items.texts) == (("problem",), ("x1", "x2"), (("p 1",), ("",)))
    assert load_items(str(tmp_path / "own.txt")).texts == (("first item",), ("second item",))
    assert load_items(str(tmp_path / "own.jsonl"), fields=("id", "problem")).texts[0] == ("x1", "p 1")


def test_ids_that_repeat_are_replaced_by_numbers(tmp_path, asset):
    (tmp_path / "own.jsonl").write_text('{"id": 1, "question": "a"}\n{"id": 1, "question": "b"}\n{"question": "c"}\n')
    assert load_items(str(tmp_path / "own.jsonl")).ids == ("1", "2", "3")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gsm9k", {}, "no benchmark 'gsm9k', and no such file. Did you mean 'gsm8k'"),
        ("mmlu_anatomi", {}, "no benchmark 'mmlu_anatomi'"),
        ("own.jsonl", {}, "expected a column such as 'question', .*found 'body'.*--benchmark-fields"),
        ("own.jsonl", {"fields": ("q",)}, "row 1: expected the column 'q', found 'body'"),
        ("numbers.jsonl", {}, "row 2: 'question' must be text, not int"),
        ("empty.jsonl", {}, r"benchmark 'empty\.jsonl' holds no items"),
        ("gsm8k", {"max_items": 0}, "max_items must be at least 1, not 0"),
    ],
)
def test_what_is_no_benchmark_is_named(tmp_path, asset, monkeypatch, name, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"question": "a"}\n{"question": 3}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=message):
        load_items(name, **given)


def test_without_the_asset_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIST_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="trialist assets fetch benchmarks"):
        load_items("gsm8k")


def test_a_hub_benchmark_is_loaded_by_its_configuration_split_and_fields(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        return datasets.DatasetDict(validation=datasets.Dataset.from_list([{"question": "q", "best_answer": "a"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_items("truthfulqa").texts == (("q",),)
    assert asked == [("truthfulqa/truthful_qa", "generation")]


@pytest.mark.asset
@pytest.mark.slow
def test_every_benchmark_of_the_asset_has_the_fields_of_the_table():
    try:
        benchmark_names()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    sizes = {name: len(load_items(name)) for name, source in SOURCES.items() if source.asset}
    assert {name: sizes[name] for name in ("gsm8k", "mmlu", "math500", "math", "humaneval", "arc_easy", "drop")} == {
        "gsm8k": 1319, "mmlu": 14042, "math500": 500, "math": 5000, "humaneval": 164, "arc_easy": 2376, "drop": 1000,
    }  # fmt: skip
