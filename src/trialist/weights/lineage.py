"""Whether a delta means anything to another base: the same architecture, and weights that descend from each other.

ParamDelta (arXiv 2504.21023) needs a new base that was continued from the old one. Two models of one architecture trained
from different seeds agree in every name and shape and in no weight: their matrices are orthogonal up to chance, and the sum
is noise. The cosine between matching matrices tells the two apart at almost no cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch

from trialist.weights.checkpoint import Checkpoint
from trialist.weights.report import Likeness, cosine

LEAST_COSINE = 0.5
"""Mean cosine over matrices below which two models are not taken for relatives. Models of different seeds are at 0, and bases
that were trained on, as the models of the trial `param-delta`, at 0.8 and above; what lies between was not seen"""
CLOSE_COSINE = 0.9
"""Below it relatives are far apart. Of direct fine-tuning's greedy answers, over six seeds of the trial's models, 0.36 to 0.89
carried over at 0.89, and 0 to 0.47 at 0.81"""
PIECES, PIECE = 4, 16384
"""A matrix is judged by so many stretches of so many elements, evenly spread; one no larger is judged whole"""

SAME = (
    "model_type",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "hidden_act",
    "activation_function",
    "hidden_activation",
)
"""Settings that change what matrices of equal shape mean"""
OF_NO_MATTER = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "vocab_size", "auto_map",
}  # fmt: skip


def likeness(first: Checkpoint, second: Checkpoint, names: Collection[str] | None = None) -> Likeness:
    """Mean and lowest cosine between the matrices that both hold in one shape; of `names`, or of all."""
    found: dict[str, float] = {}
    for name in first.tensors if names is None else names:
        if not (_is_matrix(first, name) and _is_matrix(second, name)):
            continue
        stored = first.tensors[name]
        if second.tensors[name].shape != stored.shape:
            continue
        pieces = stretches(stored.elements)
        base, new = (torch.cat([model.read(name, *piece) for piece in pieces]).double() for model in (first, second))
        value = cosine(float(torch.dot(base, new)), float(torch.dot(base, base)), float(torch.dot(new, new)))
        if value is not None:
            found[name] = value
    if not found:
        return Likeness(first.name, second.name, None, None, "", 0)
    lowest = min(found, key=found.__getitem__)
    return Likeness(first.name, second.name, sum(found.values()) / len(found), found[lowest], lowest, len(found))


def _is_matrix(model: Checkpoint, name: str) -> bool:
    stored = model.tensors.get(name)
    return stored is not None and len(stored.shape) > 1 and stored.dtype.is_floating_point


def stretches(elements: int) -> list[tuple[int, int]]:
    if elements <= PIECES * PIECE:
        return [(0, elements)]
    starts = torch.linspace(0, elements - PIECE, PIECES, dtype=torch.float64).long().tolist()
    return [(start, start + PIECE) for start in starts]


def refusal(entry: Likeness) -> str | None:
    """Why two models are not taken for relatives; None where they are, or where there is no matrix to tell."""
    if entry.cosine is None or entry.cosine >= LEAST_COSINE:
        return None
    return f"{entry.first} and {entry.second} are not of one lineage: {_measured(entry)}, at least {LEAST_COSINE} is wanted"


def remark(entry: Likeness) -> str | None:
    """That two relatives are far apart; None where they are not."""
    if entry.cosine is None or not LEAST_COSINE <= entry.cosine < CLOSE_COSINE:
        return None
    return f"{entry.first} and {entry.second} are related, but far apart: {_measured(entry)}; expect less to carry over"


def _measured(entry: Likeness) -> str:
    return (
        f"the mean cosine between their {entry.matrices} matrices is {entry.cosine:.3f} (lowest {entry.lowest:.3f}, "
        f"{entry.lowest_name})"
    )


def config_differences(first: Checkpoint, second: Checkpoint) -> tuple[list[str], list[str]]:
    """Settings that differ, in words: those that make it another architecture, and the others."""
    one, other = (_flat(checkpoint.config) for checkpoint in (first, second))
    grave: list[str] = []
    light: list[str] = []
    for key in sorted({*one, *other}):
        last = key.rpartition(".")[2]
        if one.get(key) == other.get(key) or last in OF_NO_MATTER or key.partition(".")[0] in OF_NO_MATTER:
            continue
        words = f"{key} is {one.get(key)!r} in {first.name} and {other.get(key)!r} in {second.name}"
        (grave if last in SAME and key in one and key in other else light).append(words)
    return grave, light


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    parts = (
        _flat(value, f"{prefix}{key}.").items() if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        for key, value in config.items()
    )
    return dict(itertools.chain.from_iterable(parts))
