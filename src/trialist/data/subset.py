"""Data without some of its rows, in the format in which it came; there whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data.corpora import is_saved_dataset, kind_of, load_dataset_dict, select_split
from trialist.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, json_rows, suffix_of
from trialist.data.streams import (
    BATCH,
    is_json_array,
    line_blocks,
    named_files,
    open_parquet,
    stream_rows,
    text_pieces,
)

if TYPE_CHECKING:
    from datasets import Dataset

UNFINISHED = ".unfinished"
LINE = re.compile(rb"[^\n]*\n|[^\n]+")
Removed = Mapping[str, Collection[int]]
"""Source of places -> the numbers of rows to leave out"""


def check_output(data: str, output: Path) -> None:
    """Raises ValueError where the output exists, or cannot hold `data` in its format."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"--output {output} exists; give another path, so that nothing is overwritten")
    kind = kind_of(data)
    rows = {".jsonl", ".parquet"}
    if kind == "built-in" or (kind == "hub" and output.suffix):
        if output.suffix not in rows:
            raise ValueError(
                f"--output {output}: {data} is written as .jsonl or .parquet rows; end the path in one of them"
            )
    elif kind == "local" and Path(data).is_file():
        wanted = "".join(Path(data).suffixes[-2:]) if data.endswith(".gz") else Path(data).suffix
        if not output.name.endswith(wanted):
            raise ValueError(f"--output {output}: {data} is written in its own format; end the path in {wanted}")
    elif suffix_of(output) in (*TEXT_SUFFIXES, *ROW_SUFFIXES):
        raise ValueError(f"--output {output}: {data} is a folder or a data set; give a folder for what is kept")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A path to write to, a file or a folder, which becomes `output` at the end; nothing stays when that is not reached."""
    with replacing_all(output) as (temporary,):
        yield temporary


@contextmanager
def replacing_all(*outputs: Path) -> Iterator[list[Path]]:
    """The same for several outputs, which are not there yet: all of them come to be, in this order, or none."""
    temporary = [output.with_name(output.name + UNFINISHED) for output in outputs]
    placed: list[Path] = []
    try:
        for output, path in zip(outputs, temporary):
            output.parent.mkdir(parents=True, exist_ok=True)
            _remove(path)
        yield temporary
        for output, path in zip(outputs, temporary):
            placed.append(output)
            os.replace(path, output)
    except BaseException:
        for output, path in zip(placed, temporary):
            if not path.exists():  # it was moved
                _remove(output)
        raise
    finally:
        for path in temporary:
            _remove(path)


def not_read(data: str, split: str | None) -> list[str]:
    """Splits and files of `data` that belong to no chosen split, or hold no data."""
    kind = kind_of(data)
    if kind == "built-in" or (kind == "local" and Path(data).is_file()):
        return []
    if kind == "hub" or is_saved_dataset(Path(data)):
        splits = load_dataset_dict(data)
        chosen = select_split(splits, split, data)
        return [f"split {name}" for name, rows in splits.items() if rows is not chosen]
    read = {file for file, _ in named_files(data, split)}
    folder = Path(data)
    return [
        file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file() and file not in read
    ]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_without(data: str, split: str | None, removed: Removed, target: Path) -> int:
    """Writes `data` without the removed rows to `target`, and returns how many rows there were.

    JSON lines and untouched files keep their bytes. Of a Hub data set or saved data set the chosen split is written, as
    `Dataset.save_to_disk` does; of a folder the files that hold data.
    """
    kind = kind_of(data)
    if kind == "built-in":
        return _write_documents(data, removed, target)
    if kind == "hub" or is_saved_dataset(Path(data)):
        table = select_split(load_dataset_dict(data), split, data)
        gone = removed.get(data, ())
        _write_table(table.select([at for at in range(len(table)) if at + 1 not in gone]), target)
        return len(table)
    files = named_files(data, split)
    if Path(data).is_file():
        return _copy(files[0][0], removed.get(files[0][1], ()), target, pieces=True)
    total = 0
    for file, name in files:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        total += _copy(file, removed.get(name, ()), place, pieces=False)
    return total


def _copy(file: Path, gone: Collection[int], target: Path, *, pieces: bool) -> int:
    suffix = suffix_of(file)
    if suffix in TEXT_SUFFIXES and not pieces:
        if not gone:
            shutil.copyfile(file, target)
        return 1
    if suffix == ".parquet":
        return _copy_parquet(file, gone, target)
    if suffix in TEXT_SUFFIXES:
        return _copy_text(file, gone, target)
    if is_json_array(file):
        rows = [row for _, row in json_rows(file)]
        if gone:
            kept = [json.dumps(row, ensure_ascii=False) for number, row in enumerate(rows, 1) if number not in gone]
            _write(target, [("[" + ",\n".join(kept) + "]\n").encode("utf-8", "surrogatepass")], file)
        else:
            shutil.copyfile(file, target)
        return len(rows)
    return _copy_lines(file, gone, target)


def _write(target: Path, blocks: Any, like: Path) -> None:
    with gzip.open(target, "wb", 6) if like.name.endswith(".gz") else target.open("wb") as handle:
        for block in blocks:
            handle.write(block)


def _copy_lines(file: Path, gone: Collection[int], target: Path) -> int:
    rows = 0

    def kept() -> Iterator[bytes]:
        nonlocal rows
        for _, first, block in line_blocks(file):
            lines = LINE.findall(block)
            rows += sum(b"{" in line for line in lines)  # every row is an object, every other line blank
            yield b"".join(line for number, line in enumerate(lines, first) if number not in gone)

    _write(target, kept(), file)
    return rows


def _copy_text(file: Path, gone: Collection[int], target: Path) -> int:
    rows = 0
    if not gone:
        shutil.copyfile(file, target)
        return sum(1 for _ in text_pieces(file))

    def kept() -> Iterator[bytes]:
        nonlocal rows
        for piece in text_pieces(file, blank=True):
            rows += bool(piece.strip())
            if not (piece.strip() and rows in gone):
                yield piece.encode("utf-8")

    _write(target, kept(), file)
    return rows


def _copy_parquet(file: Path, gone: Collection[int], target: Path) -> int:
    from pyarrow import array
    from pyarrow.parquet import ParquetWriter

    with open_parquet(file) as table:
        if not gone:
            shutil.copyfile(file, target)
            return table.metadata.num_rows
        meta = table.metadata
        codec = meta.row_group(0).column(0).compression.lower()
        rows = 0
        with ParquetWriter(
            target, table.schema_arrow, compression="none" if codec == "uncompressed" else codec
        ) as writer:
            for batch in table.iter_batches(BATCH):
                keep = [rows + at + 1 not in gone for at in range(len(batch))]
                rows += len(batch)
                writer.write_batch(batch.filter(array(keep)))
        return rows


def _write_documents(data: str, removed: Removed, target: Path) -> int:
    from datasets import Dataset

    total = 0
    rows = []
    for place, row in stream_rows(data):
        total += 1
        if place.number not in removed.get(place.source, ()):
            rows.append({"id": str(place), **row})
    _write_table(Dataset.from_list(rows), target)
    return total


def _write_table(table: Dataset, target: Path) -> None:
    suffix = Path(target.name.removesuffix(UNFINISHED)).suffix
    if suffix == ".jsonl":
        table.to_json(str(target), force_ascii=False)
    elif suffix == ".parquet":
        table.to_parquet(str(target))
    else:
        table.save_to_disk(str(target))
