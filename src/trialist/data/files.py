"""Local text, JSON Lines, JSON and Parquet files, and folders of them."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data.columns import listed

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
PIECE = 2_000
"""A local text is cut at blank lines into documents of at least this many characters"""
LONGEST_PIECE = 16_000
"""Text without blank lines is cut at line breaks, and a longer line at this length"""
BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n\s*")
LINE_BREAK = re.compile(r"\n|\r(?!\n)")


def suffix_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def read_text(file: Path) -> str:
    try:
        content = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} ends in .gz but is not a whole gzip file: {error}") from error
    return decode(content, str(file))


def decode(content: bytes, name: str, *, byte: int = 0, line: int = 1) -> str:
    """UTF-8 as text. name: what the content is called in errors; byte, line: where in it `content` begins."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}: byte {byte + error.start} (line {line}) is not UTF-8: 0x{content[error.start]:02x}; "
            f"convert the file, for example with `iconv -f latin1 -t utf-8`"
        ) from error


def cut_text(text: str, piece: int = PIECE, longest: int = LONGEST_PIECE) -> list[str]:
    """Cuts at blank lines into pieces of at least `piece` characters (the last may be shorter); joined they are `text`.

    Without blank lines a cut falls behind a line break, and without those after `longest` characters.
    """
    pieces: list[str] = []
    start = 0
    for pattern_end in _cut_points(text, piece, longest):
        pieces.append(text[start:pattern_end])
        start = pattern_end
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _cut_points(text: str, piece: int, longest: int) -> Iterator[int]:
    start = 0
    while len(text) - start > piece:
        blank = BLANK_LINE.search(text, start + piece, min(len(text), start + longest))
        if blank:
            start = blank.end()
        elif len(text) - start <= longest:
            return
        else:
            line = LINE_BREAK.search(text, start + piece, start + longest)
            start = line.end() if line else start + longest
        if start < len(text):
            yield start


def json_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of JSON Lines (`line 17`, counted from 1) or of a JSON array of objects (`row 17`)."""
    text = read_text(file)
    if suffix_of(file) == ".json" and text.lstrip().startswith("["):
        try:
            rows = [(f"row {number}", row) for number, row in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: JSON that cannot be read: {error}") from error
        return _objects(rows, str(file))
    return json_lines(text, str(file))


def json_lines(text: str, name: str, first: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """(`line 17`, row) of every line that is not blank. name: what the text is called in errors; first: its first line."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=first):
        try:
            if line.strip():
                rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} line {number}: not valid JSON: {error.msg} at column {error.colno}; "
                "one JSON object a line is expected"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets within brackets
            raise ValueError(f"{name} line {number}: JSON that cannot be read: {error}") from error
    return _objects(rows, name)


def _objects(rows: list[tuple[str, Any]], name: str) -> list[tuple[str, dict[str, Any]]]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{name} {place}: a JSON object is expected, not {type(row).__name__}")
    return rows


def read_parquet(file: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        table = pyarrow.parquet.read_table(file)
        table.validate(full=True)  # strings that are no UTF-8 would be found only where they are used
        return Dataset(table)
    except (pyarrow.ArrowException, OSError, NotImplementedError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a Parquet file, or a damaged one: {error}") from error


def rows_to_dataset(rows: list[dict[str, Any]], file: Path) -> Dataset:
    """Raises ValueError where a column holds values of several types."""
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_list(rows)
    except (pyarrow.ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(f"{file}: its rows form no table: {error}; every column needs values of one type") from error


def data_files(folder: Path) -> list[Path]:
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and suffix_of(file) in TEXT_SUFFIXES + ROW_SUFFIXES
    )
    if not files:
        raise ValueError(f"{folder} holds no data file; known are {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} (also .gz)")
    return files


def named_splits(path: Path) -> dict[str, list[Path]]:
    """Split -> files of a folder whose files are named `train*`, `validation*`, `test*`; empty without such a train file."""
    if not path.is_dir():
        return {}
    named: dict[str, list[Path]] = {}
    for file in data_files(path):
        word = re.split(r"[-_.\d]", file.name.lower(), maxsplit=1)[0]
        for split, names in SPLIT_NAMES.items():
            if word in names and suffix_of(file) in TEXT_SUFFIXES + ROW_SUFFIXES:
                named.setdefault(split, []).append(file)
    return named if "train" in named and len(named) > 1 else {}


def files_of_split(data: str, split: str | None) -> list[Path]:
    path = Path(data)
    named = named_splits(path)
    if split is not None and split not in named:
        have = f"it has {listed(named)}" if named else "it has no files named train, validation, test"
        raise ValueError(f"{data} has no split {split!r}: {have}")
    if named:
        return named[split or "train"]
    return [path] if path.is_file() else data_files(path)
