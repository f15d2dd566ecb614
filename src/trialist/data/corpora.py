"""Documents and rows from a built-in corpus, a local file or folder, or a Hub data set, with errors a stranger can act on."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data import assets
from trialist.data.columns import listed, rename_columns, rename_rows
from trialist.data.files import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    cut_text,
    files_of_split,
    json_rows,
    named_splits,
    read_parquet,
    read_text,
    rows_to_dataset,
    suffix_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = ("python-stdlib", "enwik8")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Documents:
    """Texts with ids that are unique within `source`."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise ValueError(f"{self.source}: {len(self.ids)} ids for {len(self.texts)} texts")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> Documents:
        chosen = list(indices)
        return Documents(tuple(self.ids[i] for i in chosen), tuple(self.texts[i] for i in chosen), self.source)


def load_documents(
    data: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_examples: int | None = None,
) -> Documents:
    """The documents of `data`, in a deterministic order, empty ones left out.

    data: `python-stdlib`, `enwik8`, a local text, JSONL, JSON or Parquet file (also `.gz`), a folder of such files or one
    written by `Dataset.save_to_disk`, or a Hub id (`owner/name`, `owner/name:configuration`).
    split: which split of a Hub data set or of a folder whose files are named train, validation, test; `train` by default.
    columns: our column -> the data's column, `{"text": "content"}`; rows need a column `text`.
    max_examples: keep the first so many documents.
    Raises FileNotFoundError for a missing path, ValueError for broken lines, wrong columns and empty data.
    """
    _check_max_examples(max_examples)
    kind = kind_of(data)
    if kind == "built-in":
        if split is not None:
            raise ValueError(f"{data} has no splits, so split={split!r} cannot be chosen; leave it out")
        pairs = stdlib_documents() if data == "python-stdlib" else enwik8_documents()
    elif kind == "hub" or is_saved_dataset(Path(data)):
        rows = rename_columns(select_split(load_dataset_dict(data), split, data), data, columns, ("text",))
        pairs = _text_column(rows, data)
    else:
        pairs = _local_documents(data, files_of_split(data, split), columns)
    kept = list(islice(((name, text) for name, text in pairs if text.strip()), max_examples))
    if not kept:
        raise ValueError(f"{data} holds no text: every file or row is empty")
    return Documents(tuple(name for name, _ in kept), tuple(text for _, text in kept), data)


def load_rows(
    data: str,
    *,
    required: tuple[str, ...],
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    max_examples: int | None = None,
) -> Dataset:
    """The rows of a JSONL, JSON or Parquet file or folder, or of a Hub data set, with the `required` columns present.

    columns: our column -> the data's column, `{"prompt": "question"}`; other columns keep their names.
    Raises ValueError with the columns expected and found, or with the number of the row whose value is missing.
    """
    from datasets import concatenate_datasets

    _check_max_examples(max_examples)
    kind = kind_of(data)
    if kind == "built-in":
        raise ValueError(
            f"{data} is running text without the columns {', '.join(required)}; pass a JSONL or Parquet file"
        )
    if kind == "hub" or is_saved_dataset(Path(data)):
        rows = rename_columns(select_split(load_dataset_dict(data), split, data), data, columns, required)
    else:
        parts: list[Any] = []
        for file in files_of_split(data, split):
            suffix = suffix_of(file)
            if suffix in TEXT_SUFFIXES:
                raise ValueError(
                    f"{file} is plain text without the columns {', '.join(required)}; pass JSONL or Parquet rows"
                )
            if suffix == ".parquet":
                parts.append(rename_columns(read_parquet(file), str(file), columns, required))
            else:
                placed = json_rows(file)
                if placed:
                    parts.append(rows_to_dataset(rename_rows(placed, file, columns, required), file))
        if not parts:
            raise ValueError(f"{data} holds no rows")
        rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if len(rows) == 0:
        raise ValueError(f"{data} holds no rows")
    return rows if max_examples is None else rows.select(range(min(max_examples, len(rows))))


def split_names(data: str) -> tuple[str, ...]:
    """The splits that `data` brings itself, among `train`, `validation`, `test` and a Hub data set's own names; () if none."""
    kind = kind_of(data)
    if kind == "built-in":
        return ()
    if kind == "hub" or is_saved_dataset(Path(data)):
        return tuple(load_dataset_dict(data))
    return tuple(named_splits(Path(data)))


def data_digest(data: str) -> str:
    """Digest of the content behind `data`: file contents, the resolved Hub commit, or the built-in's version and hash.

    Raises FileNotFoundError as `load_documents` does, ConnectionError when a Hub commit cannot be resolved.
    """
    kind = kind_of(data)
    if data == "python-stdlib":
        total = hashlib.sha256()
        for name, text in stdlib_documents():
            total.update(f"{name}\0{len(text)}\0".encode())
            total.update(text.encode())
        return f"python-stdlib:{sys.version.split()[0]}:{total.hexdigest()[:16]}"
    if data == "enwik8":
        return f"enwik8:{assets.ASSETS['enwik8'].sha256[:16]}"
    if kind == "hub":
        return f"hub:{data}@{_hub_commit(data)}"
    path = Path(data)
    if path.is_file():
        return f"sha256:{assets.sha256_of(path)}"
    total = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{assets.sha256_of(file)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def parse_columns(text: str) -> dict[str, str]:
    """`"prompt=question,text=body"` -> `{"prompt": "question", "text": "body"}`."""
    mapping: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (equals and ours and theirs):
            raise ValueError(f"columns: {part!r} is not of the form ours=theirs, for example prompt=question,text=body")
        if ours in mapping:
            raise ValueError(f"columns: {ours!r} is mapped twice, to {mapping[ours]!r} and {theirs!r}")
        mapping[ours] = theirs
    return mapping


def stdlib_module(document_id: str) -> str:
    """The top-level module of a `python-stdlib` document; a C accelerator's Python twin (`_strptime`) joins its module."""
    return re.sub(r"^_+(py)?_*", "", document_id.split("/")[0].removesuffix(".py"))


STDLIB_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__phello__",
}


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Source files of the running interpreter's standard library.

    Left out: tests (many distributions do not ship them), generated tables (`encodings`, `pydoc_data`), and files that
    differ from machine to machine (`_sysconfigdata*`, `config-*`).
    """
    root = assets.path("python-stdlib")
    files: list[Path] = []
    for folder, names, file_names in os.walk(root):
        names[:] = [name for name in names if name not in STDLIB_LEFT_OUT and not name.startswith("config-")]
        files += [Path(folder, name) for name in file_names if name.endswith(".py")]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        if not file.name.startswith("_sysconfigdata"):
            with tokenize.open(file) as handle:  # in the encoding that the file declares
                yield file.relative_to(root).as_posix(), handle.read()


def enwik8_documents() -> Iterator[tuple[str, str]]:
    """The pages of enwik8, a new one at each `  <page>` line; some megabytes at a time are in memory."""
    mark = b"\n  <page>"
    rest, page, begun = b"", 0, False
    with gzip.open(assets.path("enwik8") / "enwik8.gz") as handle:
        while block := handle.read(1 << 22):
            text, begin, at = rest + block, 0, max(0, len(rest) - len(mark) + 1)
            while (at := text.find(mark, at) + 1) > 0:
                if begun:  # what stands before the first page belongs to it
                    yield f"page {page}", text[begin:at].decode("utf-8")
                    page, begin = page + 1, at
                begun = True
            rest = text[begin:]
    yield f"page {page}", rest.decode("utf-8")


def _local_documents(data: str, files: list[Path], columns: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    folder = Path(data) if Path(data).is_dir() else None
    for file in files:
        name = file.relative_to(folder).as_posix() if folder else file.name
        suffix = suffix_of(file)
        if suffix in TEXT_SUFFIXES:
            text = read_text(file)
            if folder:
                yield name, text
            else:
                yield from ((f"{name} piece {number}", piece) for number, piece in enumerate(cut_text(text), start=1))
        elif suffix == ".parquet":
            rows = rename_columns(read_parquet(file), str(file), columns, ("text",))
            yield from _text_column(rows, name)
        else:
            placed = json_rows(file)
            renamed = rename_rows(placed, file, columns, ("text",))
            for (place, _), row in zip(placed, renamed):
                if not isinstance(row["text"], str):
                    raise ValueError(f"{file} {place}: 'text' must be a string, not {type(row['text']).__name__}")
                if not row["text"].isascii():
                    _check_unicode(row["text"], f"{file} {place}")
                yield f"{name} {place}", row["text"]


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: 'text' holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character; "
            "write the file again with whole characters"
        ) from error


def kind_of(data: str) -> str:
    """`built-in`, `local` or `hub`; raises FileNotFoundError for what can be neither."""
    if data in BUILT_IN:
        return "built-in"
    path = Path(data)
    if path.is_dir():
        return "local"
    if path.is_file():
        if suffix_of(path) not in TEXT_SUFFIXES + ROW_SUFFIXES:
            raise ValueError(
                f"{data}: the suffix {path.suffix!r} is unknown; known are "
                f"{', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} (also .gz)"
            )
        return "local"
    looks_local = (
        data.startswith((".", "/", "~")) or data.count("/") > 1 or bool(suffix_of(path) in TEXT_SUFFIXES + ROW_SUFFIXES)
    )
    if looks_local or not HUB_ID.fullmatch(data):
        raise FileNotFoundError(f"data {data!r}: no such file or folder{_suggestion(data)}")
    if "/" not in data and (near := difflib.get_close_matches(data, BUILT_IN, n=1, cutoff=0.75)):
        raise FileNotFoundError(f"data {data!r} is unknown. Did you mean {near[0]!r}?")
    return "hub"


def _suggestion(data: str) -> str:
    path = Path(os.path.expanduser(data))
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, neighbours, n=3)
    near += [name for name in difflib.get_close_matches(data, BUILT_IN, n=1, cutoff=0.75) if name not in near]
    if near:
        return f". Did you mean {' or '.join(repr(name) for name in near)}?"
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist either"
    return f". Pass a file, a folder, a Hub id or one of {', '.join(BUILT_IN)}"


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def load_dataset_dict(data: str) -> dict[str, Dataset]:
    """Split name -> data set, from a folder of `save_to_disk` or from the Hub."""
    import datasets

    if Path(data).is_dir():
        try:
            loaded = datasets.load_from_disk(data)
        except Exception as error:  # whatever a damaged file makes of it
            raise ValueError(
                f"data {data!r} looks like a folder of Dataset.save_to_disk but cannot be loaded "
                f"({type(error).__name__}: {error}); save it again, or remove its state.json to read its other files"
            ) from error
    else:
        name, _, configuration = data.partition(":")
        try:
            loaded = datasets.load_dataset(name, configuration or None)
        except OSError as error:  # not found, no access, no network
            raise FileNotFoundError(
                f"data {data!r} is no local path, and as a Hub id it could not be loaded "
                f"({type(error).__name__}: {error}){_suggestion(data)}"
            ) from error
        except ValueError as error:
            raise ValueError(f"data {data!r}: {error} (here: {name}:CONFIGURATION)") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def select_split(splits: dict[str, Dataset], split: str | None, data: str) -> Dataset:
    if split is None:
        split = "train" if "train" in splits else next(iter(splits))
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}: it has {listed(splits)}")
    return splits[split]


def _text_column(rows: Dataset, data: str) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(rows["text"], start=1):
        if not isinstance(text, str):
            raise ValueError(f"{data} row {number}: 'text' must be a string, not {type(text).__name__}")
        yield f"{data} row {number}", text


def _hub_commit(data: str) -> str:
    """The commit that `main` of the data set points to, asked of the Hub, else read from the local cache."""
    import huggingface_hub

    name = data.partition(":")[0]
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).sha)
    except Exception as error:
        reference = (
            Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main"
        )
        if reference.is_file():
            return reference.read_text().strip()
        raise ConnectionError(
            f"data {data!r}: the Hub commit cannot be resolved ({type(error).__name__}: {error}); "
            "check the id and the network, or download the data and pass a local path"
        ) from error


def _check_max_examples(max_examples: int | None) -> None:
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, not {max_examples}")
