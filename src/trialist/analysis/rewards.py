"""The analysis `rewards`: what a reward model says of the answers in preference rows, and how often it agrees with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RewardsAnalysis:
    """Score both answers of preference rows with a reward model, and see how often it agrees with the rows.

    Writes the rows with the columns chosen_reward and rejected_reward, by which `trialist apply filter-preferences` leaves out
    what the model has right. An answer that many pairs of a prompt share is scored once.
    """

    model: str
    """Reward model (sequence classification with one label): Hub id, local folder, or adapter that names its model"""
    data: str
    """Rows of preferences: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str | None = None
    """File for the scored rows, .jsonl or .parquet; without it nothing is written"""
    columns: str = ""
    """Columns under other names, ours first: chosen=better,rejected=worse"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""
    max_examples: int | None = None
    """Most rows to read"""
    length: int | None = None
    """Most tokens of a prompt with its answer; longer answers lose their end. Without it 1024, or the model's context"""
    batch: int = 16
    """Sequences in a forward pass"""
    drop_long: bool = False
    """Leave rows out whose prompt is longer than the model's context, instead of an error"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the model computes in"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Scores, writes, and returns accuracy, by kind of pair where the rows say it, and sizes."""
        import torch

        from trialist.data.filter_preferences import CHOSEN_REWARD, REJECTED_REWARD
        from trialist.data.preference_files import check_rows_output, write_rows
        from trialist.data.preferences import read_preferences
        from trialist.data.reward_groups import label_of
        from trialist.models.reward_scoring import RewardScorer

        output = None if self.output is None else check_rows_output(self.output)
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        rows = read_preferences(self.data, columns=self.columns, split=self.split, max_examples=self.max_examples)
        for number, row in enumerate(rows, start=1):
            label_of(row, f"{self.data} row {number}")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if self.device == "cpu" or accelerator is None else str(accelerator)
        scorer = RewardScorer.load(self.model, length=self.length, batch=self.batch, dtype=self.dtype, device=device)
        pairs = scorer.encode(rows, source=self.data, drop_long=self.drop_long, say=say)
        rewards, scored = scorer.of_pairs(pairs, say)
        for pair, both in zip(pairs, rewards, strict=True):
            if not all(map(math.isfinite, both)):
                raise ValueError(
                    f"{self.data} row {pair.row + 1}: the model's rewards are {both[0]} and {both[1]}, no numbers; is it whole?"
                )
        found = [
            {**rows[pair.row], CHOSEN_REWARD: chosen, REJECTED_REWARD: rejected}
            for pair, (chosen, rejected) in zip(pairs, rewards, strict=True)
        ]
        if output is not None:
            write_rows(found, output)
        return {
            **agreement(found),
            "pairs": f"{len(pairs):,} of {len(rows):,} rows",
            "sequences scored": f"{scored:,} ({2 * len(pairs):,} pair by pair)",
            **({} if output is None else {"data": str(output)}),
        }


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How often the rewards are in the order of the labels, ties left out and equal rewards one half, by kind of pair; and of
    ties the mean distance."""
    from trialist.data.filter_preferences import CHOSEN_REWARD, REJECTED_REWARD
    from trialist.data.reward_groups import label_of

    shown = {}
    kinds = [str(row.get("pair_type") or "original") for row in rows]
    for kind in dict.fromkeys(kinds):
        gaps = [
            (row[CHOSEN_REWARD] - row[REJECTED_REWARD], label_of(row, f"row {number}"))
            for number, (row, own) in enumerate(zip(rows, kinds), start=1)
            if own == kind
        ]
        decided = [gap if label > 0.5 else -gap for gap, label in gaps if label != 0.5]
        ties = [abs(gap) for gap, label in gaps if label == 0.5]
        name = kind.replace("_", "-")
        if decided:
            right = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in decided)
            shown[f"accuracy, {name}"] = f"{right / len(decided):.4f} of {len(decided):,}"
        if ties:
            shown[f"distance, {name}"] = f"{sum(ties) / len(ties):.4f} on average over {len(ties):,} ties"
    return shown
