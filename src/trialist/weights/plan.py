"""Which tensor of the output is made from what: names, shapes, dtypes and vocabularies compared before anything is read."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from trialist.weights.architecture import Architecture
from trialist.weights.checkpoint import Checkpoint, listed
from trialist.weights.report import TensorReport
from trialist.weights.vocabulary import Key, RowMap, differences, keys_of, map_rows, same_tokenizer

ON_MISMATCH = ("error", "skip", "by-token", "by-row")


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
    unfit: dict[str, list[str]] = field(default_factory=dict)
    """Name of a tensor -> how the models differ there"""
    apart: list[str] = field(default_factory=list)
    """Tensors left alone because their rows stand for different tokens"""
    against: list[str] = field(default_factory=list)
    """What speaks against the sum, though it could be done"""
    notes: list[str] = field(default_factory=list)
    keys: Sequence[Key] | None = None
    """What the rows of the output stand for, where vocabularies differ"""
    by_token: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    """Names that are stored under another name as well, and are not written"""

    @property
    def skipped(self) -> list[str]:
        """What stays as it is in the new base because it does not fit, in words."""
        return [f"{name}: the vocabularies differ" for name in self.apart] + self.differing

    @property
    def differing(self) -> list[str]:
        return list(dict.fromkeys(itertools.chain.from_iterable(self.unfit.values())))

    @property
    def rows_differ(self) -> bool:
        """Whether embedding or head cannot be compared row by row."""
        return bool(self.apart) or any(name in self.by_token for name in self.unfit)

    @property
    def summed(self) -> list[str]:
        """Tensors that the delta is added to row for row."""
        return [part.name for part in self.parts if part.deltas and part.rows is None]


def make_plan(
    new: Checkpoint, deltas: Sequence[Delta], known: Architecture | None, *, dtype: torch.dtype | None, include: Sequence[str],
    exclude: Sequence[str], on_mismatch: str, tokenizer: str,
) -> Plan:  # fmt: skip
    """The output, tensor by tensor in the order of the new base's files.

    known: None for an architecture that transformers does not have: then tied names and vocabularies are not looked at.
    Raises ValueError with names for whatever does not fit, unless `on_mismatch` says how to go on.
    """
    everyone = checkpoints(new, deltas)
    _refuse_whole_numbers(everyone, known)
    plan = Plan(tied=frozenset(tied_names(new, known)))
    left = {id(c): set(tied_names(c, known)) for c in everyone}
    maps = _vocabulary(plan, new, deltas, known, on_mismatch, tokenizer)
    _check_patterns(new, include, exclude)
    dtypes: list[str] = []
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
            plan.apart.append(name)
        elif (left_out := _left_out(name, include, exclude)) and rows is None:
            report.made = "copied: left out by name"
        elif unfit := _unfit(name, stored.shape, new, deltas, left, by_token=rows is not None):
            report.made = f"copied: {unfit[0]}"
            plan.unfit[name] = unfit
            rows, shape = None, stored.shape
        elif left_out:
            report.made = "rows copied by token: left out by name"
        else:
            counted = tuple(number for number, delta in enumerate(deltas) if delta.alpha != 0)
            report.made = "by token" if rows is not None else "sum" if counted else "copied: alpha is 0"
            dtypes += _stored_apart(name, deltas)
        chosen = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        report.shape, report.dtype = shape, str(chosen).removeprefix("torch.")
        plan.parts.append(Part(name, shape, chosen, counted, report, rows))
    _add_extra(plan, new, deltas, known, left)
    if plan.unfit and on_mismatch != "skip":
        raise ValueError(
            f"{mismatch(plan.differing)}. All models must be of one architecture and size; --on-mismatch skip leaves such "
            "tensors as they are in the new base"
        )
    if dtypes:
        plan.against.append(
            "post and base are stored in different dtypes, so that their difference holds what rounding lost: "
            f"{listed(dtypes, separator='; ')}"
        )
    return plan


def mismatch(words: Sequence[str]) -> str:
    return f"{len(words)} tensors do not match: {'; '.join(words[:10])}{'; ...' if len(words) > 10 else ''}"


def _refuse_whole_numbers(everyone: Sequence[Checkpoint], known: Architecture | None) -> None:
    """Raises ValueError for weights that are stored as whole numbers; those of buffers, such as counts, are in order."""
    if known is None:
        return
    for checkpoint in everyone:
        found = [
            f"{name} ({str(stored.dtype).removeprefix('torch.')})"
            for name, stored in checkpoint.tensors.items()
            if not stored.dtype.is_floating_point and known.is_parameter(name)
        ]
        if found:
            raise ValueError(
                f"model {checkpoint.name!r} is quantised: it stores {listed(found)} as whole numbers where its class has "
                "weights; give the model in float32, bfloat16 or float16"
            )


def checkpoints(new: Checkpoint, deltas: Sequence[Delta]) -> list[Checkpoint]:
    return [new, *(checkpoint for delta in deltas for checkpoint in (delta.post, delta.base))]


def tied_names(checkpoint: Checkpoint, known: Architecture | None) -> list[str]:
    """Names that this model stores although they share another one's tensor. Raises ValueError where the two differ."""
    found = known.stored_twice(checkpoint.tensors) if known is not None else {}
    for name, source in found.items():
        if not _equal(checkpoint, name, source):
            raise ValueError(
                f"model {checkpoint.name!r} holds {name} and {source} with different values, but the new base ties them to one "
                "tensor; all models must be of one architecture"
            )
    return list(found)


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
    by_token = [sorted(name for name in c.tensors if known.is_by_token(name)) for c in everyone]
    plan.by_token = frozenset(itertools.chain.from_iterable(by_token))
    if bare := [checkpoint.name for checkpoint, names in zip(everyone, by_token) if not names]:
        plan.against.append(f"the embedding is not found in {listed(bare)}, so that vocabularies cannot be compared")
        return None
    rows = [c.tensors[names[0]].shape[0] for c, names in zip(everyone, by_token)]
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
            "--on-mismatch by-token adds the delta token by token, --on-mismatch by-row by number where tokens were only "
            "renamed, --on-mismatch skip leaves embedding and head alone"
        )
    if on_mismatch == "by-row":
        if len(set(rows)) > 1:
            raise ValueError(f"--on-mismatch by-row wants embeddings of one length, not {rows}; by-token matches rows")
        renamed = list(dict.fromkeys(itertools.chain.from_iterable(found for _, found in apart)))
        plan.notes.append(
            f"{len(renamed)} rows stand for different tokens and are added by number: {listed(renamed, 100)}"
        )
        return None
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


def _add_extra(
    plan: Plan, new: Checkpoint, deltas: Sequence[Delta], known: Architecture | None, left: dict[int, set[str]]
) -> None:
    """Weights of the others that the new base does not have."""
    for checkpoint in checkpoints(new, deltas)[1:]:
        for name, stored in checkpoint.tensors.items():
            of_no_use = name in left[id(checkpoint)] or (known is not None and known.ignores(name))
            if name not in new.tensors and stored.dtype.is_floating_point and not of_no_use:
                plan.unfit.setdefault(name, []).append(f"{name} of {checkpoint.name} is not in {new.name}")


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
