"""Documents and rows from a built-in corpus, a local file or folder, or a Hub data set, with errors a stranger can act on."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data import assets

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = ("python-stdlib", "enwik8")
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
"""Text without blank lines is cut at line breaks, and lines beyond this length where it is reached"""
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
    kind = _kind(data)
    if kind == "built-in":
        if split is not None:
            raise ValueError(f"{data} has no splits, so split={split!r} cannot be chosen; leave it out")
        pairs = _stdlib_documents() if data == "python-stdlib" else _enwik8_documents()
    elif kind == "hub" or _is_saved_dataset(Path(data)):
        rows = _rows_of_dataset(_select_split(_load_dataset_dict(data), split, data), data, columns, ("text",))
        pairs = _text_column(rows, data)
    else:
        pairs = _local_documents(data, _files_of_split(data, split), columns)
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
    from datasets import Dataset, concatenate_datasets

    _check_max_examples(max_examples)
    kind = _kind(data)
    if kind == "built-in":
        raise ValueError(f"{data} is running text without the columns {', '.join(required)}; pass a JSONL or Parquet file")
    if kind == "hub" or _is_saved_dataset(Path(data)):
        rows = _rows_of_dataset(_select_split(_load_dataset_dict(data), split, data), data, columns, required)
    else:
        parts: list[Any] = []
        for file in _files_of_split(data, split):
            suffix = _suffix(file)
            if suffix in TEXT_SUFFIXES:
                raise ValueError(
                    f"{file} is plain text without the columns {', '.join(required)}; pass JSONL or Parquet rows"
                )
            if suffix == ".parquet":
                parts.append(_rows_of_dataset(_read_parquet(file), str(file), columns, required))
            else:
                numbered = _json_rows(file)
                if numbered:
                    parts.append(Dataset.from_list(_rename_rows(numbered, file, columns, required)))
        if not parts:
            raise ValueError(f"{data} holds no rows")
        rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if len(rows) == 0:
        raise ValueError(f"{data} holds no rows")
    return rows if max_examples is None else rows.select(range(min(max_examples, len(rows))))


def split_names(data: str) -> tuple[str, ...]:
    """The splits that `data` brings itself, among `train`, `validation`, `test` and a Hub data set's own names; () if none."""
    kind = _kind(data)
    if kind == "built-in":
        return ()
    if kind == "hub" or _is_saved_dataset(Path(data)):
        return tuple(_load_dataset_dict(data))
    return tuple(_named_splits(Path(data)))


def data_digest(data: str) -> str:
    """Digest of the content behind `data`: file contents, the resolved Hub commit, or the built-in's version and hash.

    Raises FileNotFoundError as `load_documents` does, ConnectionError when a Hub commit cannot be resolved.
    """
    kind = _kind(data)
    if data == "python-stdlib":
        total = hashlib.sha256()
        for name, text in _stdlib_documents():
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


BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n\s*")
LINE_BREAK = re.compile(r"\n|\r(?!\n)")


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


# Built-in corpora


def stdlib_module(document_id: str) -> str:
    """The top-level module of a `python-stdlib` document; a C accelerator's Python twin (`_strptime`) joins its module."""
    return re.sub(r"^_+(py)?_*", "", document_id.split("/")[0].removesuffix(".py"))


STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}


def _stdlib_documents() -> Iterator[tuple[str, str]]:
    """Source files of the running interpreter's standard library.

    Left out: tests (many distributions do not ship them), generated tables (`encodings`, `pydoc_data`), and files that
    differ from machine to machine (`_sysconfigdata*`, `config-*`).
    """
    root = assets.path("python-stdlib")
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        name = file.relative_to(root)
        if STDLIB_LEFT_OUT.intersection(name.parts[:-1]) or name.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        content = file.read_bytes()
        try:
            yield name.as_posix(), content.decode("utf-8")
        except UnicodeDecodeError:
            with tokenize.open(file) as handle:
                yield name.as_posix(), handle.read()


def _enwik8_documents() -> Iterator[tuple[str, str]]:
    """The pages of enwik8, a new one at each `  <page>` line."""
    start = 0
    text = assets.open_enwik8()
    starts = [match.start() for match in re.finditer(r"^  <page>", text, re.MULTILINE)]
    for number, end in enumerate([*starts[1:], len(text)]):
        yield f"page {number}", text[start:end]
        start = end


# Local files


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _read_text(file: Path) -> str:
    try:
        content = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} ends in .gz but is not a whole gzip file: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}: byte {error.start} (line {line}) is not UTF-8: 0x{content[error.start]:02x}; "
            f"convert the file, for example with `iconv -f latin1 -t utf-8`"
        ) from error


def _local_documents(
    data: str, files: list[Path], columns: Mapping[str, str] | None
) -> Iterator[tuple[str, str]]:
    folder = Path(data) if Path(data).is_dir() else None
    for file in files:
        name = file.relative_to(folder).as_posix() if folder else file.name
        suffix = _suffix(file)
        if suffix in TEXT_SUFFIXES:
            text = _read_text(file)
            if folder:
                yield name, text
            else:
                yield from ((f"{name}:{number}", piece) for number, piece in enumerate(cut_text(text)))
        elif suffix == ".parquet":
            rows = _rows_of_dataset(_read_parquet(file), str(file), columns, ("text",))
            yield from _text_column(rows, name)
        else:
            numbered = _json_rows(file)
            renamed = _rename_rows(numbered, file, columns, ("text",))
            for (number, _), row in zip(numbered, renamed):
                if not isinstance(row["text"], str):
                    raise ValueError(f"{file} line {number}: 'text' must be a string, not {type(row['text']).__name__}")
                yield f"{name}:{number}", row["text"]


def _json_rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, row) of a JSON Lines file (numbers are its lines) or of a JSON array of objects (numbers count from 1)."""
    text = _read_text(file)
    if _suffix(file) == ".json" and text.lstrip().startswith("["):
        try:
            candidates = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} line {error.lineno}: not valid JSON: {error.msg}") from error
    else:
        candidates = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                candidates.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                hint = "; one JSON object a line is expected" if _suffix(file) == ".json" else ""
                raise ValueError(
                    f"{file} line {number}: not valid JSON: {error.msg} at column {error.colno}{hint}"
                ) from error
    for number, row in candidates:
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number}: a JSON object is expected, not {type(row).__name__}")
    return candidates


def _rename_rows(
    numbered: list[tuple[int, dict[str, Any]]],
    file: Path,
    columns: Mapping[str, str] | None,
    required: tuple[str, ...],
) -> list[dict[str, Any]]:
    if not numbered:
        return []
    found = tuple(dict.fromkeys(column for _, row in numbered for column in row))
    sources = _column_sources(found, columns, required, str(file))
    renamed = []
    for number, row in numbered:
        for ours in required:
            if row.get(sources[ours]) is None:
                raise ValueError(f"{file} line {number}: {sources[ours]!r} is missing; the row has {_listed(row)}")
        renamed.append(
            {ours: row.get(theirs) for ours, theirs in sources.items()}
            | {name: row.get(name) for name in found if name not in sources and name not in sources.values()}
        )
    return renamed


def _read_parquet(file: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(file))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a Parquet file: {error}") from error


def _named_splits(path: Path) -> dict[str, list[Path]]:
    """Split -> files of a folder whose files are named `train*`, `validation*`, `test*`; empty without such a train file."""
    if not path.is_dir():
        return {}
    named: dict[str, list[Path]] = {}
    for file in _data_files(path):
        word = re.split(r"[-_.\d]", file.name.lower(), maxsplit=1)[0]
        for split, names in SPLIT_NAMES.items():
            if word in names and _suffix(file) in TEXT_SUFFIXES + ROW_SUFFIXES:
                named.setdefault(split, []).append(file)
    return named if "train" in named and len(named) > 1 else {}


def _files_of_split(data: str, split: str | None) -> list[Path]:
    path = Path(data)
    named = _named_splits(path)
    if split is not None and split not in named:
        have = f"it has {_listed(named)}" if named else "it has no files named train, validation, test"
        raise ValueError(f"{data} has no split {split!r}: {have}")
    if named:
        return named[split or "train"]
    return [path] if path.is_file() else _data_files(path)


def _data_files(folder: Path) -> list[Path]:
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and _suffix(file) in TEXT_SUFFIXES + ROW_SUFFIXES
    )
    if not files:
        raise ValueError(f"{folder} holds no data file; known are {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} (also .gz)")
    return files


def _kind(data: str) -> str:
    """`built-in`, `local` or `hub`; raises FileNotFoundError for what can be neither."""
    if data in BUILT_IN:
        return "built-in"
    path = Path(data)
    if path.is_dir():
        return "local"
    if path.is_file():
        if _suffix(path) not in TEXT_SUFFIXES + ROW_SUFFIXES:
            raise ValueError(
                f"{data}: the suffix {path.suffix!r} is unknown; known are "
                f"{', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} (also .gz)"
            )
        return "local"
    looks_local = data.startswith((".", "/", "~")) or data.count("/") > 1 or bool(_suffix(path) in TEXT_SUFFIXES + ROW_SUFFIXES)
    if looks_local or not HUB_ID.fullmatch(data):
        raise FileNotFoundError(f"data {data!r}: no such file or folder{_suggestion(data)}")
    if "/" not in data and (near := difflib.get_close_matches(data, BUILT_IN, n=1, cutoff=0.75)):
        raise FileNotFoundError(f"data {data!r} is unknown. Did you mean {near[0]!r}?")
    return "hub"


def _suggestion(data: str) -> str:
    path = Path(data).expanduser()
    neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, neighbours, n=3)
    near += [name for name in difflib.get_close_matches(data, BUILT_IN, n=1, cutoff=0.75) if name not in near]
    if near:
        return f". Did you mean {' or '.join(repr(name) for name in near)}?"
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist either"
    return f". Pass a file, a folder, a Hub id or one of {', '.join(BUILT_IN)}"


# Data sets of the `datasets` library


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_dataset_dict(data: str) -> dict[str, Dataset]:
    """Split name -> data set, from a folder of `save_to_disk` or from the Hub."""
    import datasets

    if Path(data).is_dir():
        loaded = datasets.load_from_disk(data)
    else:
        name, _, configuration = data.partition(":")
        try:
            loaded = datasets.load_dataset(name, configuration or None)
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError) as error:
            near = difflib.get_close_matches(data, BUILT_IN, n=1)
            raise FileNotFoundError(
                f"data {data!r} is no local path, and as a Hub id it could not be loaded ({type(error).__name__}: {error})"
                f"{f'. Did you mean {near[0]!r}?' if near else ''}"
            ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _select_split(splits: dict[str, Dataset], split: str | None, data: str) -> Dataset:
    if split is None:
        split = "train" if "train" in splits else next(iter(splits))
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}: it has {_listed(splits)}")
    return splits[split]


def _rows_of_dataset(
    rows: Dataset, data: str, columns: Mapping[str, str] | None, required: tuple[str, ...]
) -> Dataset:
    sources = _column_sources(tuple(rows.column_names), columns, required, data)
    moved = {theirs: ours for ours, theirs in sources.items() if theirs != ours}
    shadowed = [ours for ours in moved.values() if ours in rows.column_names]
    rows = rows.remove_columns(shadowed).rename_columns(moved) if moved else rows
    for ours in required:
        if rows.data.column(ours).null_count:
            number = next(number for number, value in enumerate(rows[ours], start=1) if value is None)
            raise ValueError(f"{data} row {number}: {sources[ours]!r} is missing")
    return rows


def _text_column(rows: Dataset, data: str) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(rows["text"], start=1):
        if not isinstance(text, str):
            raise ValueError(f"{data} row {number}: 'text' must be a string, not {type(text).__name__}")
        yield f"{data}:{number}", text


def _column_sources(
    found: tuple[str, ...], columns: Mapping[str, str] | None, required: tuple[str, ...], data: str
) -> dict[str, str]:
    """Our column -> the data's column, for every required or mapped one."""
    mapping = dict(columns or {})
    sources = {ours: mapping.get(ours, ours) for ours in (*required, *mapping)}
    missing = [theirs for theirs in sources.values() if theirs not in found]
    if missing:
        example = ",".join(f"{ours}=..." for ours, theirs in sources.items() if theirs not in found)
        raise ValueError(
            f"{data}: expected the column{'s' if len(missing) > 1 else ''} {_listed(missing)}, found {_listed(found)}; "
            f"name them with columns {example}"
        )
    return sources


def _hub_commit(data: str) -> str:
    """The commit that `main` of the data set points to, asked of the Hub, else read from the local cache."""
    import huggingface_hub

    name = data.partition(":")[0]
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).sha)
    except Exception as error:
        reference = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / "main"
        if reference.is_file():
            return reference.read_text().strip()
        raise ConnectionError(
            f"data {data!r}: the Hub commit cannot be resolved ({type(error).__name__}: {error}); "
            "check the id and the network, or download the data and pass a local path"
        ) from error


def _check_max_examples(max_examples: int | None) -> None:
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, not {max_examples}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
