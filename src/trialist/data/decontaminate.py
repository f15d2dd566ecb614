"""Training data without the rows that contaminate benchmarks, and a record of what was removed and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data.matching import Matching

if TYPE_CHECKING:
    from trialist.data.overlap import OverlapIndex
    from trialist.data.scan import Scan

RECORD = ".removed.json"


@dataclass(frozen=True, kw_only=True)
class Decontaminate(Matching):
    """Remove the rows of a data set that contaminate benchmarks.

    A row is removed when it makes an item contaminated, by the same rules as `trialist analyze contamination`; what is kept is
    written in the format of the data, and OUTPUT.removed.json says of every removed row which item it matches and where.
    With --coverage 1 nothing is removed.
    """

    data: str
    """Training data: local .jsonl, .json, .parquet or text file or folder, Hub id, or built-in name"""
    output: str
    """Where what is kept goes: a file like the data, or a folder where these are a folder or a data set"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Scans, writes both files, and returns what to show."""
        from trialist.data.subset import check_output, replacing, write_without

        output = Path(self.output).expanduser()
        record = output.with_name(output.name + RECORD)
        check_output(self.data, output)
        if record.exists():
            raise ValueError(f"--output: {record} exists; give another path, so that nothing is overwritten")
        index = self.index(say)
        scan = self._scan(index, say)
        if scan.rows == 0:
            raise ValueError(f"{self.data} holds no rows")
        removed: dict[str, set[int]] = {}
        for row in scan.found:
            removed.setdefault(row.place.source, set()).add(row.place.number)
        with replacing(output) as target, replacing(record) as beside:
            if (rows := write_without(self.data, self.split, removed, target)) != scan.rows:
                raise ValueError(f"{self.data} changed while it was read: it had {scan.rows:,} rows, then {rows:,}")
            text = json.dumps(self._record(index, scan), indent=1, ensure_ascii=False)
            beside.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        return {
            "kept": f"{scan.rows - len(scan.found):,} of {scan.rows:,} rows",
            "removed": f"{len(scan.found):,}",
            "data": str(output),
            "record": str(record),
        }

    def _scan(self, index: OverlapIndex, say: Callable[[str], None]) -> Scan:
        from trialist.data.scan import Scan, scan_rows
        from trialist.data.streams import stream_rows

        rule, texts = self.decision(), self.row_texts()

        def scanned(scan: Scan) -> Scan:
            rows = stream_rows(self.data, split=self.split, wanted=texts.columns)
            return scan_rows(scan, rows, texts, name=self.data, say=say)

        if rule.name != "union":
            return scanned(Scan(index, rule, list_rows=True))
        targets = scanned(Scan(index, rule)).contaminated()
        say(f"{targets.sum():,} items are contaminated; looking for the rows that share n-grams with them")
        return scanned(Scan(index, rule, targets, list_rows=True))

    def _record(self, index: OverlapIndex, scan: Scan) -> dict[str, Any]:
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
            "schema": 1,
            "data": self.data,
            "settings": self.settings(),
            "rows": scan.rows,
            "rows without text": scan.empty,
            "removed": len(rows),
            "removed by benchmark": per_benchmark,
            "removed rows": rows,
        }
