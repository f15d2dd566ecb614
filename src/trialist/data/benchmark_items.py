"""Items of benchmarks as texts to look for: which fields of which rows, by name.

Names are those of `benchmark_sources`, names of `benchmark_names()`, local files and Hub ids; any of them may be followed by
the columns that make up an item.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trialist.data.benchmark_sources import SOURCES, Source
from trialist.data.benchmarks import benchmark_names, documents
from trialist.data.columns import listed
from trialist.data.corpora import HUB_ID, split_names
from trialist.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, read_text, suffix_of
from trialist.data.streams import Row, split_columns, stream_rows

if TYPE_CHECKING:
    from datasets import Dataset

FIELDS = (
    "question", "problem", "prompt", "query", "instruction", "goal", "ctx", "sentence", "question_stem", "premise", "passage",
    "text", "input",
)  # fmt: skip
"""The first of these that a row has is its question, where no field is named"""
IDS = ("id", "task_id", "question_id", "query_id", "key", "idx", "ind", "index")
LEFT_OUT = ("minerva_math_500/gold_bpb_0shot",)
"""Matches a pattern and is a part of the others"""
PROMPT = re.compile(r"(?:(?:Category: [^\n]*\n)?(?:Question|Goal): |Problem:\n)(.*)\n(?:Answer|Solution):", re.DOTALL)
"""What the asset's prompts put around a question: no part of it"""


@dataclass(frozen=True)
class Items:
    """Questions of a benchmark, each in one or several fields."""

    name: str
    fields: tuple[str, ...]
    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """(items, fields); an empty string where a row has nothing in the field"""
    remark: str = ""
    """What to know before a rate is read, for example that these are a sample"""

    def __len__(self) -> int:
        return len(self.ids)


def load_items(
    name: str,
    *,
    fields: tuple[str, ...] = (),
    split: str | None = None,
    max_items: int | None = None,
    table: Dataset | None = None,
) -> Items:
    """The items of a benchmark.

    name: of `SOURCES`, `mmlu_SUBJECT`, a name of `benchmark_names()`, a local file or folder (a text file holds an item a
    line), or a Hub id, and the columns of an item behind a colon (`split_columns`). fields: which columns make up an item;
    without them those that are named or known, else the first of `FIELDS`. split: of files and Hub ids that `SOURCES` does not
    know; without it `test` where there is one. table: the rows, where `name` is but what they are called.
    Raises ValueError for an unknown name, missing fields and values that are no text, FileNotFoundError for a missing asset.
    """
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be at least 1, not {max_items}")
    bare, named = (name, ()) if table is not None else split_columns(name, _asset_names())
    source = None if table is not None else SOURCES.get(bare)
    rows, known = (table, ()) if table is not None else _rows(bare, split)
    chosen = fields or named or known
    ids: list[str] = []
    texts: list[tuple[str, ...]] = []
    rest = iter(rows)
    for number, row in enumerate(islice(rest, max_items), start=1):
        chosen = chosen or _guess(name, row)
        ids.append(next((str(row[key]) for key in IDS if isinstance(row.get(key), str | int)), str(number)))
        texts.append(tuple(_text(name, number, field, row) for field in chosen))
    if not ids:
        raise ValueError(f"benchmark {name!r} holds no items")
    if len(set(ids)) < len(ids):
        ids = [str(number) for number in range(1, len(ids) + 1)]
    remark = ""
    if source and source.all_items:
        remark = f"these {len(ids):,} items are a sample of the benchmark, which is {source.all_items} on the Hub"
    elif next(rest, None) is not None:
        remark = f"only the first {len(ids):,} items were taken"
    return Items(name, chosen, tuple(ids), tuple(texts), remark)


def _rows(name: str, split: str | None) -> tuple[Iterable[Row], tuple[str, ...]]:
    """Rows, and their fields where these are known."""
    source = SOURCES.get(name)
    if source is None and name.startswith("mmlu_"):
        source = Source(f"hails/mmlu_no_train/{name[5:]}/test", ("question",))
    if source is None and Path(name).expanduser().exists():
        return _local_rows(Path(name).expanduser(), split), ()
    if source is None and _is_hub_id(name):
        source = Source("", (), name, split or "test")
    if source is None:
        source = Source(name, ())
    if not source.asset:
        return _hub_rows(source), source.fields
    rows = _asset_rows(name, source.asset)
    if not source.pattern:
        return rows, source.fields
    pattern = re.compile(source.pattern, re.DOTALL)
    return _cut_rows(rows, source.fields[0], pattern), tuple(pattern.groupindex)


def _cut_rows(rows: Iterable[Row], column: str, pattern: re.Pattern[str]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        match = pattern.fullmatch(row[column])
        if match is None:
            raise ValueError(f"item {number}: {column!r} is not of the form {pattern.pattern!r}: {row[column][:80]!r}")
        yield {**row, **match.groupdict()}


def _hub_rows(source: Source) -> Iterator[Row]:
    name, _, configuration = source.hub.partition(":")
    if configuration != "*":
        yield from (row for _, row in islice(stream_rows(source.hub, split=source.split), source.limit))
        return
    import datasets

    for part in datasets.get_dataset_config_names(name):
        rows = islice(stream_rows(f"{name}:{part}", split=source.split), source.limit)
        yield from ({**row, "id": f"{part} {number}"} for number, (_, row) in enumerate(rows, start=1))


def _asset_rows(name: str, asset: str) -> Iterator[Row]:
    known = benchmark_names()
    if "*" not in asset:
        tasks = {path.split("/")[0] for path in known}
        if asset not in known and (asset not in tasks or name.startswith("mmlu_")):
            near = difflib.get_close_matches(name, [*SOURCES, *known, *tasks], n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There is {', '.join(SOURCES)}"
            raise ValueError(f"no benchmark {name!r}, and no such file. {hint}")
        yield from documents(asset)
        return
    before, after = asset.split("*")
    for part in known:
        if part.startswith(before) and part.endswith(after) and part not in LEFT_OUT:
            short = part.removeprefix(before).removesuffix(after)
            for number, row in enumerate(documents(part), start=1):
                yield {**row, "id": f"{short} {number}"}


def _is_hub_id(name: str) -> bool:
    if (
        name.count("/") != 1
        or name.startswith((".", "~", "/"))
        or suffix_of(Path(name)) in (*TEXT_SUFFIXES, *ROW_SUFFIXES)
    ):
        return False
    return name not in _asset_names()


def _asset_names() -> tuple[str, ...]:
    try:
        return (*SOURCES, *benchmark_names())
    except FileNotFoundError:  # without the asset nothing has a name of it
        return tuple(SOURCES)


def _local_rows(path: Path, split: str | None) -> Iterator[Row]:
    if path.is_file() and suffix_of(path) in TEXT_SUFFIXES:
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                yield {"id": f"line {number}", "text": line}
        return
    chosen = split or ("test" if "test" in split_names(str(path)) else None)
    yield from (row for _, row in stream_rows(str(path), split=chosen))


def _guess(name: str, row: Row) -> tuple[str, ...]:
    for field in FIELDS:
        if field in row:
            return (field,)
    raise ValueError(
        f"benchmark {name!r}: expected a column such as {listed(FIELDS[:4])}, found {listed(row)}; "
        f"name the columns of an item behind it, {_with_columns(name)}"
    )


def _text(name: str, number: int, field: str, row: Row) -> str:
    if field not in row:
        raise ValueError(
            f"benchmark {name!r} row {number}: expected the column {field!r}, found {listed(row)}; "
            f"name the columns of an item behind it, {_with_columns(name)}"
        )
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"benchmark {name!r} row {number}: {field!r} must be text, not {type(value).__name__}")
    wrapped = PROMPT.fullmatch(value)
    return wrapped[1] if wrapped else value


def _with_columns(name: str) -> str:
    bare = split_columns(name, _asset_names())[0]
    return f"{bare}::COLUMN" if HUB_ID.fullmatch(bare) and "/" in bare and ":" not in bare else f"{bare}:COLUMN"
