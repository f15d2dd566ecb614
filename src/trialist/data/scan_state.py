"""A scan on disk: numbers and JSON in one .npz file, from which the scan goes on or into which others merge."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trialist.data.excerpts import Excerpt
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Best, Found, Rule, Scan
from trialist.data.streams import Place

COUNTS = ("rows", "empty", "characters", "rows_sharing", "rows_contaminating")
ITEMS = ("coverage", "longest", "sharing", "exceeding")


def save_scan(scan: Scan, path: Path) -> None:
    """Writes a scan to `path`, which is there whole or not at all. What was found nowhere takes no room."""
    items, phrases = np.flatnonzero(scan.sharing), np.flatnonzero(scan.frequency)
    best = [
        [item, *best.place, best.share, best.covered.tolist(), best.texts, _stored(best.excerpt)]
        for item, best in scan.best.items()
    ]
    found = [[*row.place, row.item, row.share, _stored(row.excerpt)] for row in scan.found]
    arrays = {
        "counts": np.array([getattr(scan, name) for name in COUNTS], np.int64),
        "items": items,
        **{name: getattr(scan, name)[items] for name in ITEMS},
        "phrases": phrases,
        "frequency": scan.frequency[phrases],
        "seen": np.flatnonzero(scan.seen),
        "rows": np.frombuffer(json.dumps([best, found]).encode("ascii"), np.uint8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_scan(
    path: Path, index: OverlapIndex, rule: Rule, targets: np.ndarray | None = None, *, list_rows: bool = False
) -> Scan:
    """The scan that `save_scan` wrote, for the index and rule that it was made with."""
    scan = Scan(index, rule, targets, list_rows)
    with np.load(path, allow_pickle=False) as arrays:
        for name, count in zip(COUNTS, arrays["counts"].tolist()):
            setattr(scan, name, count)
        for name in ITEMS:
            getattr(scan, name)[arrays["items"]] = arrays[name]
        scan.frequency[arrays["phrases"]] = arrays["frequency"]
        scan.seen[arrays["seen"]] = True
        best, found = json.loads(arrays["rows"].tobytes())
    for item, source, number, unit, share, covered, texts, excerpt in best:
        place = Place(source, number, unit)
        kept = _restored(excerpt) if excerpt else None
        scan.best[item] = Best(place, share, np.array(covered, np.int64), texts, kept)
    scan.held = sum(len(text) for best in scan.best.values() for text in best.texts)
    for source, number, unit, item, share, excerpt in found:
        scan.found.append(Found(Place(source, number, unit), item, share, _restored(excerpt)))
    return scan


def _stored(excerpt: Excerpt | None) -> list[Any] | None:
    return None if excerpt is None else [excerpt.text, excerpt.marks, excerpt.cut]


def _restored(stored: Sequence[Any]) -> Excerpt:
    text, marks, (before, behind) = stored
    return Excerpt(text, tuple((begin, end) for begin, end in marks), (before, behind))
