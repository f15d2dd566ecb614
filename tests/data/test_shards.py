"""Data read in shards, held against the same data read in one go."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from trialist.data import shards, streams
from trialist.data.shards import rows_of_shard, shards_of
from trialist.data.streams import stream_rows

ROWS = [{"text": "é" * (number % 7) + f" row {number}", "n": number} for number in range(50)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module, name, size in (
        (shards, "SIZE", 150),
        (shards, "BLOCK", 40),
        (shards, "ROWS", 7),
        (streams, "BLOCK", 64),
    ):
        monkeypatch.setattr(module, name, size)


def lines(rows: list[dict], blank: int = 0) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" * (1 + (row["n"] % 3) * blank) for row in rows)


def written(folder: Path, kind: str) -> str:
    folder.mkdir(exist_ok=True)
    file = folder / {"gz": "a.jsonl.gz", "array": "a.json"}.get(kind, f"a.{kind}")
    if kind == "jsonl":
        file.write_bytes(b"\xef\xbb\xbf" + lines(ROWS, blank=1).rstrip(b"\n"))
    elif kind == "gz":
        file.write_bytes(gzip.compress(lines(ROWS)))
    elif kind == "array":
        file.write_text(json.dumps(ROWS))
    elif kind == "txt":
        file.write_text("".join(f"paragraph {number} {'words ' * 500}\n\n" for number in range(9)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=3)
    return str(file)


@pytest.mark.parametrize(
    ("kind", "several"), [("jsonl", True), ("gz", False), ("array", False), ("txt", False), ("parquet", True)]
)
def test_the_rows_of_all_shards_are_the_rows_with_their_places(tmp_path, kind, several):
    data = written(tmp_path, kind)
    expected = list(stream_rows(data, wanted=("text",)))
    parts = shards_of(data)
    assert [row for shard in parts for row in rows_of_shard(shard, data, wanted=("text",))] == expected
    assert (len(parts) > 3) == several
    assert len(expected) == (5 if kind == "txt" else 50) or kind == "txt"


def test_small_files_of_a_folder_share_a_shard_and_large_ones_are_cut(tmp_path):
    folder = tmp_path / "folder"
    for kind in ("jsonl", "gz", "parquet"):
        written(folder, kind)
    for number in range(12):
        (folder / f"s{number}.jsonl").write_bytes(lines(ROWS[number : number + 1]))
    parts = shards_of(str(folder))
    together = [row for shard in parts for row in rows_of_shard(shard, str(folder))]
    assert together == list(stream_rows(str(folder)))
    assert max(len(shard.pieces) for shard in parts) > 3
    assert sum(shard.pieces[0].name == "a.jsonl" for shard in parts) > 3


def test_tables_are_cut_by_rows(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "saved"))
    for data, given in ((str(tmp_path / "saved"), None), ("mine", table)):
        parts = shards_of(data, table=given)
        rows = [row for shard in parts for row in rows_of_shard(shard, data, table=given)]
        assert len(parts) == 8
        assert [row for _, row in rows] == ROWS
        assert [place.number for place, _ in rows] == list(range(1, 51))


def test_the_first_rows_are_one_shard(tmp_path):
    data = written(tmp_path, "jsonl")
    (shard,) = shards_of(data, limit=5)
    assert [row["n"] for _, row in rows_of_shard(shard, data)] == [0, 1, 2, 3, 4]
    table = datasets.Dataset.from_list(ROWS)
    (shard,) = shards_of("mine", table=table, limit=3)
    assert [row["n"] for _, row in rows_of_shard(shard, "mine", table=table)] == [0, 1, 2]


def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(ROWS[:40]) + b'{"text": \n' + lines(ROWS[40:]))
    rows = (row for shard in shards_of(str(file)) for row in rows_of_shard(shard, str(file)))
    with pytest.raises(ValueError, match=r"a\.jsonl line 41: not valid JSON"):
        list(rows)
