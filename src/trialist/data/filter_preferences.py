"""Pairs that an earlier reward model gets wrong or is unsure about; those it has right teach little and only cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trialist.data.preferences import read_preferences
from trialist.data.reward_groups import label_of

CHOSEN_REWARD, REJECTED_REWARD = "chosen_reward", "rejected_reward"
"""Columns of an earlier model's rewards, as `trialist analyze rewards` writes them"""
Row = Mapping[str, Any]
Rewards = Callable[[Sequence[Row]], Sequence[tuple[float, float]]]


def filter_by_reward_model(
    rows: Sequence[Row], rewards: Rewards | None = None, *, min_gap: float = 0.2, keep_original: bool = True
) -> list[dict[str, Any]]:
    """The rows for which the model's probability is at least `min_gap` away from the label's (arXiv 2409.13156):

        |sigmoid(r(chosen) - r(rejected)) - label_prob| >= min_gap

    and with `keep_original` all rows whose `pair_type` is `original` (rows without one are original).

    rewards: rows -> the rewards of chosen and of rejected of each; without it the columns `chosen_reward` and
        `rejected_reward`. It is called once with all rows, so that it can score an answer that many rows share once.
    min_gap: in [0, 1]; 0 keeps everything.   label_prob is 1 in rows without one.
    Raises ValueError for a min_gap or label_prob out of range, and for rewards that are missing or no numbers, with the row.
    """
    if not 0 <= min_gap <= 1:
        raise ValueError(f"min_gap must be from 0 to 1, not {min_gap}")
    found = [_stored(row, number) for number, row in enumerate(rows, start=1)] if rewards is None else rewards(rows)
    if len(found) != len(rows):
        raise ValueError(f"{len(found)} pairs of rewards for {len(rows)} rows: give one a row")
    kept = []
    for number, (row, (chosen, rejected)) in enumerate(zip(rows, found), start=1):
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            raise ValueError(f"row {number}: the rewards are {chosen} and {rejected}; both must be finite numbers")
        label = label_of(row, f"row {number}")
        original = row.get("pair_type") in (None, "original")
        if (keep_original and original) or abs(_sigmoid(chosen - rejected) - label) >= min_gap:
            kept.append(dict(row))
    return kept


def _stored(row: Row, number: int) -> tuple[float, float]:
    for name in (CHOSEN_REWARD, REJECTED_REWARD):
        if not isinstance(row.get(name), int | float):
            raise ValueError(
                f"row {number}: {name!r} is {row.get(name)!r}; score the rows first, with `trialist analyze rewards --model RM "
                "--data ROWS --output SCORED`, or name your columns with --columns"
            )
    return float(row[CHOSEN_REWARD]), float(row[REJECTED_REWARD])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@dataclass(frozen=True)
class FilterPreferences:
    """Leave out preference rows that an earlier reward model has right already; original rows all stay.

    The rows hold the columns chosen_reward and rejected_reward, which `trialist analyze rewards` writes.
    """

    data: str
    """Scored rows of preferences: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str
    """File for the rows that are kept, .jsonl or .parquet"""
    min_gap: float = 0.2
    """Least distance between the model's probability and the label's of rows that are kept, 0 to 1; 0 keeps all"""
    filter_original: bool = False
    """Leave out rows of the original data, too"""
    columns: str = ""
    """Columns under other names, ours first: chosen_reward=score_w,rejected_reward=score_l"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Writes the rows that are kept and returns how many they are."""
        from trialist.data.preference_files import check_rows_output, write_rows

        output = check_rows_output(self.output)
        rows = read_preferences(self.data, columns=self.columns, split=self.split)
        say(f"{len(rows):,} rows of preferences")
        kept = filter_by_reward_model(rows, min_gap=self.min_gap, keep_original=not self.filter_original)
        if not kept:
            raise ValueError(f"no row is left with a gap of {self.min_gap}; lower --min-gap")
        write_rows(kept, output)
        kinds = [row.get("pair_type") or "original" for row in rows]
        left = [row.get("pair_type") or "original" for row in kept]
        return {
            **{
                kind.replace("_", "-"): f"{left.count(kind):,} of {kinds.count(kind):,}"
                for kind in dict.fromkeys(kinds)
            },
            "kept": f"{len(kept):,} of {len(rows):,} rows",
            "data": str(output),
        }
