"""How the arms of a reward-model trial spend their sequence forwards: which pairs they train on, in which batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trialist.trials._reward_data import Choice, Rows

Group = dict[str, list]


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


def groups_of(rows: Rows, encode: Any) -> list[Group]:
    """Rows of one source, or each row alone, as a group of sequences."""
    from trialist.data.reward_groups import group_pairs

    pairs = encode(rows)
    labels = [1.0 if (label := rows[pair.row].get("label_prob")) is None else float(label) for pair in pairs]
    anchors = [rows[pair.row].get("source_index", pair.row) for pair in pairs]
    return group_pairs(pairs, labels, anchors=anchors)


def accuracies(model: Any, tests: dict[str, Rows], encode: Any, *, batch: int) -> dict[str, float]:
    """Share of the pairs of each test whose chosen answer has the higher reward."""
    found = {}
    for name, rows in tests.items():
        pairs = encode(rows)
        sequences = [[*pair.prompt, *answer] for pair in pairs for answer in (pair.chosen, pair.rejected)]
        rewards = rewards_of(model, sequences, batch=batch)
        chosen, rejected = rewards[::2], rewards[1::2]
        right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected))
        found[name] = right / len(pairs)
    return found


def best_of(model: Any, choices: list[Choice], *, batch: int) -> dict[str, float]:
    """Mean quality, and share of artefacts, of the answers with the highest reward."""
    if not choices:
        return {}
    rewards = rewards_of(model, [sequence for choice in choices for sequence in choice.sequences], batch=batch)
    quality = artefacts = 0.0
    for number, choice in enumerate(choices):
        count = len(choice.sequences)
        own = rewards[number * count : (number + 1) * count]
        best = own.index(max(own))
        quality += choice.quality[best]
        artefacts += choice.artefacts[best]
    return {"best_of_16_quality": quality / len(choices), "best_of_16_artefacts": artefacts / len(choices)}


def rewards_of(model: Any, sequences: list[list[int]], *, batch: int) -> list[float]:
    from trialist.models.reward_model import sequence_rewards

    was_training = model.training
    model.eval()
    try:
        padding = model.config.get_text_config().pad_token_id
        return sequence_rewards(model, sequences, pad_token_id=padding, batch=batch).tolist()
    finally:
        model.train(was_training)
