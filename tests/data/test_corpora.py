from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest

from trialist.data import corpora
from trialist.data.corpora import data_digest, load_documents, load_rows, parse_columns, stdlib_module
from trialist.data.files import cut_text


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_standard_library_holds_known_modules_and_no_tests():
    documents = load_documents("python-stdlib")
    assert {"json/decoder.py", "ast.py", "asyncio/events.py"} <= set(documents.ids)
    assert not [
        name for name in documents.ids if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))
    ]
    assert list(documents.ids) == sorted(documents.ids)
    assert json.__doc__.splitlines()[0] in documents.texts[documents.ids.index("json/__init__.py")]


def test_a_c_accelerators_python_twin_belongs_to_its_module():
    assert [
        stdlib_module(name) for name in ("_pydecimal.py", "decimal.py", "_strptime.py", "pydoc.py", "json/tool.py")
    ] == [
        "decimal",
        "decimal",
        "strptime",
        "pydoc",
        "json",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "one\n\ntwo\r\n\r\nthree\n \n\nfour" * 500,
        "a line\n" * 9_000,
        "x" * 50_001,
        "short",
        "\n" * 40_000,
        "word " * 20_000,
    ],
    ids=["blank lines", "line breaks", "one line", "short", "only blank", "one line of words"],
)
def test_cut_pieces_join_to_the_text_and_have_the_stated_sizes(text: str):
    pieces = cut_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) >= 2_000 for piece in pieces[:-1])
    if "\n\n" not in text:
        assert all(len(piece) <= 16_000 for piece in pieces)


def test_a_text_with_blank_lines_is_cut_only_there():
    paragraphs = [f"paragraph {i} " * 30 for i in range(60)]
    for piece in cut_text("\n\n".join(paragraphs))[:-1]:
        assert piece.endswith("\n\n")
        assert len(piece) < 2_000 + len(paragraphs[0]) + 4


def test_the_same_rows_come_from_jsonl_json_parquet_gzip_and_a_saved_data_set(tmp_path: Path):
    rows = [{"text": "one\u2028é", "n": 1}, {"text": "two 🎈", "n": 2}]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    built = datasets.Dataset.from_list(rows)
    built.to_parquet(tmp_path / "a.parquet")
    built.save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "b.jsonl.gz", "a.parquet", "saved"):
        data = str(tmp_path / name)
        assert load_documents(data).texts == ("one\u2028é", "two 🎈"), name
        assert load_rows(data, required=("n", "text")).to_list() == [
            {"text": row["text"], "n": row["n"]} for row in rows
        ], name


def test_columns_are_renamed_and_shadow_columns_of_the_same_name(tmp_path: Path):
    rows = [{"question": "q1", "text": "old", "body": "b1", "extra": 3}]
    write_lines(tmp_path / "a.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    columns = parse_columns("prompt=question, text=body")
    for name in ("a.jsonl", "a.parquet"):
        loaded = load_rows(str(tmp_path / name), required=("prompt",), columns=columns)
        assert sorted(loaded.column_names) == ["extra", "prompt", "text"], name
        assert loaded.to_list() == [{"prompt": "q1", "text": "b1", "extra": 3}], name


def test_max_examples_keeps_the_first_that_are_not_empty(tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in ("", "a", " ", "b", "c")])
    assert load_documents(str(file), max_examples=2).texts == ("a", "b")
    assert len(load_rows(str(file), required=("text",), max_examples=2)) == 2
    with pytest.raises(ValueError, match="max_examples must be at least 1, not 0"):
        load_documents(str(file), max_examples=0)


def test_a_folder_gives_a_document_per_text_file_and_its_named_splits(tmp_path: Path):
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("b " * 5_000)
    (tmp_path / "texts" / "sub" / "a.md").write_text("a")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    documents = load_documents(str(tmp_path / "texts"))
    assert (documents.ids, [len(text) for text in documents.texts]) == (("b.txt", "sub/a.md"), [10_000, 1])

    (tmp_path / "split").mkdir()
    write_lines(tmp_path / "split" / "train-00.jsonl", [{"text": "t"}])
    write_lines(tmp_path / "split" / "test.jsonl", [{"text": "held out"}])
    assert load_documents(str(tmp_path / "split")).texts == ("t",)
    assert load_documents(str(tmp_path / "split"), split="test").texts == ("held out",)
    with pytest.raises(ValueError, match="no split 'dev': it has 'test', 'train'"):
        load_documents(str(tmp_path / "split"), split="dev")


def test_a_hub_data_set_is_loaded_by_id_configuration_and_split(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        return datasets.DatasetDict(
            train=datasets.Dataset.from_list([{"content": "a"}]), test=datasets.Dataset.from_list([{"content": "b"}])
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_documents("owner/name:small", split="test", columns={"text": "content"})
    assert (documents.texts, asked) == (("b",), [("owner/name", "small")])
    assert load_rows("owner/name", required=("content",)).to_list() == [{"content": "a"}]
    with pytest.raises(ValueError, match="expected the column 'text', found 'content'; name them with columns text="):
        load_documents("owner/name")
    with pytest.raises(ValueError, match="no split 'dev': it has 'train', 'test'"):
        load_documents("owner/name", split="dev", columns={"text": "content"})


def test_a_hub_data_set_that_cannot_be_reached_says_so():
    with pytest.raises(FileNotFoundError, match=r"'owner/no-such-data' is no local path, and as a Hub id"):
        load_documents("owner/no-such-data")
    with pytest.raises(ConnectionError, match="pass a local path"):
        data_digest("owner/no-such-data")


def test_a_hub_digest_is_the_commit_or_the_one_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--owner--name" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--owner--name" / "refs" / "main").write_text("abc123\n")
    assert data_digest("owner/name:small") == "hub:owner/name:small@abc123"


def test_digests_follow_the_content_and_not_the_path(tmp_path: Path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    assert data_digest(str(first)) == data_digest(str(second)) == f"sha256:{hashlib.sha256(b'same').hexdigest()}"
    before = data_digest(str(tmp_path))
    second.write_text("other")
    assert data_digest(str(tmp_path)) != before
    assert data_digest("python-stdlib") == data_digest("python-stdlib")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', "line 2: a JSON object is expected, not list"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2: a JSON object is expected, not int"),
        ("a.json", b'[{"text": "a"},\n}]', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', "expected the column 'text', found 'body', 'n'.*columns text="),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: 'text' is missing; the row has 'body'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: 'text' must be a string, not int"),
        ("a.jsonl", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"fine\nnot \xe9 so fine", r"byte 9 \(line 2\) is not UTF-8: 0xe9; convert the file"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.parquet", b"not parquet", "not a Parquet file"),
        ("a.csv", b"a,b", r"suffix '\.csv' is unknown; known are \.txt"),
    ],
)
def test_broken_files_are_named_with_the_place_and_the_way_out(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


def test_a_null_in_a_required_parquet_column_names_its_row(tmp_path: Path):
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2: 'text' is missing"):
        load_rows(str(tmp_path / "a.parquet"), required=("text",))


def test_rows_of_an_empty_file_or_of_text_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(str(tmp_path / "a.jsonl"), required=("prompt",))
    with pytest.raises(ValueError, match="plain text without the columns prompt"):
        load_rows(str(tmp_path / "a.txt"), required=("prompt",))
    with pytest.raises(ValueError, match="running text without the columns prompt"):
        load_rows("python-stdlib", required=("prompt",))


def test_a_missing_file_suggests_its_neighbour_and_a_misspelt_corpus_its_name(tmp_path: Path):
    (tmp_path / "preferences.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder. Did you mean 'preferences\.jsonl'"):
        load_documents(str(tmp_path / "preferenses.jsonl"))
    with pytest.raises(FileNotFoundError, match="Did you mean 'python-stdlib'"):
        load_documents("python-stdlb")
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        data_digest("/no/such/folder/a.txt")


@pytest.mark.parametrize("text", ["prompt", "=a", "a=", "a=b,a=c"])
def test_columns_that_are_no_mapping_are_refused(text: str):
    with pytest.raises(ValueError, match="columns: "):
        parse_columns(text)


@pytest.mark.asset
@pytest.mark.slow
def test_enwik8_is_one_hundred_million_bytes_of_pages():
    try:
        corpora.assets.path("enwik8")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    documents = load_documents("enwik8")
    assert sum(len(text.encode()) for text in documents.texts) == 100_000_000
    assert sum("<page>" in text for text in documents.texts) == len(documents)
