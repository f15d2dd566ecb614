"""The formats of rows to learn from, those of TRL: which columns they have, and how they are read.

`messages` (a list of `{"role", "content"}`), `prompt` and `completion` (both strings, or both lists of messages), `text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trialist.data.columns import listed
from trialist.data.corpora import BUILT_IN, load_documents, load_rows
from trialist.data.files import TEXT_SUFFIXES, files_of_split, suffix_of

FORMATS = (("messages",), ("prompt", "completion"), ("text",))

Row = Mapping[str, Any]


def read_rows(
    data: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_examples: int | None = None,
) -> tuple[tuple[str, ...], list[Row]]:
    """The columns of the format that `data` is in, one of `FORMATS`, and its rows.

    Running text (a text file, `python-stdlib`, ...) becomes rows of `text`. Raises the errors of `load_rows`, and
    ValueError with the columns expected and found when they fit no format.
    """
    if _is_running_text(data, split):
        documents = load_documents(data, split=split, columns=columns, max_examples=max_examples)
        return ("text",), [{"text": text} for text in documents.texts]
    rows = load_rows(data, required=(), columns=columns, split=split, max_examples=max_examples)
    for wanted in FORMATS:
        if set(wanted) <= set(rows.column_names):
            return wanted, list(rows)
    raise ValueError(
        f"{data}: expected the column 'messages', or 'prompt' and 'completion', or 'text'; found "
        f"{listed(rows.column_names)}; name yours with columns, for example prompt=question,completion=answer"
    )


def lead(row: Row, columns: tuple[str, ...]) -> str:
    """What comes before the first answer in a row: rows that share it belong into the same split."""
    if columns == ("text",):
        return str(row["text"])
    asked = row["prompt"] if "prompt" in columns else row["messages"]
    if isinstance(asked, str):
        return asked
    turns: list[str] = []
    for message in asked or ():
        if columns == ("messages",) and isinstance(message, Mapping) and message.get("role") == "assistant":
            break
        turns.append(str(message.get("content")) if isinstance(message, Mapping) else str(message))
    return "\n".join(turns)


def _is_running_text(data: str, split: str | None) -> bool:
    if data in BUILT_IN:
        return True
    path = Path(data)
    if path.is_file():
        return suffix_of(path) in TEXT_SUFFIXES
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return False
    return all(suffix_of(file) in TEXT_SUFFIXES for file in files_of_split(data, split))
