"""Scans of whole data sets, shard by shard: several processes may take part, and what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trialist.data.matching import Matching
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Scan, scan_rows
from trialist.data.scan_state import load_scan, save_scan
from trialist.data.shards import Shard, rows_of_shard, shards_of
from trialist.data.streams import RowTexts

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIX = ".scanned"
"""Of the folder beside an output that holds what was scanned, until the output is there"""


@dataclass(frozen=True)
class _Task:
    """One shard to be scanned, and where the scan goes."""

    data: str
    shard: Shard
    texts: RowTexts
    name: str
    """What it is called in lines of progress"""
    targets: np.ndarray | None
    list_rows: bool
    path: Path | None

    def run(self, matching: Matching, index: OverlapIndex, table: Dataset | None, say: Callable[[str], None]) -> Scan:
        rows = rows_of_shard(self.shard, self.data, split=matching.split, table=table, wanted=self.texts.columns)
        scan = Scan(index, matching.decision(), self.targets, self.list_rows)
        scan_rows(scan, rows, self.texts, name=self.name, say=say)
        if self.path is not None and scan.rows:
            save_scan(scan, self.path)
        return scan


class Scanner:
    """Scans data sets for the items of `index`, by the options of `matching`.

    folder: where scans of shards lie until `close`; another scanner of the same options goes on from them. None keeps none.
    tables: data sets by the names that stand for them in the options.
    """

    def __init__(
        self,
        matching: Matching,
        index: OverlapIndex,
        folder: Path | None,
        say: Callable[[str], None],
        tables: Mapping[str, Dataset] | None = None,
    ) -> None:
        self.matching, self.index, self.folder, self.say = matching, index, folder, say
        self.tables = dict(tables or {})
        self._identity = _digest(
            matching.settings(), [[items.name, items.ids, items.texts] for items in index.benchmarks], index.postings
        )

    def scan(
        self,
        data: str,
        digest: str,
        *,
        columns: tuple[str, ...] = (),
        limit: int | None = None,
        targets: np.ndarray | None = None,
        list_rows: bool = False,
    ) -> Scan:
        """What the rows of `data` cover. digest: of its content; scans of other content are not taken up.
        columns: those that were named with it. limit: most rows. targets, list_rows: as for `Scan`.

        Raises ValueError where it holds no rows, and the errors of `stream_rows`.
        """
        table, texts = self.tables.get(data), self.matching.row_texts(columns)
        shards = shards_of(data, split=self.matching.split, table=table, limit=limit)
        scan = Scan(self.index, self.matching.decision(), targets, list_rows)
        with tempfile.TemporaryDirectory() as unkept:
            folder = self.folder or (Path(unkept) if self.matching.jobs > 1 else None)
            tasks = []
            for number, shard in enumerate(shards, start=1):
                key = _digest(self._identity, digest, repr((shard, texts)), targets, list_rows)
                name = data if len(shards) == 1 else f"{data}, {number} of {len(shards)}"
                tasks.append(_Task(data, shard, texts, name, targets, list_rows, folder and folder / f"{key}.npz"))
            done = [task for task in tasks if task.path is not None and task.path.is_file()]
            if done:
                self.say(f"{data}: {len(done)} of {len(tasks)} shards were scanned before")
            for task in done:
                scan.merge(self._loaded(task))
            waiting = [task for task in tasks if task not in done]
            for part in (
                self._parallel(waiting) if self.matching.jobs > 1 and len(waiting) > 1 else self._serial(waiting)
            ):
                scan.merge(part)
        if scan.rows == 0:
            raise ValueError(f"{data} holds no rows")
        return scan

    def close(self) -> None:
        """Forgets what was scanned."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _loaded(self, task: _Task) -> Scan:
        assert task.path is not None
        return load_scan(task.path, self.index, self.matching.decision(), task.targets, list_rows=task.list_rows)

    def _serial(self, tasks: Iterable[_Task]) -> Iterator[Scan]:
        return (task.run(self.matching, self.index, self.tables.get(task.data), self.say) for task in tasks)

    def _parallel(self, tasks: list[_Task]) -> Iterator[Scan]:
        """The same in processes of their own, each with an index of its own; scans come back through files."""
        executor = ProcessPoolExecutor(
            min(self.matching.jobs, len(tasks)),
            multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=({field.name: getattr(self.matching, field.name) for field in fields(Matching)}, self.tables),
        )
        try:
            running = {executor.submit(_run, task): task for task in tasks}
            for number, future in enumerate(as_completed(running), start=1):
                rows = future.result()
                self.say(f"{running[future].name}: {rows:,} rows; {number} of {len(tasks)} shards are done")
                if rows:
                    yield self._loaded(running[future])
        finally:
            executor.shutdown(cancel_futures=True)


_here: dict[str, Any] = {}
"""What a process of `Scanner._parallel` works with"""


def _begin(options: Mapping[str, Any], tables: Mapping[str, Dataset]) -> None:
    matching = Matching(**options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the shard at hand is finished and kept
    _here.update(matching=matching, tables=tables, index=matching.index(lambda _: None, tables))


def _run(task: _Task) -> int:
    """Scans a shard into its file, and returns its rows."""
    return task.run(_here["matching"], _here["index"], _here["tables"].get(task.data), lambda _: None).rows


def _digest(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]
