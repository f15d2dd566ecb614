"""Rows written as a .jsonl or .parquet file that is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trialist.data.files import rows_to_dataset
from trialist.data.subset import replacing

SUFFIXES = (".jsonl", ".parquet")


def check_rows_output(output: str) -> Path:
    """The place of a file to write. Raises ValueError where something is there, or for another suffix."""
    place = Path(output).expanduser()
    if place.exists() or place.is_symlink():
        raise ValueError(f"--output {output} exists; give another path, so that nothing is overwritten")
    if place.suffix not in SUFFIXES:
        raise ValueError(f"--output {output}: rows are written as {' or '.join(SUFFIXES)}; end the path in one of them")
    return place


def write_rows(rows: Iterable[Mapping[str, Any]], place: Path) -> None:
    """Writes the rows to `place`, whose suffix says how; .jsonl row by row, as they come."""
    with replacing(place) as target:
        if place.suffix == ".parquet":
            rows_to_dataset([dict(row) for row in rows], place).to_parquet(target)
            return
        with target.open("w", encoding="utf-8", errors="surrogatepass") as handle:
            for row in rows:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
