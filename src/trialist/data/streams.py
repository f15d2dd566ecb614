"""Rows of data sets that need not fit into memory, one after the other, and the texts in a row.

JSON Lines, large text files and Parquet are read piece by piece, a Hub data set lies in memory-mapped files. A JSON array, a
text file within a folder and a single row are held whole.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from trialist.data.columns import listed
from trialist.data.corpora import (
    enwik8_documents,
    is_saved_dataset,
    kind_of,
    load_dataset_dict,
    select_split,
    stdlib_documents,
)
from trialist.data.files import (
    LONGEST_PIECE,
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    cut_text,
    decode,
    files_of_split,
    json_lines,
    json_rows,
    read_text,
    suffix_of,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

BLOCK = 1 << 22
"""Bytes of a file that are read at a time"""
BATCH = 1000
"""Rows of a table that are read at a time"""

CONFIGURATION = re.compile(r"[\w.-]+/[\w.-]+:([\w.-]+|\*)")
"""A Hub id with a configuration, or with all of them"""

Row = Mapping[str, Any]


class Place(NamedTuple):
    """Where a row stands: the file (or the data's name), its number there from 1, and what is counted."""

    source: str
    number: int
    unit: str = "row"

    def __str__(self) -> str:
        return f"{self.source} {self.unit} {self.number}" if self.unit else self.source


class Part(NamedTuple):
    """A piece of a file: bytes of JSON Lines that begin and end with a line, or row groups of Parquet."""

    begin: int
    end: int
    first: int
    """Number of its first line or row, from 1"""


def stream_rows(
    data: str,
    *,
    split: str | None = None,
    wanted: Collection[str] = (),
    max_examples: int | None = None,
) -> Iterator[tuple[Place, Row]]:
    """The rows of `data` (whatever `load_documents` takes) in order, running text as rows of `text`.

    wanted: of a table, only these columns are read, if it has one of them.
    Raises the errors of `load_documents` as it comes to them, and FileNotFoundError at the first row for a missing path.
    """
    return islice(_rows(data, split, wanted), max_examples)


def _rows(data: str, split: str | None, wanted: Collection[str]) -> Iterator[tuple[Place, Row]]:
    kind = kind_of(data)
    if kind == "built-in":
        if split is not None:
            raise ValueError(f"{data} has no splits, so split={split!r} cannot be chosen; leave it out")
        documents = stdlib_documents() if data == "python-stdlib" else enwik8_documents()
        for number, (name, text) in enumerate(documents, start=1):
            yield Place(name, 1, "") if data == "python-stdlib" else Place(data, number, "page"), {"text": text}
    elif kind == "hub" or is_saved_dataset(Path(data)):
        table = select_split(load_dataset_dict(data), split, data)
        yield from rows_of_table(table, data, wanted=wanted)
    else:
        for file, name in named_files(data, split):
            yield from rows_of_file(file, name, pieces=Path(data).is_file(), wanted=wanted)


def named_files(data: str, split: str | None) -> list[tuple[Path, str]]:
    """The files of local data, each with the name that its rows' places have."""
    folder = Path(data)
    return [
        (file, file.relative_to(folder).as_posix() if folder.is_dir() else file.name)
        for file in files_of_split(data, split)
    ]


def rows_of_table(
    table: Dataset, name: str, *, wanted: Collection[str] = (), first: int = 1
) -> Iterator[tuple[Place, Row]]:
    """The rows of a table. first: the number that the first of them has."""
    if chosen := [column for column in table.column_names if column in wanted]:
        table = table.select_columns(chosen)
    number = first - 1
    for batch in table.iter(BATCH):
        for values in zip(*batch.values()):
            number += 1
            yield Place(name, number), dict(zip(batch, values))


def rows_of_file(
    file: Path, name: str, *, pieces: bool = True, wanted: Collection[str] = (), part: Part | None = None
) -> Iterator[tuple[Place, Row]]:
    """The rows of one file. pieces: whether a text is cut into documents, or is one. part: of lines or Parquet, only these."""
    suffix = suffix_of(file)
    if suffix in TEXT_SUFFIXES:
        if pieces:
            for number, piece in enumerate(text_pieces(file), start=1):
                yield Place(name, number, "piece"), {"text": piece}
        else:
            yield Place(name, 1, ""), {"text": read_text(file)}
    elif suffix == ".parquet":
        number = part.first - 1 if part else 0
        for batch in parquet_batches(file, wanted, part):
            for row in batch:
                number += 1
                yield Place(name, number), row
    elif is_json_array(file):
        for number, (_, row) in enumerate(json_rows(file), start=1):
            yield Place(name, number), row
    else:
        for byte, line, content in line_blocks(file, part):
            for place, row in json_lines(decode(content, str(file), byte=byte, line=line), str(file), line):
                yield Place(name, int(place.removeprefix("line ")), "line"), row


def open_binary(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def line_blocks(file: Path, part: Part | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Blocks of whole lines, each with its first byte (from 0) and its first line (from 1)."""
    byte, line, end = (part.begin, part.first, part.end) if part else (0, 1, None)
    try:
        with open_binary(file) as handle:
            handle.seek(byte)
            while block := handle.read(BLOCK if end is None else min(BLOCK, end - byte)):
                if end is None or byte + len(block) < end:
                    block += handle.readline()
                yield byte, line, block
                byte += len(block)
                line += block.count(b"\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} ends in .gz but is not a whole gzip file: {error}") from error


def text_pieces(file: Path, *, blank: bool = False) -> Iterator[str]:
    """What `cut_text` makes of the file's text; joined they are the text if those without any letter come too (`blank`)."""
    rest = ""
    for byte, line, content in line_blocks(file):
        rest += decode(content, str(file), byte=byte, line=line)
        done = 0
        for piece in cut_text(rest):
            if done + LONGEST_PIECE >= len(rest):  # what comes may change where this piece ends
                break
            if blank or piece.strip():
                yield piece
            done += len(piece)
        rest = rest[done:]
    yield from (piece for piece in cut_text(rest) if blank or piece.strip())


def is_json_array(file: Path) -> bool:
    if suffix_of(file) != ".json":
        return False
    first = next(line_blocks(file), (0, 1, b""))[2]
    return first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def open_parquet(file: Path) -> ParquetFile:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, NotImplementedError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a Parquet file, or a damaged one: {error}") from error


def parquet_batches(
    file: Path, wanted: Collection[str] = (), part: Part | None = None
) -> Iterator[list[dict[str, Any]]]:
    import pyarrow

    with open_parquet(file) as table:
        try:
            names = [name for name in table.schema_arrow.names if name in wanted] or None
            groups = range(part.begin, part.end) if part else None
            for batch in table.iter_batches(BATCH, row_groups=groups, columns=names):
                batch.validate(full=True)  # strings that are no UTF-8 would be found only where they are used
                yield batch.to_pylist()
        except (pyarrow.ArrowException, OSError, NotImplementedError, TypeError, KeyError, UnicodeError) as error:
            raise ValueError(f"{file} is not a Parquet file, or a damaged one: {error}") from error


def split_columns(text: str, known: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """`NAME:column,column` as the data and the columns; none where none are named.

    Of a Hub id the configuration comes first: `owner/name:configuration:column`, `owner/name::column`.
    known: names that look like Hub ids and are none.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, ()
    local = Path(head).expanduser().exists() or suffix_of(Path(head)) in (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    if CONFIGURATION.fullmatch(text) and not local and head not in known:
        return text, ()
    return head.removesuffix(":"), tuple(filter(None, (column.strip() for column in tail.split(","))))


ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in other formats"""
PROMPTS = ("prompt",)
ANSWERS = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class RowTexts:
    """The texts of a row, each turn of a conversation apart.

    Without `fields`: the turns of `messages` (or `conversations`) that are in `roles`; of `prompt`, `completion`, `chosen`
    and `rejected` the prompt for the role user, the others for assistant; else `text`. With them: those columns, strings,
    lists of strings, or conversations.
    """

    fields: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("user",)
    """`user`, `assistant`, `system`, ..., or `all`"""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.fields or ("messages", "conversations", *PROMPTS, *ANSWERS, "text")

    def __call__(self, place: Place, row: Row) -> list[str]:
        """Raises ValueError that names the row when it has none of the columns, or values that are no text."""
        if self.fields:
            if missing := [field for field in self.fields if field not in row]:
                raise ValueError(
                    f"{place}: expected the column {listed(missing)}, found {listed(row)}; name it with --fields"
                )
            return [text for field in self.fields for text in self._texts(place, field, row[field])]
        for conversation in ("messages", "conversations"):
            if conversation in row:
                return self._texts(place, conversation, row[conversation])
        of_role = (PROMPTS if self._wants("user") else ()) + (ANSWERS if self._wants("assistant") else ())
        if found := [name for name in of_role if name in row]:
            return [text for name in found for text in self._texts(place, name, row[name])]
        if "text" in row:
            return self._texts(place, "text", row["text"])
        raise ValueError(
            f"{place}: no column of the roles {listed(self.roles)} among {listed(row)} (looked for are 'messages', 'prompt' "
            "for the user, 'text'); name the columns to look at with --fields, or other --roles"
        )

    def _wants(self, role: object) -> bool:
        return "all" in self.roles or ROLES.get(str(role), role) in self.roles

    def _texts(self, place: Place, column: str, value: Any) -> list[str]:
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        if isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value):
            return list(value)
        if isinstance(value, Sequence) and all(isinstance(entry, Mapping) for entry in value):
            return [text for turn in value for text in self._turn(place, column, turn)]
        raise ValueError(
            f"{place}: {column!r} must be text, a list of texts or a conversation, not {type(value).__name__}; "
            "choose other columns with --fields"
        )

    def _turn(self, place: Place, column: str, turn: Mapping[str, Any]) -> list[str]:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role is None:
            raise ValueError(f"{place}: a turn of {column!r} must have 'role' and 'content', it has {listed(turn)}")
        if not self._wants(role) or content is None:
            return []
        if isinstance(content, str):
            return [content]
        if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
            return [part["text"] for part in content if isinstance(part.get("text"), str)]
        raise ValueError(f"{place}: the content of a turn must be text, not {type(content).__name__}")
