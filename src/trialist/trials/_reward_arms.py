"""How the arms of the reward-model trial spend their sequence forwards: which pairs they train on, in which batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trialist.trials._reward_data import RewardData, Rows
from trialist.trials._reward_measures import rewards_of

if TYPE_CHECKING:
    from trialist.data.reward_groups import Group
    from trialist.engine.context import Context
    from trialist.engine.contract import Arm
    from trialist.trials.rrm import RRMTrial


@dataclass(frozen=True)
class GroupBatches:
    """Batches of whole groups with at most `size` sequences, epoch after epoch, until `forwards` sequences are spent."""

    groups: Sequence[Group]
    size: int
    forwards: int
    seed: int

    def plan(self) -> list[list[int]]:
        """The groups of each batch."""
        largest = max(len(group["sequences"]) for group in self.groups)
        if largest > self.size:
            raise ValueError(f"--batch {self.size} sequences: a prompt has {largest}; give at least as many")
        batches: list[list[int]] = []
        batch: list[int] = []
        filled = spent = epoch = 0
        while True:
            order = list(range(len(self.groups)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            for index in order:
                count = len(self.groups[index]["sequences"])
                if filled + count > self.size:
                    if spent + filled > self.forwards:
                        return batches
                    batches.append(batch)
                    spent += filled
                    batch, filled = [], 0
                batch.append(index)
                filled += count
            epoch += 1

    def spent(self, plan: list[list[int]]) -> int:
        return sum(len(self.groups[index]["sequences"]) for batch in plan for index in batch)


def rows_of(
    trial: RRMTrial, arm: Arm, context: Context, data: RewardData, earlier: Callable[[], tuple[Any, int]]
) -> tuple[Rows, int, tuple[str, ...]]:
    """What an arm trains on, the sequence forwards that this took, and what is to be said of it.

    earlier: the model to filter by, and the forwards that it took.
    """
    from trialist.data.augment_preferences import augment_preferences
    from trialist.data.filter_preferences import filter_by_reward_model

    where, told = f"{arm.name} in setting {arm.setting}", []
    rows = augment_preferences(
        data.train, num_donors=2, include=arm["include"].split(), sample_fraction=trial.sample_fraction,
        seed=context.stream("donors"), say=lambda text: told.append(f"{where}: {text}"),
    )  # fmt: skip
    if not arm["labels"]:
        rows = [{**row, "label_prob": 0.5} if row["pair_type"] == "original" else row for row in rows]
    if arm["filter"] == "none":
        return rows, 0, tuple(told)
    asked = [row for row in rows if arm["filter"] == "all" or row["pair_type"] != "original"]
    model, spent = earlier()
    pairs = data.encode(asked)
    rewards, scored = rewards_of(model, pairs, batch=trial.batch)
    asked = [asked[pair.row] for pair in pairs]
    kept = filter_by_reward_model(asked, lambda _: rewards, min_gap=trial.min_gap, keep_original=False)
    if not kept and arm["filter"] == "all":
        raise ValueError(f"{where}: no pair is left with a gap of {trial.min_gap}; lower --min-gap")
    told.append(f"{where}: the filter kept {len(kept) / max(len(asked), 1):.0%} of its pairs")
    if arm["filter"] == "all" and (wrong := _mislabelled(data, kept)) is not None:
        told[-1] += f"; {wrong:.0%} of them have the wrong label, {_mislabelled(data, rows):.0%} before"
    untouched = [row for row in rows if arm["filter"] != "all" and row["pair_type"] == "original"]
    return [*untouched, *kept], spent + scored, tuple(told)


def _mislabelled(data: RewardData, rows: Rows) -> float | None:
    """Share of rows whose annotated pair has the wrong label; None where that is not known."""
    known = [wrong for row in rows if (wrong := data.train[row["source_index"]].get("mislabelled")) is not None]
    return fmean(known) if known else None
