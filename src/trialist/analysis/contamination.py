"""How much of benchmarks stands in training data: n-gram overlap per item, rates per benchmark, and the rows to look at."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.data.columns import listed
from trialist.data.matching import Matching, remarks

if TYPE_CHECKING:
    from datasets import Dataset

ENDINGS = {"page": ".html", "data": ".json", "table": ".tsv", "templates": ".templates.txt"}


@dataclass(frozen=True, kw_only=True)
class ContaminationAnalysis(Matching):
    """Find benchmark items that stand in training data.

    An item is contaminated when one training row covers more than half of its words with n-grams of 8 words (the rule of
    Tulu 3; --preset and the options below it change that). Writes OUTPUT.html, a page with rates, matches side by side and the
    most frequent phrases, OUTPUT.json with every item that shares an n-gram, OUTPUT.tsv with the rates, and
    OUTPUT.templates.txt, phrases of several items, which --ignored takes. n-grams do not find paraphrases. What was scanned
    before an interruption is not scanned again.
    """

    resumes: ClassVar[bool] = True
    train: tuple[str, ...]
    """Training data, one or several: local .jsonl, .json, .parquet or text file or folder, Hub id, or built-in name; columns to
    look at stand behind a colon: rows.jsonl:question, owner/name::question"""
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
        """Scans, writes the files, and returns what to show: rates per benchmark and data set, and the paths."""
        from trialist.analysis.contamination_page import render
        from trialist.analysis.contamination_report import summary, table, templates
        from trialist.data.scanner import SUFFIX
        from trialist.data.subset import replacing_all

        stem = Path(self.output).expanduser()
        if stem.suffix in (".html", ".json", ".tsv"):
            stem = stem.with_suffix("")
        if stem.parent.is_file():
            raise ValueError(f"--output {self.output}: {stem.parent} is a file, not a folder")
        paths = {name: stem.with_name(stem.name + ending) for name, ending in ENDINGS.items()}
        for path in paths.values():
            if path.exists():
                raise ValueError(f"--output: {path} exists; give another --output, so that nothing is overwritten")
        report = self.report(say, folder=stem.with_name(stem.name + SUFFIX))
        texts = {
            "page": render(report, self.examples),
            "data": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
            "table": table(report),
            "templates": "".join(f"{phrase}\n" for phrase in templates(report)),
        }
        texts = {name: text for name, text in texts.items() if text}
        with replacing_all(*(paths[name] for name in texts)) as temporary:
            for path, text in zip(temporary, texts.values()):
                path.write_text(text, encoding="utf-8")
        shutil.rmtree(stem.with_name(stem.name + SUFFIX), ignore_errors=True)
        return summary(report) | {name: str(paths[name]) for name in texts}

    def report(
        self,
        say: Callable[[str], None] = print,
        *,
        tables: Mapping[str, Dataset] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Everything that was found, in JSON types.

        tables: data sets by the names that stand for them in `train` and `benchmarks`. folder: where scans are kept until it is
        removed, so that another report goes on from them.
        """
        from trialist.analysis.contamination_report import described
        from trialist.data.corpora import data_digest
        from trialist.data.scanner import Scanner
        from trialist.data.streams import split_columns
        from trialist.data.subset import not_read

        tables = tables or {}
        named = {name: (name, ()) if name in tables else split_columns(name) for name in self.train}
        # first, so that a wrong name is told at once
        digests = {
            name: tables[name]._fingerprint if name in tables else data_digest(named[name][0]) for name in self.train
        }
        index = self.index(say, tables)
        scanner = Scanner(self, index, folder, say, tables)
        trains = []
        for name, (data, columns) in named.items():
            began = time.perf_counter()
            scan = scanner.scan(data, digests[name], columns=columns, limit=self.max_examples)
            about = {
                "name": name,
                "digest": digests[name],
                "seconds": round(time.perf_counter() - began, 2),
                "not looked at": [] if name in tables else not_read(data, self.split),
            }
            trains.append(about | described(scan, self.rate))
        return {
            "schema": 2,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "settings": self.settings() | {"rate": self.rate},
            "benchmarks": [
                {"name": items.name, "fields": list(items.fields), "items": len(items)} for items in index.benchmarks
            ],
            "remarks": remarks(index),
            "ngrams": index.ngrams,
            "train": trains,
        }


def contamination_report(
    train: Dataset | Mapping[str, Dataset],
    benchmarks: Sequence[str] | Mapping[str, Dataset],
    *,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """The report of `trialist analyze contamination` for data sets in memory.

    train: one data set, called `train`, or several by name. benchmarks: as `--benchmarks` takes them, or data sets by name.
    options: the other fields of `ContaminationAnalysis` and `Matching`.
    """
    trains = dict(train) if isinstance(train, Mapping) else {"train": train}
    exams = dict(benchmarks) if isinstance(benchmarks, Mapping) else {}
    if both := trains.keys() & exams.keys():
        raise ValueError(f"{listed(both)} names training data and a benchmark; give one of them another name")
    analysis = ContaminationAnalysis(train=tuple(trains), benchmarks=tuple(benchmarks), **options)
    return analysis.report(say, tables=trains | exams)
