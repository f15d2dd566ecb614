from __future__ import annotations

import dataclasses
import json

import datasets
import pytest

from tests.evaluation.benchmark_asset import requests, write_asset
from trialist.data.benchmark_items import load_items
from trialist.data.benchmark_sources import SOURCES
from trialist.data.benchmarks import benchmark_names, documents
from trialist.data.streams import split_columns


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
    assert load_items(f"{tmp_path}/own.jsonl:id,problem").texts[0] == ("x1", "p 1")


def test_columns_stand_behind_a_colon(tmp_path, asset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.jsonl").write_text("{}")
    (tmp_path / "odd:name.jsonl").write_text("{}")
    known = {
        "gsm8k": ("gsm8k", ()), "gsm8k:answer": ("gsm8k", ("answer",)), "own.jsonl:a, b": ("own.jsonl", ("a", "b")),
        "data/own.jsonl:a": ("data/own.jsonl", ("a",)), "data/none.jsonl:a": ("data/none.jsonl", ("a",)),
        "odd:name.jsonl": ("odd:name.jsonl", ()), "owner/name": ("owner/name", ()),
        "owner/name:part": ("owner/name:part", ()), "owner/name:*": ("owner/name:*", ()),
        "owner/name::a": ("owner/name", ("a",)), "owner/name:part:a,b": ("owner/name:part", ("a", "b")),
        "arc_easy/test_rc_5shot:query": ("arc_easy/test_rc_5shot", ("query",)),
        "hails/mmlu_no_train/virology/dev:question": ("hails/mmlu_no_train/virology/dev", ("question",)),
    }  # fmt: skip
    assert {text: split_columns(text, benchmark_names()) for text in known} == known
    assert load_items("gsm8k:answer").texts[0][0].startswith("Add them.")


def test_ids_that_repeat_are_replaced_by_numbers(tmp_path, asset):
    (tmp_path / "own.jsonl").write_text('{"id": 1, "question": "a"}\n{"id": 1, "question": "b"}\n{"question": "c"}\n')
    assert load_items(str(tmp_path / "own.jsonl")).ids == ("1", "2", "3")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gsm9k", {}, "no benchmark 'gsm9k', and no such file. Did you mean 'gsm8k'"),
        ("mmlu_anatomi", {}, "no benchmark 'mmlu_anatomi'"),
        ("own.jsonl", {}, r"expected a column such as 'question', .*found 'body'.*own\.jsonl:COLUMN"),
        ("own.jsonl:q", {}, r"row 1: expected the column 'q', found 'body'.*own\.jsonl:COLUMN"),
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
    asked = []

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        return datasets.DatasetDict(validation=datasets.Dataset.from_list([{"question": "q", "best_answer": "a"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_items("truthfulqa").texts == (("q",),)
    assert asked == [("truthfulqa/truthful_qa", "generation")]


@pytest.mark.parametrize(("limit", "expected"), [(None, ["a 1", "a 2", "b 1"]), (1, ["a 1", "b 1"])])
def test_all_configurations_of_a_hub_benchmark_are_joined(monkeypatch, limit, expected):
    tables = {"a": ["q1", "q2"], "b": ["q3"]}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(tables) if name == "owner/exam" else [])

    def load_dataset(name, configuration):
        rows = [{"input": text} for text in tables[configuration]]
        return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setitem(SOURCES, "exam", dataclasses.replace(SOURCES["bbh"], hub="owner/exam:*", limit=limit))
    items = load_items("exam")
    assert list(items.ids) == expected
    assert items.texts == tuple((tables[name.split()[0]][int(name.split()[1]) - 1],) for name in expected)


def test_prompts_are_cut_into_their_fields(asset):
    query = "Title: A\nBackground: Some text.\nMore text.\nQuestion: Who was it?\nAnswer:"
    requests(asset, "squad/bpb_5shot", [{"id": "s1", "query": query, "choices": [""]}])
    query = "Category: SCIENCE\nQuestion: At sea level this travels 1,129 feet\nAnswer:"
    requests(asset, "jeopardy/bpb_5shot", [{"index": "0", "query": query, "choices": [""]}])
    squad = load_items("squad")
    assert (squad.fields, squad.texts) == (("passage", "question"), (("Some text.\nMore text.", "Who was it?"),))
    assert squad.remark.startswith(
        "these 1 items are a sample of the benchmark, which is rajpurkar/squad::context,question"
    )
    assert load_items("jeopardy").texts == (("At sea level this travels 1,129 feet",),)


def test_items_that_were_left_out_are_remarked(asset):
    assert load_items("gsm8k").remark == load_items("gsm8k", max_items=5).remark == ""
    assert load_items("gsm8k", max_items=4).remark == "only the first 4 items were taken"


@pytest.mark.asset
@pytest.mark.slow
def test_every_benchmark_of_the_asset_has_the_fields_of_the_table():
    try:
        benchmark_names()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    items = {name: load_items(name) for name, source in SOURCES.items() if source.asset}
    whole = {
        "gsm8k": 1319, "mmlu": 14042, "math500": 500, "math": 5000, "humaneval": 164, "arc_easy": 2376, "arc_challenge": 1172,
        "hellaswag": 10042, "boolq": 3270, "piqa": 1838, "winogrande": 1267, "coqa": 7983,
    }  # fmt: skip
    assert {name: len(items[name]) for name in whole} == whole
    assert {name for name, source in items.items() if source.remark} == {"drop", "squad"}
    for name, found in items.items():
        texts = [text for fields in found.texts for text in fields]
        assert not [
            text for text in texts if text.endswith(("\nAnswer:", "\nSolution:")) or text.startswith("Question:")
        ], name
