"""Pairs of answers as groups: the distinct sequences of a prompt once, and the pairs that compare them."""

# N sequences, T time, P pairs

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trialist.data.preferences import PreferencePair

if TYPE_CHECKING:
    from torch import Tensor

Group = dict[str, list]
LARGEST = 16
"""Most sequences of a group: what a prompt with many rows can ask for in one pass"""


def label_of(row: Mapping[str, Any], place: str) -> float:
    """The probability that chosen is the better one, 1 in rows without `label_prob`.

    place: how errors call the row. Raises ValueError for what is no number from 0 to 1.
    """
    label = row.get("label_prob")
    if label is None:
        return 1.0
    if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
        raise ValueError(f"{place}: label_prob is {label!r}; a probability is a number from 0 to 1")
    return float(label)


def margin_of(row: Mapping[str, Any], place: str) -> float:
    """By how much the better answer is to be above the other, 0 in rows without `margin`; else as `label_of`."""
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"{place}: margin is {margin!r}; give a finite number, in rewards")
    return float(margin)


def group_rows(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[PreferencePair], *, share: bool = True, source: str = "data"
) -> list[Group]:
    """Groups of encoded pairs with the labels and, where a row has one, margins of their rows; pairs of one `source_index`
    are of one anchor, without it those of one prompt."""
    own = [rows[pair.row] for pair in pairs]
    places = [f"{source} row {pair.row + 1}" for pair in pairs]
    margins = [margin_of(row, place) for row, place in zip(own, places, strict=True)]
    return group_pairs(
        pairs,
        [label_of(row, place) for row, place in zip(own, places, strict=True)],
        margin=margins if any(row.get("margin") is not None for row in own) else None,
        anchors=[
            tuple(pair.prompt) if row.get("source_index") is None else row["source_index"]
            for row, pair in zip(own, pairs, strict=True)
        ],
        share=share,
    )


def group_pairs(
    pairs: Sequence[PreferencePair],
    label_prob: Sequence[float],
    *,
    margin: Sequence[float] | None = None,
    anchors: Sequence[Hashable] | None = None,
    share: bool = True,
    largest: int = LARGEST,
) -> list[Group]:
    """Groups of pairs, in the order of their first pair: `sequences` (lists of token ids, each once), `pairs` (places of the
    two sequences that a pair compares), `label_prob` (probability that the first of them is the better one) and, if there are
    any, `margin`.

    anchors: pairs of one anchor make up a group; without it those of one prompt.
    largest: most distinct sequences of a group; an anchor with more has several groups.
    share: False gives each pair two sequences of its own: the same groups and losses at the work of scoring pair by pair.
    Raises ValueError for lists of different lengths and a label_prob outside [0, 1], with the number of the row.
    """
    if anchors is None:
        anchors = [tuple(pair.prompt) for pair in pairs]
    if largest < 2:
        raise ValueError(f"largest is {largest}; a pair has 2 sequences")
    if not len(pairs) == len(label_prob) == len(anchors) == len(label_prob if margin is None else margin):
        raise ValueError(
            f"{len(pairs)} pairs, {len(label_prob)} label_prob, {len(anchors)} anchors"
            f"{'' if margin is None else f', {len(margin)} margins'}: give one a pair"
        )
    groups: list[Group] = []
    open_groups: dict[Hashable, tuple[Group, dict[tuple[int, ...], int]]] = {}
    for index, (pair, probability, anchor) in enumerate(zip(pairs, label_prob, anchors, strict=True)):
        label_of({"label_prob": probability}, f"row {pair.row + 1}")
        compared = [(*pair.prompt, *answer) for answer in (pair.chosen, pair.rejected)]
        if anchor not in open_groups or len({*open_groups[anchor][1], *compared}) > largest:
            columns = ("sequences", "pairs", "label_prob", *(() if margin is None else ("margin",)))
            open_groups[anchor] = {name: [] for name in columns}, {}
            groups.append(open_groups[anchor][0])
        group, known = open_groups[anchor]
        for sequence in compared:
            if not share or sequence not in known:
                known[sequence] = len(group["sequences"])
                group["sequences"].append(list(sequence))
        group["pairs"].append([known[sequence] for sequence in compared])
        group["label_prob"].append(float(probability))
        if margin is not None:
            group["margin"].append(float(margin[index]))
    return groups


def collate_groups(groups: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch for `RewardLoss`: `input_ids` and `attention_mask` (N, T), padded on the right, `pairs` (P, 2) counted through
    the batch, `label_prob` and, where the groups have it, `margin` (P,) float32.

    Raises ValueError for a group that lacks one of its columns, as when a Trainer has removed it as unused.
    """
    import torch

    margins = ("margin",) if any(group.get("margin") is not None for group in groups) else ()
    for group in groups:
        for name in ("sequences", "pairs", "label_prob", *margins):
            if group.get(name) is None:
                raise ValueError(
                    f"a row lacks {name!r} (it has {', '.join(group) or 'nothing'}); if the Trainer removed it as unused, set "
                    "remove_unused_columns=False"
                )
    sequences = [torch.as_tensor(sequence) for group in groups for sequence in group["sequences"]]
    counts = torch.tensor([0, *(len(group["sequences"]) for group in groups[:-1])]).cumsum(0)
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)  # (N, T)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "pairs": torch.cat([torch.as_tensor(group["pairs"]) + start for group, start in zip(groups, counts)]),
        **{
            name: torch.cat([torch.as_tensor(group[name], dtype=torch.float32) for group in groups])
            for name in ("label_prob", *margins)
        },
    }
