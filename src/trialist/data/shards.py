"""Data in pieces that can be read one apart from the other, with the places that their rows have in the whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trialist.data.corpora import is_saved_dataset, kind_of, load_dataset_dict, select_split
from trialist.data.files import ROW_SUFFIXES, suffix_of
from trialist.data.streams import (
    Part,
    Place,
    Row,
    is_json_array,
    named_files,
    open_parquet,
    rows_of_file,
    rows_of_table,
    stream_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 1 << 26
"""Bytes of a shard, about"""
ROWS = 100_000
"""Rows of a table in a shard"""
BLOCK = 1 << 24


class Piece(NamedTuple):
    """A file, or a part of it."""

    file: Path
    name: str
    part: Part | None = None


@dataclass(frozen=True)
class Shard:
    """Some of the rows of a data set: pieces of files, rows of a table, or all that there is."""

    pieces: tuple[Piece, ...] = ()
    rows: tuple[int, int] | None = None
    """First and behind the last row of a table, from 0"""
    limit: int | None = None
    """Most rows, where the shard is everything"""


def shards_of(
    data: str, *, split: str | None = None, table: Dataset | None = None, limit: int | None = None
) -> list[Shard]:
    """All of `data` in order, each row in one shard. table: the rows themselves, where `data` is but their name.

    limit: the first so many rows only, in one shard. JSON Lines and Parquet are cut, other files are not; small files share one.
    """
    if limit is not None:
        return [Shard(limit=limit)]
    if table is None and kind_of(data) == "built-in":
        return [Shard()]
    if table is not None or kind_of(data) == "hub" or is_saved_dataset(Path(data)):
        size = len(_table(data, split, table))
        return [Shard(rows=(begin, min(begin + ROWS, size))) for begin in range(0, size, ROWS)]
    shards: list[Shard] = []
    pieces: list[Piece] = []
    total = 0
    for file, name in named_files(data, split):
        for piece, size in _pieces(file, name):
            if pieces and total + size > SIZE:
                shards.append(Shard(tuple(pieces)))
                pieces, total = [], 0
            pieces.append(piece)
            total += size
    return [*shards, Shard(tuple(pieces))]


def rows_of_shard(
    shard: Shard, data: str, *, split: str | None = None, table: Dataset | None = None, wanted: Collection[str] = ()
) -> Iterator[tuple[Place, Row]]:
    """The rows of a shard of `data`, as `stream_rows` gives them. Raises the errors of `stream_rows`."""
    if shard.rows is not None:
        begin, end = shard.rows
        return rows_of_table(_table(data, split, table).select(range(begin, end)), data, wanted=wanted, first=begin + 1)
    if shard.pieces:
        return _rows_of_pieces(shard.pieces, pieces=Path(data).is_file(), wanted=wanted)
    if table is not None:
        return islice(rows_of_table(table, data, wanted=wanted), shard.limit)
    return stream_rows(data, split=split, wanted=wanted, max_examples=shard.limit)


def _table(data: str, split: str | None, table: Dataset | None) -> Dataset:
    return select_split(load_dataset_dict(data), split, data) if table is None else table


def _rows_of_pieces(of_files: Iterable[Piece], *, pieces: bool, wanted: Collection[str]) -> Iterator[tuple[Place, Row]]:
    for file, name, part in of_files:
        yield from rows_of_file(file, name, pieces=pieces, wanted=wanted, part=part)


def _pieces(file: Path, name: str) -> Iterator[tuple[Piece, int]]:
    """The file in pieces, each with its bytes."""
    size = file.stat().st_size
    if size <= SIZE or file.name.endswith(".gz") or suffix_of(file) not in ROW_SUFFIXES:
        yield Piece(file, name), size
    elif suffix_of(file) == ".parquet":
        yield from ((Piece(file, name, part), size) for part, size in _row_groups(file))
    elif is_json_array(file):
        yield Piece(file, name), size
    else:
        yield from ((Piece(file, name, part), part.end - part.begin) for part in _lines(file))


def _lines(file: Path) -> Iterator[Part]:
    """Cuts behind the first end of a line after every so many bytes."""
    begin, first = 0, 1
    with file.open("rb") as handle:
        while True:
            line, read = first, 0
            while read < SIZE and (block := handle.read(min(BLOCK, SIZE - read))):
                read += len(block)
                line += block.count(b"\n")
            rest = handle.readline()
            line += rest.count(b"\n")
            end = handle.tell()
            if end == begin:
                return
            yield Part(begin, end, first)
            begin, first = end, line


def _row_groups(file: Path) -> Iterator[tuple[Part, int]]:
    with open_parquet(file) as table:
        meta = table.metadata
        begin, first, size, rows = 0, 1, 0, 0
        for group in range(meta.num_row_groups):
            size += meta.row_group(group).total_byte_size
            rows += meta.row_group(group).num_rows
            if size >= SIZE or group + 1 == meta.num_row_groups:
                yield Part(begin, group + 1, first), size
                begin, first, size, rows = group + 1, first + rows, 0, 0
