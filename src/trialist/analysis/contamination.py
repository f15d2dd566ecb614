"""How much of benchmarks stands in training data: n-gram overlap per item, rates per benchmark, and the rows to look at."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.data.matching import Matching

if TYPE_CHECKING:
    from trialist.data.overlap import OverlapIndex
    from trialist.data.scan import Match, Scan

LISTED_NGRAMS = 50
EDGES = (0.0, 0.25, 0.5, 0.75)
"""Items are counted by share: none, up to each of these, below 1, and 1"""


@dataclass(frozen=True, kw_only=True)
class ContaminationAnalysis(Matching):
    """Find benchmark items that stand in training data.

    An item is contaminated when one training row covers more than half of its words with n-grams of 8 words (the rule of
    Tulu 3; --preset and the options below it change that). Writes OUTPUT.html, a page with rates, matches side by side and the
    most frequent n-grams, and OUTPUT.json with every item that shares an n-gram. n-grams do not find paraphrases.
    """

    train: tuple[str, ...]
    """Training data, one or several: local .jsonl, .json, .parquet or text file or folder, Hub id, or built-in name"""
    output: str = "contamination"
    """Where the report goes, without an ending"""
    rate: float = 0.02
    """Share of a benchmark's items above which training data count as contaminated by it"""
    examples: int = 20
    """Most matches of each benchmark shown on the page; the JSON file has all"""
    max_examples: int | None = None
    """Most rows to read of each training data set"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise ValueError("--train: name at least one data set")
        if len(set(self.train)) < len(self.train):
            raise ValueError(f"--train names a data set twice: {', '.join(self.train)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"--rate is a share from 0 to 1, not {self.rate}")
        if self.examples < 0:
            raise ValueError(f"--examples must be at least 0, not {self.examples}")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"--max-examples must be at least 1, not {self.max_examples}")

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Scans, writes both files, and returns what to show: rates per benchmark and data set, and the paths."""
        from trialist.analysis.contamination_page import render

        stem = Path(self.output).expanduser()
        if stem.suffix in (".html", ".json"):
            stem = stem.with_suffix("")
        if stem.parent.is_file():
            raise ValueError(f"--output {self.output}: {stem.parent} is a file, not a folder")
        report = self.report(say)
        page, data = stem.with_name(stem.name + ".html"), stem.with_name(stem.name + ".json")
        texts = {
            data: json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            page: render(report, self.examples),
        }
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            _write(path, text)
        return _shown(report) | {"page": str(page), "data": str(data)}

    def report(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Everything that was found, in JSON types."""
        from trialist.data.corpora import data_digest
        from trialist.data.scan import Scan, scan_rows
        from trialist.data.streams import stream_rows

        rule, texts = self.decision(), self.row_texts()
        digests = {name: data_digest(name) for name in self.train}  # first, so that a wrong name is told at once
        index = self.index(say)
        trains = []
        for name in self.train:
            began = time.perf_counter()
            rows = stream_rows(name, split=self.split, wanted=texts.columns, max_examples=self.max_examples)
            scan = scan_rows(Scan(index, rule), rows, texts, name=name, say=say)
            if scan.rows == 0:
                raise ValueError(f"{name} holds no rows")
            about = {"name": name, "digest": digests[name], "seconds": round(time.perf_counter() - began, 2)}
            trains.append(about | described(scan, self.rate))
        return {
            "schema": 1,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "settings": self.settings() | {"rate": self.rate},
            "benchmarks": [
                {"name": items.name, "fields": list(items.fields), "items": len(items)} for items in index.benchmarks
            ],
            "ngrams": index.ngrams,
            "train": trains,
        }


def described(scan: Scan, rate: float) -> dict[str, Any]:
    """What a scan found, in JSON types. rate: the share of items above which a benchmark is contaminated."""
    import numpy as np

    index = scan.index
    share, union = scan.share(), scan.union()
    contaminated, found_short = scan.contaminated(), scan.found_short()
    benchmarks = []
    for number, items in enumerate(index.benchmarks):
        own = index.item_benchmark == number
        hit, size = int(contaminated[own].sum()), len(items)
        low, high = wilson(hit, size)
        benchmarks.append(
            {
                "name": items.name,
                "items": size,
                "contaminated": hit,
                "rate": hit / size if size else None,
                "low": low,
                "high": high,
                "above": bool(size and hit / size > rate),
                "sharing": int(((scan.sharing > 0) & own & ~index.item_short).sum()),
                "short": int((index.item_short & own).sum()),
                "short found": int((found_short & own).sum()),
                "empty": int((index.item_empty & own).sum()),
                "by share": by_share(share[own & ~index.item_short & ~index.item_empty]),
            }
        )
    matches = scan.matches
    order = sorted(matches, key=lambda item: (-share[item], index.item_benchmark[item], item))
    return {
        "rows": scan.rows,
        "rows without text": scan.empty,
        "characters": scan.characters,
        "rows sharing an n-gram": scan.rows_sharing,
        "rows contaminating": scan.rows_contaminating,
        "benchmarks": benchmarks,
        "items": [_item(scan, item, matches[item], share, union, contaminated) for item in order],
        "frequent n-grams": [_ngram(index, int(at), scan) for at in _most_work(scan, np)],
    }


def _item(scan: Scan, item: int, match: Match, share: Any, union: Any, contaminated: Any) -> dict[str, Any]:
    index = scan.index
    benchmark, name = index.name(item)
    return {
        "benchmark": benchmark,
        "id": name,
        "contaminated": bool(contaminated[item]),
        "short": bool(index.item_short[item]),
        "words": int(index.item_words[item]),
        "share": round(float(share[item]), 6),
        "coverage": round(float(scan.coverage[item]), 6),
        "longest": round(float(scan.longest[item]), 6),
        "union": round(float(union[item]), 6),
        "rows sharing": int(scan.sharing[item]),
        "rows contaminating": int(scan.exceeding[item]),
        "fields": [_writable(text) for text in index.texts(item)],
        "spans": [list(span) for span in match.spans],
        "row": str(match.place),
        "row text": _writable(match.excerpt.text),
        "row spans": [list(span) for span in match.excerpt.marks],
        "row goes on": list(match.excerpt.cut),
    }


def _most_work(scan: Scan, np: Any) -> Any:
    """The n-grams that join most pairs of item and row: of templates there are many."""
    spread = np.diff(scan.index.posting_begin)
    pairs = scan.frequency * spread
    most = np.argsort(-pairs, kind="stable")[:LISTED_NGRAMS]
    return most[pairs[most] > 0]


def _ngram(index: OverlapIndex, phrase: int, scan: Scan) -> dict[str, Any]:
    return {
        "text": _writable(index.phrase_text(phrase)),
        "rows": int(scan.frequency[phrase]),
        "items": int(index.posting_begin[phrase + 1] - index.posting_begin[phrase]),
    }


def by_share(share: Any) -> list[int]:
    """How many items have a share of 0, up to 1/4, up to 1/2, up to 3/4, below 1, and 1."""
    counts = [int((share == 0).sum())]
    for low, high in zip(EDGES, (*EDGES[1:], 1.0)):
        counts.append(int(((share > low) & ((share <= high) if high < 1 else (share < 1))).sum()))
    return [*counts, int((share == 1).sum())]


def wilson(hits: int, size: int) -> tuple[float | None, float | None]:
    """95 % interval of Wilson for a share, as if the items were drawn one by one from items like them; None without items."""
    if not size:
        return None, None
    z = 1.959964
    share, spread = hits / size, z * z / size
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / size + spread / (4 * size)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _shown(report: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for train in report["train"]:
        several = f"{train['name']}: " if len(report["train"]) > 1 else ""
        shown[f"{several}rows"] = f"{train['rows']:,} ({train['rows contaminating']:,} contaminate an item)"
        for entry in train["benchmarks"]:
            text = f"{entry['contaminated']:,} of {entry['items']:,} items"
            if entry["rate"] is not None:
                text += f", {entry['rate']:.2%} [{entry['low']:.2%}, {entry['high']:.2%}]"
            if entry["short"]:
                text += f"; {entry['short found']:,} of {entry['short']:,} short items stand whole in a row"
            shown[several + entry["name"]] = text
    return shown


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".unfinished")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
