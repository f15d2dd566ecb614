"""Training data without the rows that contaminate benchmarks, and a record of what was removed and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.data.matching import Matching, remarks

if TYPE_CHECKING:
    from datasets import Dataset

    from trialist.data.scan import Scan
    from trialist.data.scanner import Scanner

RECORD = ".removed.json"


@dataclass(frozen=True, kw_only=True)
class Decontaminate(Matching):
    """Remove the rows of a data set that contaminate benchmarks.

    A row is removed when it makes an item contaminated, by the same rules as `trialist analyze contamination`; what is kept is
    written in the format of the data, and OUTPUT.removed.json says of every removed row which item it matches and where.
    With --coverage 1 nothing is removed. What was scanned before an interruption is not scanned again.
    """

    resumes: ClassVar[bool] = True
    data: str
    """Training data: local .jsonl, .json, .parquet or text file or folder, Hub id, or built-in name; columns to look at stand
    behind a colon, rows.jsonl:question"""
    output: str
    """Where what is kept goes: a file like the data, or a folder where these are a folder or a data set"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Scans, writes both files, and returns what to show."""
        from trialist.data.corpora import data_digest
        from trialist.data.scanner import SUFFIX, Scanner
        from trialist.data.streams import split_columns
        from trialist.data.subset import check_output, not_read, replacing_all, write_without

        data, columns = split_columns(self.data)
        output = Path(self.output).expanduser()
        record = output.with_name(output.name + RECORD)
        check_output(data, output)
        if record.exists():
            raise ValueError(f"--output: {record} exists; give another path, so that nothing is overwritten")
        digest = data_digest(data)
        left = not_read(data, self.split)
        index = self.index(say)
        scanner = Scanner(self, index, output.with_name(output.name + SUFFIX), say)
        scan = found_rows(self, scanner, data, digest, say, columns)
        removed: dict[str, set[int]] = {}
        for row in scan.found:
            removed.setdefault(row.place.source, set()).add(row.place.number)
        with replacing_all(output, record) as (target, beside):
            rows = write_without(data, self.split, removed, target)
            if rows != scan.rows or data_digest(data) != digest:
                scanner.close()
                raise ValueError(f"{data} changed while it was read; nothing was written, run the command again")
            about = {"data": self.data, "digest": digest, "not looked at": left}
            text = json.dumps(about | recorded(self, scan), indent=1, ensure_ascii=False)
            beside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        scanner.close()
        return {
            "kept": f"{scan.rows - len(scan.found):,} of {scan.rows:,} rows",
            "removed": f"{len(scan.found):,}",
            "data": str(output),
            "record": str(record),
            **({"left out": f"{some(left)}: neither looked at nor written"} if left else {}),
        }


def decontaminate(
    train: Dataset,
    benchmarks: Sequence[str] | Mapping[str, Dataset],
    *,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `train` that do not contaminate benchmarks, and the record of those removed.

    benchmarks: as `--benchmarks` takes them, or data sets by name. options: the other fields of `Matching`.
    """
    from trialist.data.scanner import Scanner

    matching = Matching(benchmarks=tuple(benchmarks), **options)
    exams = dict(benchmarks) if isinstance(benchmarks, Mapping) else {}
    if "train" in exams:
        raise ValueError("a benchmark is called 'train', which is the name of the data here; give it another name")
    tables = {"train": train} | exams
    index = matching.index(say, tables)
    digest = train._fingerprint
    scan = found_rows(matching, Scanner(matching, index, None, say, tables), "train", digest, say)
    gone = {row.place.number - 1 for row in scan.found}
    kept = train.select([at for at in range(len(train)) if at not in gone])
    return kept, {"data": "train", "digest": digest, "not looked at": []} | recorded(matching, scan)


def found_rows(
    matching: Matching,
    scanner: Scanner,
    data: str,
    digest: str,
    say: Callable[[str], None],
    columns: tuple[str, ...] = (),
) -> Scan:
    """A scan that lists the rows that contaminate."""
    if matching.decision().name != "union":
        return scanner.scan(data, digest, columns=columns, list_rows=True)
    targets = scanner.scan(data, digest, columns=columns).contaminated()
    say(f"{targets.sum():,} items are contaminated; looking for the rows that share n-grams with them")
    return scanner.scan(data, digest, columns=columns, targets=targets, list_rows=True)


def recorded(matching: Matching, scan: Scan) -> dict[str, Any]:
    """What was removed and why, in JSON types."""
    index = scan.index
    rows: list[dict[str, Any]] = []
    for row in sorted(scan.found, key=lambda row: row.place):
        benchmark, item = index.name(row.item)
        begin, end = max(row.excerpt.marks, key=lambda span: span[1] - span[0])
        rows.append(
            {
                "row": str(row.place),
                "benchmark": benchmark,
                "item": item,
                "share": round(row.share, 4),
                "matching text": row.excerpt.text[begin:end],
            }
        )
    per_benchmark: dict[str, int] = dict.fromkeys((items.name for items in index.benchmarks), 0)
    for entry in rows:
        per_benchmark[entry["benchmark"]] += 1
    return {
        "schema": 2,
        "settings": matching.settings(),
        "remarks": remarks(index),
        "rows": scan.rows,
        "rows without text": scan.empty,
        "removed": len(rows),
        "removed by benchmark": per_benchmark,
        "removed rows": rows,
    }


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
