"""Pairs of answers as groups: the distinct sequences of a prompt once, and the pairs that compare them."""

# N sequences, T time, P pairs

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trialist.data.preferences import PreferencePair

if TYPE_CHECKING:
    from torch import Tensor

Group = dict[str, list]


def group_pairs(
    pairs: Sequence[PreferencePair],
    label_prob: Sequence[float],
    *,
    anchors: Sequence[Hashable] | None = None,
    share: bool = True,
) -> list[Group]:
    """Groups of pairs, in the order of their first pair: `sequences` (lists of token ids, each once), `pairs` (places of the
    two sequences that a pair compares) and `label_prob` (probability that the first of them is the better one).

    anchors: pairs of one anchor make up a group; without it those of one prompt.
    share: False gives each pair two sequences of its own: the same losses at the work of scoring pair by pair.
    Raises ValueError for lists of different lengths and a label_prob outside [0, 1], with the number of the row.
    """
    if anchors is None:
        anchors = [tuple(pair.prompt) for pair in pairs]
    if not len(pairs) == len(label_prob) == len(anchors):
        raise ValueError(f"{len(pairs)} pairs, {len(label_prob)} label_prob, {len(anchors)} anchors: give one a pair")
    groups: dict[Hashable, Group] = {}
    places: dict[Hashable, dict[tuple[int, ...], int]] = {}
    for pair, probability, anchor in zip(pairs, label_prob, anchors, strict=True):
        if not 0 <= probability <= 1:
            raise ValueError(f"row {pair.row + 1}: label_prob is {probability}; a probability is from 0 to 1")
        group = groups.setdefault(anchor, {"sequences": [], "pairs": [], "label_prob": []})
        known = places.setdefault(anchor, {})
        compared = []
        for answer in (pair.chosen, pair.rejected):
            sequence = (*pair.prompt, *answer)
            if not share or sequence not in known:
                known[sequence] = len(group["sequences"])
                group["sequences"].append(list(sequence))
            compared.append(known[sequence])
        group["pairs"].append(compared)
        group["label_prob"].append(float(probability))
    return list(groups.values())


def collate_groups(groups: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch for `RewardLoss`: `input_ids` and `attention_mask` (N, T), padded on the right, `pairs` (P, 2) counted through
    the batch, `label_prob` (P,) float32.

    Raises ValueError for a group that lacks one of its columns, as when a Trainer has removed it as unused.
    """
    import torch

    for group in groups:
        for name in ("sequences", "pairs", "label_prob"):
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
        "label_prob": torch.cat([torch.as_tensor(group["label_prob"], dtype=torch.float32) for group in groups]),
    }
