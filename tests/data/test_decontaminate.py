from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from trialist.data import subset
from trialist.data.decontaminate import Decontaminate, decontaminate
from trialist.data.files import cut_text
from trialist.data.scanner import Scanner

QUESTION = "How many apples does Ann have after she gives four of her nine apples away?"
OTHER = "A train leaves the station at noon and a second one follows it an hour later"
CLEAN = "Nothing in this row has anything to do with fruit or railways at all, it is about ships"
ROWS = [
    {"text": CLEAN, "n": 1},
    {"text": f"Solve it: {QUESTION.upper()} Think first. é", "n": 2},
    {"text": CLEAN, "n": 3},
    {"text": OTHER[:30], "n": 4},
    {"text": f"{OTHER} the day after", "n": 5},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": "apples", "question": QUESTION}, {"id": "trains", "question": OTHER}]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def clean(data: str, output: str, **given) -> dict:
    """The record of a run."""
    lines: list[str] = []
    Decontaminate(data=data, output=output, **({"benchmarks": ("items.jsonl",)} | given))(say=lines.append)
    return json.loads(Path(f"{output}.removed.json").read_text())


def lines_of(rows: list[dict], end: str = "\n") -> bytes:
    return (
        "\n\n".join(json.dumps(row, ensure_ascii=False, indent=None, separators=(" , ", ": ")) for row in rows).encode()
        + end.encode()
    )


def test_rows_that_match_are_gone_and_the_others_keep_their_bytes(here):
    Path("train.jsonl").write_bytes(lines_of(ROWS, end=""))
    record = clean("train.jsonl", "out/clean.jsonl")
    kept = [line for at, line in enumerate(lines_of(ROWS, end="").splitlines(keepends=True), 1) if at not in (3, 9)]
    assert Path("out/clean.jsonl").read_bytes() == b"".join(kept)
    assert record["removed rows"] == [
        {"row": "train.jsonl line 3", "benchmark": "items.jsonl", "item": "apples", "share": 1.0,
         "matching text": QUESTION.upper().rstrip("?")},
        {"row": "train.jsonl line 9", "benchmark": "items.jsonl", "item": "trains", "share": 1.0, "matching text": OTHER},
    ]  # fmt: skip
    assert (record["rows"], record["removed"], record["removed by benchmark"]) == (5, 2, {"items.jsonl": 2})
    assert (record["settings"]["n"], record["settings"]["coverage"]) == (8, 0.5)
    assert record["digest"] == f"sha256:{hashlib.sha256(lines_of(ROWS, end='')).hexdigest()}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.parquet"])
def test_every_format_is_kept(here, monkeypatch, name):
    monkeypatch.setattr(subset, "BATCH", 2)
    content = json.dumps(ROWS).encode() if name == "b.json" else lines_of(ROWS)
    if name.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(ROWS).replace_schema_metadata({"made": "by hand"})
        pyarrow.parquet.write_table(table, name, compression="zstd")
    else:
        Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    clean(name, f"clean-{name}")
    expected = [row for row in ROWS if row["n"] not in (2, 5)]
    if name.endswith(".parquet"):
        written = pyarrow.parquet.ParquetFile(f"clean-{name}")
        assert written.schema_arrow.metadata[b"made"] == b"by hand"
        assert written.metadata.row_group(0).column(0).compression == "ZSTD"
        assert written.read().to_pylist() == expected
    else:
        content = Path(f"clean-{name}").read_bytes()
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
        found = json.loads(text) if name == "b.json" else [json.loads(line) for line in text.splitlines() if line]
        assert found == expected


@pytest.mark.parametrize("rule", ["tulu3", "any", "whole", "longest", "union"])
def test_the_neutral_setting_writes_the_same_bytes(here, rule):
    Path("folder/sub").mkdir(parents=True)
    Path("folder/a.jsonl").write_bytes(lines_of(ROWS))
    Path("folder/sub/b.json").write_text(json.dumps(ROWS))
    Path("folder/sub/c.txt").write_text(QUESTION)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "folder/d.parquet")
    record = clean("folder", "clean", coverage=1.0, rule=rule, short="count")
    assert record["removed rows"] == []
    for name in ("a.jsonl", "sub/b.json", "sub/c.txt", "d.parquet"):
        assert Path("clean", name).read_bytes() == Path("folder", name).read_bytes()


def test_of_a_folder_each_file_loses_its_own_rows(here):
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_bytes(lines_of(ROWS))
    Path("folder/b.jsonl").write_bytes(lines_of([ROWS[0], ROWS[2]]))
    Path("folder/c.txt").write_text(f"Listen. {QUESTION}")
    Path("folder/d.md").write_text(CLEAN)
    record = clean("folder", "clean")
    assert sorted(path.name for path in Path("clean").iterdir()) == ["a.jsonl", "b.jsonl", "d.md"]
    assert Path("clean/b.jsonl").read_bytes() == Path("folder/b.jsonl").read_bytes()
    assert [row["row"] for row in record["removed rows"]] == ["a.jsonl line 3", "a.jsonl line 9", "c.txt"]


def test_columns_of_the_data_stand_behind_a_colon(here):
    Path("train.jsonl").write_bytes(lines_of([{"text": CLEAN, "answer": QUESTION}, {"text": OTHER, "answer": CLEAN}]))
    record = clean("train.jsonl:answer", "clean.jsonl")
    assert [row["item"] for row in record["removed rows"]] == ["apples"]
    assert record["data"] == "train.jsonl:answer"


def test_files_of_other_splits_are_named_and_not_written(here):
    Path("folder/sub").mkdir(parents=True)
    for name in ("train.jsonl", "test.jsonl", "sub/card.html"):
        Path("folder", name).write_bytes(lines_of(ROWS))
    shown = Decontaminate(data="folder", benchmarks=("items.jsonl",), output="clean")(say=lambda _: None)
    assert shown["left out"] == "sub/card.html, test.jsonl: neither looked at nor written"
    assert json.loads(Path("clean.removed.json").read_text())["not looked at"] == ["sub/card.html", "test.jsonl"]
    assert [path.name for path in Path("clean").iterdir()] == ["train.jsonl"]


def test_of_a_text_the_matching_piece_is_gone(here):
    text = "".join(
        f"\n\n{(QUESTION if number == 7 else CLEAN)} paragraph {number} {'and more words ' * 140}"
        for number in range(20)
    )
    Path("a.txt").write_text(text)
    clean("a.txt", "clean.txt")
    assert Path("clean.txt").read_text() == "".join(piece for piece in cut_text(text) if QUESTION not in piece)
    assert QUESTION not in Path("clean.txt").read_text()


def test_a_saved_data_set_stays_one(here):
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    clean("saved", "clean")
    assert datasets.load_from_disk("clean").to_list() == [ROWS[0], ROWS[2], ROWS[3]]


def test_a_hub_data_set_becomes_a_folder_or_a_file(here, monkeypatch):
    table = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=table, test=table.select([0])))
    monkeypatch.setattr("trialist.data.corpora._hub_commit", lambda _: "0123")
    assert clean("owner/name", "clean")["digest"] == "hub:owner/name@0123"
    assert clean("owner/name", "clean.jsonl")["not looked at"] == ["split test"]
    kept = [ROWS[0], ROWS[2], ROWS[3]]
    assert datasets.load_from_disk("clean").to_list() == kept
    assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == kept


def test_a_built_in_corpus_becomes_rows(here, monkeypatch):
    documents = [("a.py", CLEAN), ("b.py", QUESTION)]
    monkeypatch.setattr("trialist.data.streams.stdlib_documents", lambda: iter(documents))
    clean("python-stdlib", "clean.jsonl")
    assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == [
        {"id": "a.py", "text": CLEAN}
    ]
    with pytest.raises(ValueError, match=r"python-stdlib is written as \.jsonl or \.parquet rows"):
        clean("python-stdlib", "clean.txt")


def test_with_union_rows_are_removed_that_contaminate_only_together(here):
    words = [f"w{number}" for number in range(30)]
    Path("items.jsonl").write_text(json.dumps({"question": " ".join(words)}))
    rows = [{"text": " ".join(words[:10])}, {"text": " ".join(words[12:22])}, {"text": CLEAN}]
    Path("train.jsonl").write_bytes(lines_of(rows))
    assert clean("train.jsonl", "one.jsonl")["removed"] == 0
    assert clean("train.jsonl", "two.jsonl", rule="union")["removed"] == 2


def test_what_is_kept_is_clean_by_the_same_rule(here):
    Path("train.jsonl").write_bytes(lines_of(ROWS))
    clean("train.jsonl", "clean.jsonl", preset="open-r1")
    assert clean("clean.jsonl", "again.jsonl", preset="open-r1")["removed"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "train.jsonl"}, r"--output train\.jsonl exists"),
        ({"output": "taken.jsonl"}, r"taken\.jsonl\.removed\.json exists"),
        ({"output": "clean.parquet"}, r"train\.jsonl is written in its own format; end the path in \.jsonl"),
        ({"data": "folder", "output": "clean.jsonl"}, "folder is a folder or a data set; give a folder"),
        ({"data": "empty.jsonl"}, r"empty\.jsonl holds no rows"),
        ({"data": "bad.jsonl"}, r"bad\.jsonl line 1: no column of the roles 'user' among 'q'"),
        ({"data": "broken.jsonl"}, r"broken\.jsonl line 6: not valid JSON"),
        ({"benchmarks": ()}, "--benchmarks: name at least one"),
        ({"n": 65}, "--n must be from 1 to 64, not 65"),
        ({"coverage": float("nan")}, "--coverage must be from 0 to 1, not nan"),
        ({"common": 0.0}, "--common is a share above 0"),
        ({"words": "tokens"}, "--words tokens and --tokenizer MODEL go together"),
        ({"max_items": 0}, "--max-items must be at least 1"),
        ({"rule": "whole", "coverage": 0.7}, r"--coverage 0\.7 says nothing where the rule is whole"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(here, given, message):
    Path("train.jsonl").write_bytes(lines_of(ROWS))
    Path("taken.jsonl.removed.json").write_text("{}")
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"q": "a"}\n')
    Path("broken.jsonl").write_bytes(lines_of(ROWS[:3]) + b'{"text": ')
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_bytes(lines_of(ROWS))
    before = sorted(path for path in here.rglob("*"))
    with pytest.raises(ValueError, match=message):
        clean(**({"data": "train.jsonl", "output": "clean.jsonl"} | given))
    assert sorted(path for path in here.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("data", ["train.jsonl", "folder"])
@pytest.mark.parametrize("at", ["copying", "first file", "second file"])
def test_an_interruption_leaves_nothing_but_what_the_next_run_goes_on_from(here, monkeypatch, error, data, at):
    Path("folder").mkdir()
    for name in ("train.jsonl", "folder/a.jsonl", "folder/b.jsonl"):
        Path(name).write_bytes(lines_of(ROWS))
    output = "clean" if data == "folder" else "clean.jsonl"
    place = (subset, "_copy") if at == "copying" else (subset.os, "replace")
    whole, calls = getattr(*place), []

    def stop(*given, **more):
        if str(given[1]) not in (output, f"{output}.removed.json") and at != "copying":
            return whole(*given, **more)
        calls.append(given)
        if len(calls) == (2 if at == "second file" else 1):
            raise error
        return whole(*given, **more)

    before = sorted(here.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(*place, stop)
        with pytest.raises(error):
            clean(data, output)
    assert {path.relative_to(here).parts[0] for path in set(here.rglob("*")) - set(before)} == {f"{output}.scanned"}
    lines: list[str] = []
    Decontaminate(data=data, output=output, benchmarks=("items.jsonl",))(say=lines.append)
    assert f"{data}: 1 of 1 shards were scanned before" in lines
    assert not Path(f"{output}.scanned").exists()


@pytest.mark.parametrize("change", ["shorter", "other order"])
@pytest.mark.parametrize("when", ["scanned", "copied"])
def test_data_that_change_meanwhile_are_refused(here, monkeypatch, change, when):
    Path("train.jsonl").write_bytes(lines_of(ROWS))
    place = (Scanner, "scan") if when == "scanned" else (subset, "write_without")
    whole = getattr(*place)

    def and_change(*given, **more):
        result = whole(*given, **more)
        Path("train.jsonl").write_bytes(lines_of(ROWS[:4] if change == "shorter" else ROWS[::-1]))
        return result

    monkeypatch.setattr(*place, and_change)
    with pytest.raises(ValueError, match=r"train\.jsonl changed while it was read; nothing was written"):
        clean("train.jsonl", "clean.jsonl")
    assert not list(here.glob("clean*"))


def test_a_data_set_in_memory_loses_the_same_rows_as_its_file(here):
    Path("train.jsonl").write_bytes(lines_of(ROWS))
    from_file = clean("train.jsonl", "clean.jsonl")
    rows = datasets.Dataset.from_list(ROWS)
    kept, record = decontaminate(rows, ["items.jsonl"])
    assert kept.to_list() == [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines() if line]
    assert [row["row"] for row in record["removed rows"]] == ["train row 2", "train row 5"]
    assert record["removed by benchmark"] == from_file["removed by benchmark"]
    exam = datasets.Dataset.from_list([{"question": OTHER}])
    assert decontaminate(rows, {"exam": exam})[1]["removed by benchmark"] == {"exam": 1}
    assert decontaminate(rows, {"exam": exam}, coverage=1.0)[0].to_list() == ROWS
    with pytest.raises(ValueError, match="a benchmark is called 'train'"):
        decontaminate(rows, {"train": exam})
