"""Bradley-Terry with soft labels on the rewards of sequences, each scored once however many pairs it stands in.

N sequences, T time, P pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from trialist.models.reward_model import sequence_scores

COLUMNS = ("input_ids", "attention_mask", "pairs", "label_prob")


def soft_bradley_terry(difference: Tensor, label_prob: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m) in nats, for each pair (arXiv 2409.13156).

    difference: d, reward of the first answer minus that of the second.   label_prob: p, the probability that the first is the
    better one; 1 is Bradley-Terry, 1/2 a tie, whose least loss is ln 2 at d = 0.   margin: m, by how much the reward of the
    better one is to be above the other (arXiv 2307.09288, eq. 2; `margin` in TRL). All of one shape.
    """
    return -label_prob * logsigmoid(difference - margin) - (1 - label_prob) * logsigmoid(-difference - margin)


@dataclass(frozen=True)
class RewardLoss:
    """Sum over pairs of the soft Bradley-Terry loss, in nats; `stats["weight"]` is the number of pairs.

    With rewards r of the sequences and pairs (a, b), d = r[a] - r[b]:

        L = sum over pairs of  -p log sigmoid(d - m) - (1 - p) log sigmoid(-d - m) + center (r[a] + r[b])^2

    The model runs once over the N sequences, and every pair reads two of its N rewards: six answers to a prompt make up to
    fifteen pairs from six sequences, where scoring pair by pair takes thirty.

    model: sequence classification with one label, as `AutoModelForSequenceClassification(..., num_labels=1)`.
    batch: `input_ids` and `attention_mask` (N, T), padded on either side, `pairs` (P, 2) places among the N, `label_prob`
        (P,), and possibly `margin` (P,), without which m is 0.
    center: weight of the penalty that holds rewards near 0 (arXiv 2312.09244); 0 is none.
    Stats, sums over pairs: `decided` counts those that are no tie, `correct` how many of them are ordered as labelled (equal
    rewards count one half), `margin` is how far the better one is above; `distance` is |d| of ties; `mean_reward` and
    `mean_squared_reward` are of both answers, by which drift and spread of the rewards show.
    Raises ValueError for a batch that lacks a column, such as a `label_prob` that the Trainer took for unused, for other
    shapes, and what `sequence_scores` raises.
    """

    center: float = 0.0

    def __post_init__(self) -> None:
        if not self.center >= 0:
            raise ValueError(f"center is {self.center}; it must be at least 0 (0 is no penalty)")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, label_prob = _checked(batch)
        rewards = sequence_scores(model, batch["input_ids"], batch["attention_mask"])  # (N,)
        first, second = rewards[pairs[:, 0]], rewards[pairs[:, 1]]  # (P,)
        difference, label_prob = first - second, label_prob.to(rewards.dtype)
        loss = soft_bradley_terry(difference, label_prob, batch.get("margin", 0.0)).sum()
        if self.center:
            loss = loss + self.center * (first + second).square().sum()
        return loss, {"weight": self.weight(batch), **_told(first.detach(), second.detach(), label_prob)}

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of pairs, without a forward pass."""
        return torch.tensor(len(batch["pairs"]), device=batch["input_ids"].device)


def _told(first: Tensor, second: Tensor, label_prob: Tensor) -> dict[str, Tensor]:
    difference = first - second
    tie = label_prob == 0.5
    better = torch.where(label_prob > 0.5, difference, -difference)
    right = torch.where(better == 0, 0.5, (better > 0).float())
    return {
        "decided": (~tie).sum(),
        "correct": right.masked_fill(tie, 0.0).sum(),
        "margin": better.masked_fill(tie, 0.0).sum(),
        "distance": difference.abs().masked_fill(~tie, 0.0).sum(),
        "mean_reward": (first + second).sum() / 2,
        "mean_squared_reward": (first.square() + second.square()).sum() / 2,
    }


def _checked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for name in COLUMNS:
        if name not in batch:
            raise ValueError(
                f"the batch lacks {name!r} (it has {', '.join(batch) or 'nothing'}); without it another loss would be trained. "
                "Collate with `trialist.data.reward_groups.collate_groups`, and in a Trainer set remove_unused_columns=False"
            )
    pairs, label_prob = batch["pairs"], batch["label_prob"]
    for name in ("label_prob", "margin"):
        shape = batch.get(name, label_prob).shape
        if pairs.dim() != 2 or pairs.shape[1] != 2 or shape != pairs.shape[:1]:
            raise ValueError(f"pairs have shape {tuple(pairs.shape)} and {name} {tuple(shape)}; wanted (P, 2) and (P,)")
    return pairs, label_prob
