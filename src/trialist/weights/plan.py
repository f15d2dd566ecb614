"""Which tensor of the output is made from what: names, shapes, dtypes and vocabularies compared before anything is read."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from trialist.weights.architecture import Architecture
from trialist.weights.checkpoint import Checkpoint, listed
from trialist.weights.report import TensorReport
from trialist.weights.vocabulary import Key, RowMap, differences, keys_of, map_rows, same_tokenizer

ON_MISMATCH = ("error", "skip", "by-token")


@dataclass(frozen=True)
class Delta:
    """alpha (post - base)"""

    post: Checkpoint
    base: Checkpoint
    alpha: float


@dataclass(frozen=True)
class Part:
    """One tensor of the output; `rows` where they are put together by token, `deltas` those that count, by number."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    deltas: tuple[int, ...]
    report: TensorReport
    rows: RowMap | None = None

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Stretches of about so many elements: of the flat tensor, or of its rows where they are put together by token."""
        if self.rows is None:
            size, step = self.elements, elements
        else:
            size, step = len(self.rows), max(1, elements * len(self.rows) // max(self.elements, 1))
        for start in range(0, max(size, 1), step):
            yield start, min(start + step, size)

    @property
    def elements(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass
class Plan:
    parts: list[Part] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    """Tensors whose post and base are stored in different dtypes"""
    notes: list[str] = field(default_factory=list)
    keys: Sequence[Key] | None = None
    """What the rows of the output stand for, where vocabularies differ"""
    by_token: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    """Names that are stored under another name as well, and are not written"""


def make_plan(
    new: Checkpoint, deltas: Sequence[Delta], known: Architecture | None, *, dtype: torch.dtype | None, include: Sequence[str],
    exclude: Sequence[str], on_mismatch: str, tokenizer: str,
) -> Plan:  # fmt: skip
    """The output, tensor by tensor in the order of the new base's files.

    known: None for an architecture that transformers does not have: then tied names and vocabularies are not looked at.
    Raises ValueError with names for whatever does not fit, unless `on_mismatch` says how to go on.
    """
    plan = Plan(tied=frozenset(tied_names(new, known)))
    left = {id(c): set(tied_names(c, known)) for c in checkpoints(new, deltas)}
    maps = _vocabulary(plan, new, deltas, known, on_mismatch, tokenizer)
    _check_patterns(new, include, exclude)
    wrong: list[str] = []
    for name, stored in new.tensors.items():
        if name in plan.tied:
            continue
        report = TensorReport(name, stored.shape, "", "sum")
        counted: tuple[int, ...] = ()
        rows, shape = (maps, (len(maps), *stored.shape[1:])) if maps and name in plan.by_token else (None, stored.shape)
        if not stored.dtype.is_floating_point:
            report.made = "copied: whole numbers"
        elif known is not None and known.ignores(name):
            report.made = "copied: the class does not read it"
        elif name in plan.by_token and plan.keys is not None and maps is None:
            report.made = "copied: the vocabularies differ"
            plan.skipped.append(f"{name}: the vocabularies differ")
        elif (left_out := _left_out(name, include, exclude)) and rows is None:
            report.made = "copied: left out by name"
        elif unfit := _unfit(name, stored.shape, new, deltas, left, by_token=rows is not None):
            report.made = f"copied: {unfit[0]}"
            wrong += unfit
            rows, shape = None, stored.shape
        elif left_out:
            report.made = "rows copied by token: left out by name"
        else:
            counted = tuple(number for number, delta in enumerate(deltas) if delta.alpha != 0)
            report.made = "by token" if rows is not None else "sum" if counted else "copied: alpha is 0"
            plan.dtypes += _stored_apart(name, deltas)
        chosen = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        report.shape, report.dtype = shape, str(chosen).removeprefix("torch.")
        plan.parts.append(Part(name, shape, chosen, counted, report, rows))
    wrong += _extra(new, deltas, known, left)
    if wrong and on_mismatch != "skip":
        raise ValueError(
            f"{len(wrong)} tensors do not match: {'; '.join(wrong[:10])}{'; ...' if len(wrong) > 10 else ''}. All models must be "
            "of one architecture and size; --on-mismatch skip leaves such tensors as they are in the new base"
        )
    plan.skipped += wrong
    return plan


def checkpoints(new: Checkpoint, deltas: Sequence[Delta]) -> list[Checkpoint]:
    return [new, *(checkpoint for delta in deltas for checkpoint in (delta.post, delta.base))]


def tied_names(checkpoint: Checkpoint, known: Architecture | None) -> list[str]:
    """Names that this model stores although they share another one's tensor. Raises ValueError where the two differ."""
    found = []
    for name, source in (known.tied if known else {}).items():
        if name not in checkpoint.tensors or source not in checkpoint.tensors:
            continue
        if not _equal(checkpoint, name, source):
            raise ValueError(
                f"model {checkpoint.name!r} holds {name} and {source} with different values, but the new base ties them to one "
                "tensor; all models must be of one architecture"
            )
        found.append(name)
    return found


def _equal(checkpoint: Checkpoint, name: str, other: str, block: int = 1 << 20) -> bool:
    one, two = checkpoint.tensors[name], checkpoint.tensors[other]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    stretches = ((start, min(start + block, one.elements)) for start in range(0, one.elements, block))
    return all(torch.equal(checkpoint.read(name, *stretch), checkpoint.read(other, *stretch)) for stretch in stretches)


def _vocabulary(
    plan: Plan, new: Checkpoint, deltas: Sequence[Delta], known: Architecture | None, on_mismatch: str, tokenizer: str
) -> RowMap | None:
    """The map of rows where tokens stand in different ones; fills `plan.by_token`, `plan.keys` and notes."""
    if known is None:
        plan.notes.append(f"transformers does not have the class of {new.name}, so its vocabulary was not compared")
        return None
    everyone = checkpoints(new, deltas)
    embeddings = [next((name for name in sorted(known.by_token) if name in c.tensors), None) for c in everyone]
    if any(name is None for name in embeddings):
        return None  # named as a missing tensor
    plan.by_token = known.by_token
    rows = [c.tensors[str(name)].shape[0] for c, name in zip(everyone, embeddings)]
    if len(set(rows)) == 1 and same_tokenizer(everyone):
        return None
    keys = [keys_of(checkpoint, count) for checkpoint, count in zip(everyone, rows)]
    present = [entry for entry in keys if entry is not None]
    if len(present) < len(keys):
        bare = sorted({checkpoint.name for checkpoint, entry in zip(everyone, keys) if entry is None})
        plan.notes.append(f"no tokenizer in {listed(bare)}: rows of equal number are taken for the same token")
        if len(set(rows)) > 1:
            return None  # named as a shape that differs
        present = present or [list(range(rows[0]))]
        keys = [present[0] if entry is None else entry for entry in keys]
    lists = [entry for entry in keys if entry is not None]
    apart = [(c, differences(lists[0], entry)) for c, entry in zip(everyone[1:], lists[1:])]
    apart = [(checkpoint, found) for checkpoint, found in apart if found]
    if not apart:
        return None
    if on_mismatch == "error":
        checkpoint, found = apart[0]
        raise ValueError(
            f"the vocabularies of {new.name} and {checkpoint.name} differ in {len(found)} rows: {listed(found)}. "
            "--on-mismatch by-token adds the delta token by token, --on-mismatch skip leaves embedding and head alone"
        )
    if on_mismatch == "skip":
        if tokenizer != "base-new":
            raise ValueError("--on-mismatch skip keeps the new base's embedding, so it needs --tokenizer base-new")
        plan.keys = lists[0]
        return None
    pairs = list(zip(lists[1::2], lists[2::2]))
    plan.keys = lists[0] if tokenizer == "base-new" else pairs[0][0]
    found_rows = map_rows(plan.keys, lists[0], pairs)
    copied = [plan.keys[row] for row in (found_rows.source >= 0).nonzero().flatten().tolist()]
    if copied:
        plan.notes.append(
            f"{len(copied)} rows that the new base lacks are copied from the post-trained model: {listed([*map(repr, copied)])}"
        )
    there = set(plan.keys)
    if lost := [key for key in lists[0] if key not in there]:
        plan.notes.append(f"{len(lost)} tokens of the new base are not in the output: {listed([*map(repr, lost)])}")
    return found_rows


def _unfit(
    name: str,
    shape: tuple[int, ...],
    new: Checkpoint,
    deltas: Sequence[Delta],
    left: dict[int, set[str]],
    *,
    by_token: bool,
) -> list[str]:
    wrong = []
    for checkpoint in checkpoints(new, deltas)[1:]:
        other = None if name in left[id(checkpoint)] else checkpoint.tensors.get(name)
        if other is None:
            wrong.append(f"{name} is missing in {checkpoint.name}")
        elif other.shape[by_token:] != shape[by_token:]:
            wrong.append(f"{name} is {list(shape)} in {new.name} and {list(other.shape)} in {checkpoint.name}")
        elif not other.dtype.is_floating_point:
            wrong.append(f"{name} holds numbers of kind {other.dtype} in {checkpoint.name}")
    return list(dict.fromkeys(wrong))


def _extra(
    new: Checkpoint, deltas: Sequence[Delta], known: Architecture | None, left: dict[int, set[str]]
) -> list[str]:
    """Weights of the others that the new base does not have."""
    wrong = []
    for checkpoint in checkpoints(new, deltas)[1:]:
        for name, stored in checkpoint.tensors.items():
            tied = name in left[id(checkpoint)] or (known is not None and known.ignores(name))
            if name not in new.tensors and stored.dtype.is_floating_point and not tied:
                wrong.append(f"{name} of {checkpoint.name} is not in {new.name}")
    return list(dict.fromkeys(wrong))


def _stored_apart(name: str, deltas: Sequence[Delta]) -> list[str]:
    found = []
    for delta in deltas:
        post, base = (checkpoint.tensors[name].dtype for checkpoint in (delta.post, delta.base))
        if delta.alpha != 0 and post != base:
            found.append(f"{name} is {post} in {delta.post.name} and {base} in {delta.base.name}")
    return found


def _check_patterns(new: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> None:
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in new.tensors):
                raise ValueError(
                    f"--{option} {pattern!r} matches no tensor of {new.name}; its names are like {listed([*new.tensors], 3)}"
                )


def _left_out(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (bool(include) and not _matches(name, include)) or _matches(name, exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
