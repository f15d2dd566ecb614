"""Which training rows a rule of decontamination removes, and how much it finds of copies that were edited in one way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trialist.trials._edited_copies import EDITS, Texts, dropped

if TYPE_CHECKING:
    import numpy as np

RULES = ("full-string", "tulu3", "gpt3", "open-r1", "datatrove", "longest")
"""Presets of `trialist analyze contamination`"""
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
"""Shares of words dropped at which recall is read"""
READ = ("restyled", "numbers swapped", "reworded")
"""Edits whose recall is read beside that"""
COPIES = 4
"""Of each item, by which recall is read"""


def removed(
    rule: str, rows: Sequence[Texts], items: Sequence[Texts], *, n: int | None = None, coverage: float | None = None
) -> np.ndarray:
    """(rows,) bool: what a rule removes of rows because of items. Of both only the first text is looked at.

    rule: one of `RULES`. n, coverage: instead of the preset's.
    """
    import numpy as np

    from trialist.data.benchmark_items import Items
    from trialist.data.matching import Matching
    from trialist.data.overlap import OverlapIndex
    from trialist.data.scan import Scan
    from trialist.data.streams import Place

    wanted = Items("test", ("text",), tuple(map(str, range(len(items)))), tuple((texts[0],) for texts in items))
    matching = Matching(benchmarks=("test",), preset=rule, n=n, coverage=coverage)  # type: ignore[arg-type]
    index = OverlapIndex([wanted], matching.chosen("n"), matching.words_of(), short=matching.short)
    scan = Scan(index, matching.decision(), list_rows=True)
    scan.add([Place("rows", number) for number in range(len(rows))], [[row[0]] for row in rows])
    found = np.zeros(len(rows), bool)
    found[[row.place.number for row in scan.found]] = True
    return found


def recalls(
    rule: str, items: Sequence[Texts], draw: np.random.Generator, *, n: int | None = None, coverage: float | None = None
) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
    """Share of copies of items that a rule finds: by edit of `READ`, and points (share of words dropped, share found)."""
    edits = {edit: EDITS[edit] for edit in READ}
    edits |= {str(share): functools.partial(dropped, share=share) for share in SHARES}
    copies = [edit(item, draw) for edit in edits.values() for item in items for _ in range(COPIES)]
    found = removed(rule, copies, items, n=n, coverage=coverage).reshape(len(edits), -1).mean(1).tolist()
    return dict(zip(READ, found)), tuple(zip(SHARES, found[len(READ) :], strict=True))
