"""Which column of the data serves as which of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def column_sources(
    found: tuple[str, ...], columns: Mapping[str, str] | None, required: tuple[str, ...], data: str
) -> dict[str, str]:
    """Our column -> the data's column, for every required or mapped one."""
    mapping = dict(columns or {})
    sources = {ours: mapping.get(ours, ours) for ours in (*required, *mapping)}
    missing = [theirs for theirs in sources.values() if theirs not in found]
    if missing:
        example = ",".join(f"{ours}=..." for ours, theirs in sources.items() if theirs not in found)
        raise ValueError(
            f"{data}: expected the column{'s' if len(missing) > 1 else ''} {listed(missing)}, found {listed(found)}; "
            f"name them with columns {example}"
        )
    return sources


def rename_rows(
    placed: list[tuple[str, dict[str, Any]]],
    file: Path,
    columns: Mapping[str, str] | None,
    required: tuple[str, ...],
) -> list[dict[str, Any]]:
    if not placed:
        return []
    found = tuple(dict.fromkeys(column for _, row in placed for column in row))
    sources = column_sources(found, columns, required, str(file))
    renamed = []
    for place, row in placed:
        for ours in required:
            if row.get(sources[ours]) is None:
                raise ValueError(f"{file} {place}: {sources[ours]!r} is missing; the row has {listed(row)}")
        renamed.append(
            {ours: row.get(theirs) for ours, theirs in sources.items()}
            | {name: row.get(name) for name in found if name not in sources and name not in sources.values()}
        )
    return renamed


def rename_columns(rows: Dataset, data: str, columns: Mapping[str, str] | None, required: tuple[str, ...]) -> Dataset:
    sources = column_sources(tuple(rows.column_names), columns, required, data)
    moved = {theirs: ours for ours, theirs in sources.items() if theirs != ours}
    shadowed = [ours for ours in moved.values() if ours in rows.column_names]
    rows = rows.remove_columns(shadowed).rename_columns(moved) if moved else rows
    for ours in required:
        if rows.data.column(ours).null_count:
            number = next(number for number, value in enumerate(rows[ours], start=1) if value is None)
            raise ValueError(f"{data} row {number}: {sources[ours]!r} is missing")
    return rows


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
