from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest

from trialist.data import streams
from trialist.data.corpora import load_documents
from trialist.data.files import cut_text
from trialist.data.streams import Place, RowTexts, stream_rows, text_pieces

PLACE = Place("a.jsonl", 3, "line")
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "u2"}, {"type": "image"}]},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks end within rows, lines and pieces."""
    monkeypatch.setattr(streams, "BLOCK", 50)
    monkeypatch.setattr(streams, "BATCH", 3)


def test_rows_come_in_order_with_their_places_from_every_format(tmp_path: Path):
    rows = [{"text": f"row {n} é 🎈" * (n % 4), "n": n} for n in range(11)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" * (1 + row["n"] % 3) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.json").write_text(lines, encoding="utf-8")
    (tmp_path / "c.json").write_text("  " + json.dumps(rows), encoding="utf-8")
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet", batch_size=4)
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.jsonl.gz", "b.json", "c.json", "d.parquet", "saved"):
        found = list(stream_rows(str(tmp_path / name)))
        assert [dict(row) for _, row in found] == rows, name
    places = [str(place) for place, _ in stream_rows(str(tmp_path / "a.jsonl"))]
    assert places[:4] == ["a.jsonl line 1", "a.jsonl line 2", "a.jsonl line 4", "a.jsonl line 7"]
    assert [str(place) for place, _ in stream_rows(str(tmp_path / "d.parquet"))][-1] == "d.parquet row 11"
    assert len(list(stream_rows(str(tmp_path / "d.parquet"), max_examples=4))) == 4


def test_only_wanted_columns_of_a_table_are_read_if_it_has_one(tmp_path: Path):
    datasets.Dataset.from_list([{"text": "a", "n": 1}]).to_parquet(tmp_path / "a.parquet")
    assert next(stream_rows(str(tmp_path / "a.parquet"), wanted=("prompt", "text")))[1] == {"text": "a"}
    assert next(stream_rows(str(tmp_path / "a.parquet"), wanted=("prompt",)))[1] == {"text": "a", "n": 1}


def test_a_folder_gives_its_files_and_splits_by_name(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "train.txt").write_text("one text\n\n" * 900)
    (tmp_path / "sub" / "train.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "held out"}\n')
    assert [str(place) for place, _ in stream_rows(str(tmp_path))] == ["sub/train.jsonl line 1", "train.txt"]
    assert [row["text"] for _, row in stream_rows(str(tmp_path), split="test")] == ["held out"]


def test_documents_of_a_text_are_those_of_load_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("A paragraph with ümlauts.\n\n" * 3_000 + "no break " * 9_000, encoding="utf-8")
    whole = load_documents(str(tmp_path / "a.txt")).texts
    assert tuple(row["text"] for _, row in stream_rows(str(tmp_path / "a.txt"))) == whole
    library = load_documents("python-stdlib", max_examples=5)
    found = list(stream_rows("python-stdlib", max_examples=5))
    assert tuple(row["text"] for _, row in found) == library.texts
    assert tuple(str(place) for place, _ in found) == library.ids
    with pytest.raises(ValueError, match="python-stdlib has no splits"):
        next(stream_rows("python-stdlib", split="train"))


@pytest.mark.parametrize("block", [1, 37, 5_000])
def test_a_text_read_in_blocks_is_cut_where_the_whole_is_cut(tmp_path: Path, monkeypatch, block):
    monkeypatch.setattr(streams, "BLOCK", block)
    chance = random.Random(block)
    text = "".join(
        chance.choice(
            ("word " * chance.randrange(60), "\n", "\n\n", "\r\n\r\n", " \n \n", "x" * chance.randrange(1, 9_000), "é")
        )
        for _ in range(90 if block < 40 else 400)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert list(text_pieces(tmp_path / "a.txt", blank=True)) == cut_text(text)
    assert list(text_pieces(tmp_path / "a.txt")) == [piece for piece in cut_text(text) if piece.strip()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n' * 30 + b'{"text": \n', r"a\.jsonl line 31: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n' * 30 + b'{"text": "\xe9"}\n', r"byte 430 \(line 31\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', "line 2: a JSON object is expected"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 300, mtime=0)[:-20], "not a whole gzip file"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.parquet", b"not parquet", "not a Parquet file"),
        ("a.json", b"[1, 2]", "row 1: a JSON object is expected"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(stream_rows(str(tmp_path / name)))


def test_a_missing_file_and_a_split_that_is_not_there_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(stream_rows(str(tmp_path / "none.jsonl")))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has no split 'test'"):
        list(stream_rows(str(tmp_path / "a.jsonl"), split="test"))


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"messages": TURNS, "text": "t"}, ["u1", "u2"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, ["q"]),
        ({"prompt": "p", "completion": "c"}, ["p"]),
        ({"prompt": TURNS, "chosen": "c", "rejected": "r"}, ["u1", "u2"]),
        ({"text": "t", "id": 4}, ["t"]),
        ({"text": None}, []),
    ],
)
def test_without_fields_the_words_of_the_user_are_looked_at(row, texts):
    assert RowTexts()(PLACE, row) == texts


def test_roles_and_fields_choose_other_texts():
    assert RowTexts(roles=("assistant",))(PLACE, {"messages": TURNS}) == ["a"]
    assert RowTexts(roles=("all",))(PLACE, {"messages": TURNS}) == ["s", "u1", "a", "u2"]
    assert RowTexts(roles=("user", "assistant"))(PLACE, {"prompt": "p", "completion": "c"}) == ["p", "c"]
    assert RowTexts(("answer", "tags"))(PLACE, {"answer": "a", "tags": ["x", "y"], "text": "t"}) == ["a", "x", "y"]


@pytest.mark.parametrize(
    ("texts", "row", "message"),
    [
        (RowTexts(), {"question": "q"}, r"a\.jsonl line 3: no column of the roles 'user' among 'question'.*--fields"),
        (
            RowTexts(),
            {"chosen": "c", "rejected": "r"},
            "no column of the roles 'user' among 'chosen', 'rejected'.*--roles",
        ),
        (RowTexts(("q",)), {"question": "q"}, "line 3: expected the column 'q', found 'question'"),
        (RowTexts(), {"text": 3}, "line 3: 'text' must be text, a list of texts or a conversation, not int"),
        (
            RowTexts(),
            {"messages": [{"content": "a"}]},
            "a turn of 'messages' must have 'role' and 'content', it has 'content'",
        ),
        (RowTexts(), {"messages": [{"role": "user", "content": 3}]}, "the content of a turn must be text, not int"),
    ],
)
def test_rows_that_do_not_fit_are_named(texts, row, message):
    with pytest.raises(ValueError, match=message):
        texts(PLACE, row)
