"""Bradley-Terry with soft labels on the rewards of sequences, each scored once however many pairs it stands in.

N sequences, T time, P pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

COLUMNS = ("input_ids", "pairs", "label_prob")


def soft_bradley_terry(difference: Tensor, label_prob: Tensor) -> Tensor:
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) in nats, for each pair (arXiv 2409.13156).

    difference: d, reward of the first answer minus that of the second.   label_prob: p, the probability that the first is the
    better one; 1 is Bradley-Terry, 1/2 a tie, whose least loss is ln 2 at d = 0. Both of one shape.
    """
    return -label_prob * logsigmoid(difference) - (1 - label_prob) * logsigmoid(-difference)


@dataclass(frozen=True)
class RewardLoss:
    """Sum over pairs of the soft Bradley-Terry loss, in nats; `stats["weight"]` is the number of pairs.

    With rewards r of the sequences and pairs (a, b), d = r[a] - r[b]:

        L = sum over pairs of  -p log sigmoid(d) - (1 - p) log sigmoid(-d) + center (r[a] + r[b])^2

    The model runs once over the N sequences, and every pair reads two of its N rewards: six answers to a prompt make up to
    fifteen pairs from six sequences, where scoring pair by pair takes thirty.

    model: sequence classification with one label, as `AutoModelForSequenceClassification(..., num_labels=1)`.
    batch: `input_ids` (N, T), `attention_mask` (N, T), `pairs` (P, 2) places among the N, `label_prob` (P,).
    center: weight of the penalty that holds rewards near 0 (arXiv 2312.09244); 0 is none.
    `stats["correct"]` counts how many of the pairs are ordered as labelled; a tie counts one half.
    Raises ValueError for a batch that lacks a column, such as a `label_prob` that the Trainer took for unused, for other
    shapes, and for a model with more than one label.
    """

    center: float = 0.0

    def __post_init__(self) -> None:
        if not self.center >= 0:
            raise ValueError(f"center is {self.center}; it must be at least 0 (0 is no penalty)")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, label_prob = _checked(batch)
        scores = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        if scores.shape != (len(batch["input_ids"]), 1):
            raise ValueError(
                f"the model's logits have shape {tuple(scores.shape)}, wanted {(len(batch['input_ids']), 1)}: one reward a "
                "sequence; load it with num_labels=1"
            )
        rewards = scores[:, 0] if scores.dtype == torch.float64 else scores[:, 0].float()  # (N,)
        first, second = rewards[pairs[:, 0]], rewards[pairs[:, 1]]  # (P,)
        difference, label_prob = first - second, label_prob.to(rewards.dtype)
        loss = soft_bradley_terry(difference, label_prob).sum()
        if self.center:
            loss = loss + self.center * (first + second).square().sum()
        with torch.no_grad():
            right = torch.where(difference == 0, 0.5, (difference > 0).float())
            correct = torch.where(label_prob == 0.5, 0.5, torch.where(label_prob > 0.5, right, 1 - right))
        return loss, {"weight": self.weight(batch), "correct": correct.sum()}

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The number of pairs, without a forward pass."""
        return torch.tensor(len(batch["pairs"]), device=batch["input_ids"].device)


def _checked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for name in COLUMNS:
        if name not in batch:
            raise ValueError(
                f"the batch lacks {name!r} (it has {', '.join(batch) or 'nothing'}); without it another loss would be trained. "
                "Collate with `trialist.data.reward_groups.collate_groups`, and in a Trainer set remove_unused_columns=False"
            )
    pairs, label_prob = batch["pairs"], batch["label_prob"]
    if pairs.dim() != 2 or pairs.shape[1] != 2 or label_prob.shape != pairs.shape[:1]:
        raise ValueError(
            f"pairs have shape {tuple(pairs.shape)} and label_prob {tuple(label_prob.shape)}; wanted (P, 2) and (P,)"
        )
    return pairs, label_prob
