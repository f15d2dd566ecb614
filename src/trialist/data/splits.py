"""Training, validation and test documents without leakage: by content hash, near-duplicates and modules kept together.

Near-duplicates are found by MinHash with one permutation (Li, Owen, Zhang 2012; empty bins filled by rotation,
Shrivastava and Li 2014) over the 16-byte
shingles of the text in lower case with white space collapsed, and locality-sensitive hashing; linear in the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trialist.data.corpora import Documents, load_documents, split_names, stdlib_module

FEW_TEST_ITEMS = 100
OVERSHOOT = 1.25
"""A group enters a held-out split that it fills to at most this multiple of its share"""
GAP = bytes(16)
"""Stands behind each text, so that no shingle of 16 bytes reaches into the next"""
BINS = 64
BAND = 4
"""Signature bins per band: two texts are compared where a band of four agrees"""
SIMILAR = 0.7
"""Share of equal bins, an estimate of the Jaccard similarity of the shingle sets, from which texts are near-duplicates"""
TEMPLATED = 0.1
"""A near-duplicate group beyond this share of the documents is a common template, not a set of copies"""
CHUNK = 1 << 18
"""Bytes whose shingles are hashed at a time: the arrays stay in the cache"""


@dataclass(frozen=True)
class Splits:
    train: Documents
    validation: Documents
    test: Documents
    notes: tuple[str, ...] = ()
    """What a reader of results should know about this split"""

    def sizes(self) -> dict[str, int]:
        """Documents and UTF-8 bytes per split: `train`, `train_bytes`, ..."""
        sizes = {}
        for name in ("train", "validation", "test"):
            documents = getattr(self, name)
            sizes[name] = len(documents)
            sizes[f"{name}_bytes"] = sum(len(text.encode()) for text in documents.texts)
        return sizes

    def __str__(self) -> str:
        sizes = self.sizes()
        return ", ".join(
            f"{name} {sizes[name]:,} documents ({sizes[f'{name}_bytes']:,} bytes)"
            for name in ("train", "validation", "test")
        )


def load_splits(
    data: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_examples: int | None = None,
) -> Splits:
    """The documents of `data`, split. Data that bring a test split keep it; what is missing is cut from their `train`.

    split: with `train`, only that split is used and cut 80/10/10; any other name is the split that serves as the test set.
    max_examples: keep the first so many documents of each split that is loaded.
    """
    brought = split_names(data)
    if split is not None and split not in brought:
        raise ValueError(f"{data} has no split {split!r}: it has {', '.join(brought) or 'none'}")
    load = {"columns": columns, "max_examples": max_examples}
    test_name = split or ("test" if "test" in brought else None)
    if test_name in (None, "train") or "train" not in brought:
        chosen = test_name if brought else None
        return split_documents(load_documents(data, split=chosen, **load))  # type: ignore[arg-type]
    train = load_documents(data, split="train", **load)  # type: ignore[arg-type]
    test = load_documents(data, split=test_name, **load)  # type: ignore[arg-type]
    train, dropped = _without_copies_of(train, test)
    notes = (f"{dropped} training documents left out: copies of test documents",) if dropped else ()
    if "validation" in brought and test_name != "validation":
        validation = load_documents(data, split="validation", **load)  # type: ignore[arg-type]
    else:
        kept, held = hold_out(train, 0.1)
        train, validation = train.select(kept), train.select(held)
    return Splits(train, validation, test, notes + _few(test))


def split_documents(
    documents: Documents,
    *,
    groups: Sequence[str] | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Splits:
    """Deterministic split, a function of the contents alone (not of their order or ids).

    Near-duplicates, and documents of one group, stay in one split. Groups go to test, then validation, then training in the
    order of their hash until each has its share of the documents; a group too large for what is left of its share
    is passed on, in the end to training.
    groups: one key a document; by default the top-level module for `python-stdlib`, else none.
    Raises ValueError when a split would be empty.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be three positive shares that sum to 1, not {fractions}")
    if groups is not None and len(groups) != len(documents):
        raise ValueError(f"groups: expected one a document, {len(documents)}, found {len(groups)}")
    if groups is None and documents.source == "python-stdlib":
        groups = [stdlib_module(name) for name in documents.ids]
    group_of, notes = _groups(documents, groups)
    train, validation, test = map(documents.select, _assign(documents, group_of, fractions, groups))
    return Splits(train, validation, test, notes + _few(test))


def hold_out(documents: Documents, share: float) -> tuple[list[int], list[int]]:
    """Indices of the documents to train on, and of about `share` of them held out; by content, near-duplicates together.

    Raises ValueError when `share` is not between 0 and 1 or when either part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, not {share}")
    kept, held = _assign(documents, _groups(documents, None)[0], (1 - share, share))
    return kept, held


def near_duplicate_groups(texts: Sequence[str]) -> np.ndarray:
    """(N,) group number of each text; texts equal up to case and white space, or nearly equal, share a number."""
    normalised = [" ".join(text.lower().split()).encode() for text in texts]
    first_of: dict[bytes, int] = {}
    exact = np.fromiter((first_of.setdefault(text, i) for i, text in enumerate(normalised)), np.int64, len(texts))
    distinct = np.array([i for i in np.unique(exact) if normalised[i]], np.int64)
    edges = [np.stack([np.arange(len(texts)), exact])]
    signatures = _signatures([normalised[i] for i in distinct])
    for band in range(0, BINS, BAND):
        key = signatures[:, band].astype(np.uint64)
        for column in range(band + 1, band + BAND):
            key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column])
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order][1:] == key[order][:-1])
        left, right = order[same], order[same + 1]  # neighbours in a bucket: linear, and chains join the bucket
        similar = (signatures[left] == signatures[right]).mean(axis=1) >= SIMILAR
        edges.append(np.stack([distinct[left[similar]], distinct[right[similar]]]))
    row, column_ = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(row), np.int8), (row, column_)), shape=(len(texts), len(texts)))
    return connected_components(graph, directed=False)[1]


def _signatures(texts: list[bytes]) -> np.ndarray:
    """(N, BINS) uint32 one-permutation MinHash of texts that are not empty."""
    empty = np.uint32(0xFFFFFFFF)
    signatures = np.full((len(texts), BINS), empty)
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and (size == 0 or size + len(texts[stop]) <= CHUNK):
            size += len(texts[stop]) + len(GAP)
            stop += 1
        joined = GAP.join([*texts[start:stop], b""])
        words = np.ndarray(len(joined) - 7, "<u8", joined, strides=(1,))  # the 8 bytes from each byte on
        hashes = words[:-8] * np.uint64(0x9E3779B97F4A7C15)
        hashes += words[8:]
        _mix(hashes)
        lengths = [len(text) + len(GAP) for text in texts[start:stop]]
        bins = np.repeat(np.arange(start, stop, dtype=np.int64) * BINS, lengths)[: len(hashes)]
        bins += (hashes >> np.uint64(58)).view(np.int64)
        np.minimum.at(signatures.reshape(-1), bins, hashes.astype(np.uint32) & np.uint32(0x7FFFFFFF))
        start = stop
    # an empty bin takes the next filled one to its right (around the end) and the distance, so that two empty bins
    # agree only where their fillers do
    filled = signatures != empty
    place = np.where(np.concatenate([filled, filled], axis=1), np.arange(2 * BINS), 2 * BINS)
    following = np.minimum.accumulate(place[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    distance = (following - np.arange(BINS)).astype(np.uint32)
    return np.take_along_axis(signatures, following % BINS, axis=1) + distance * np.uint32(0x85EBCA6B)


def _mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers, in place, whose high bits depend on all bits (the finaliser of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value ^= value >> np.uint64(shift)
        value *= np.uint64(factor)
    return value


def _groups(documents: Documents, groups: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N,) group of each document: near-duplicates and the given groups, joined."""
    near = near_duplicate_groups(documents.texts)
    notes: tuple[str, ...] = ()
    counts = np.bincount(near)
    template = np.flatnonzero(counts > max(2, TEMPLATED * len(documents)))
    if len(template):
        members = np.isin(near, template)
        exact = {text: i for i, text in enumerate(documents.texts)}
        near = near + len(documents)
        near[members] = [exact[text] for text, member in zip(documents.texts, members) if member]
        notes = (
            f"{members.sum()} of {len(documents)} documents share most of their text (a template?): "
            "among them only exact copies are kept in one split",
        )
    if groups is None:
        return near, notes
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    given = np.array([number[group] for group in groups]) + int(near.max()) + 1
    nodes = int(given.max()) + 1
    graph = coo_array((np.ones(len(near), np.int8), (near, given)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][near], notes


def _assign(
    documents: Documents,
    group_of: np.ndarray,
    fractions: Sequence[float],
    keys: Sequence[str] | None = None,
) -> list[list[int]]:
    """Document indices per fraction, the first fraction being the one that takes what is left.

    A group is ordered by the smallest hash of its contents, or of its `keys` where documents are grouped by name: then a
    module stays in its split when its text changes with the interpreter's version.
    """
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in (keys or documents.texts)]
    members: dict[int, list[int]] = {}
    for index, group in enumerate(group_of.tolist()):
        members.setdefault(group, []).append(index)
    ordered = sorted(members.values(), key=lambda group: min(hashes[index] for index in group))
    parts: list[list[int]] = [[] for _ in fractions]
    if len(ordered) < len(fractions):
        raise ValueError(
            f"{documents.source}: {len(documents)} documents in {len(ordered)} groups of near-duplicates cannot be split "
            f"into {len(fractions)} parts without an empty one; bring more documents, or data with a test split"
        )
    for number in range(len(fractions) - 1, 0, -1):
        quota = max(1, round(fractions[number] * len(documents)))
        taken: list[list[int]] = []
        size = 0
        for group in ordered:
            if size < quota and size + len(group) <= quota * OVERSHOOT:
                taken.append(group)
                size += len(group)
        taken = taken or [min(ordered, key=len)]
        chosen = {group[0] for group in taken}
        ordered = [group for group in ordered if group[0] not in chosen]
        parts[number] = [index for group in taken for index in group]
    parts[0] = [index for group in ordered for index in group]
    return [sorted(part) for part in parts]


def _without_copies_of(train: Documents, test: Documents) -> tuple[Documents, int]:
    held_out = {" ".join(text.lower().split()) for text in test.texts}
    kept = [i for i, text in enumerate(train.texts) if " ".join(text.lower().split()) not in held_out]
    if not kept:
        raise ValueError(f"{train.source}: every training document is also in the test split")
    return train.select(kept), len(train) - len(kept)


def _few(test: Documents) -> tuple[str, ...]:
    if len(test) >= FEW_TEST_ITEMS:
        return ()
    return (f"only {len(test)} test items (fewer than {FEW_TEST_ITEMS})",)
