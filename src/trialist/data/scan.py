"""Training data against benchmark items: streamed once, in memory that depends on the items alone.

Rules for when an item is contaminated (`>` is strict throughout):

- `tulu3`: one training row covers more than a share of the item's words (arXiv 2411.15124).
- `any`: one n-gram is shared (open-r1, s1, GPT-3).
- `whole`: one training row holds every field of the item word for word (the full-string search of open-instruct).
- `longest`: the longest run of words that one row covers is more than a share of the item (after arXiv 2411.03923).
- `union`: all rows together cover more than a share of the item.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trialist.data.excerpts import Excerpt, excerpt_of
from trialist.data.overlap import EXPANDED, OverlapIndex
from trialist.data.streams import Place, Row, RowTexts
from trialist.data.words import Span

CHUNK = 1 << 22
"""Characters of training text that are searched at a time"""
EVERY = 5.0
"""Seconds between lines of progress"""
HELD = 1 << 26
"""Characters of best rows that are held until their excerpts are asked for; beyond, excerpts are made at once"""
RULES = ("tulu3", "any", "whole", "longest", "union")
WITHOUT_SHARE = ("any", "whole")
"""Rules that ask for no share of an item"""


@dataclass(frozen=True)
class Rule:
    """When an item is contaminated, and with it a training row that makes it so."""

    name: Literal["tulu3", "any", "whole", "longest", "union"] = "tulu3"
    coverage: float | None = None
    """Share of an item that must be exceeded, 0 to 1; at 1 nothing is contaminated. Without it 0.5, and 0 for `any` and
    `whole`, which take 0 or 1"""
    short: Literal["exact", "count", "skip"] = "exact"
    """Items of fewer than n words: looked for whole and told apart, counted as contaminated where found, or left out"""

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"rule {self.name!r}: one of {', '.join(RULES)}")
        if self.coverage is None:
            return
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"coverage is a share from 0 to 1, not {self.coverage}")
        if self.name in WITHOUT_SHARE and 0 < self.coverage < 1:
            raise ValueError(
                f"coverage {self.coverage}: the rule {self.name!r} asks for no share of an item; leave coverage out, or take "
                "1, at which nothing is contaminated"
            )

    @property
    def threshold(self) -> float:
        if self.coverage is not None:
            return self.coverage
        return 0.0 if self.name in WITHOUT_SHARE else 0.5

    def share(self, coverage: np.ndarray, longest: np.ndarray) -> np.ndarray:
        """What is compared with the threshold."""
        return longest if self.name == "longest" else coverage

    def decides(self, share: np.ndarray, short: np.ndarray) -> np.ndarray:
        """Whether these shares contaminate; with `whole`, whether they may: the row itself has to be looked at.

        short: which items have fewer than n words; they are found whole or not at all.
        """
        counted = ~short | ((self.short == "count") & (share == 1))
        if self.name == "whole":
            return (share == 1) & (self.threshold < 1) & counted
        return (share > self.threshold) & counted


@dataclass(frozen=True)
class Match:
    """The training row that covers most of an item; of equal ones the first by file and number."""

    place: Place
    share: float
    spans: tuple[tuple[int, int, int], ...]
    """What it covers of the item: field, first and last character + 1"""
    excerpt: Excerpt


@dataclass(frozen=True)
class Best:
    """What a match is made of when it is asked for."""

    place: Place
    share: float
    covered: np.ndarray
    texts: Sequence[str]
    excerpt: Excerpt | None

    def without_texts(self, index: OverlapIndex) -> Best:
        """The same with its excerpt instead of the whole row."""
        if self.excerpt is not None:
            return self
        excerpt = excerpt_of(index, self.texts, np.unique(index.phrase_of[self.covered]))
        return dataclasses.replace(self, texts=(), excerpt=excerpt)


@dataclass(frozen=True)
class Found:
    """A training row that contaminates, the item that it covers most, and where they match."""

    place: Place
    item: int
    share: float
    excerpt: Excerpt


@dataclass
class Scan:
    """What training rows cover of the items of `index`. `add` takes rows, in any order and in any portions.

    targets: with rule `union`, the items that are contaminated: a row counts as found when it shares an n-gram with one.
    """

    index: OverlapIndex
    rule: Rule = Rule()
    targets: np.ndarray | None = None
    list_rows: bool = False
    """Whether `found` is filled; its memory grows with the rows that contaminate"""
    rows: int = 0
    empty: int = 0
    """Rows without any text of the chosen columns and roles"""
    characters: int = 0
    rows_sharing: int = 0
    """Rows that share an n-gram of n words with some item"""
    rows_contaminating: int = 0
    """Rows that make an item contaminated by themselves; with the rule `union`, that share an n-gram with a target"""
    found: list[Found] = field(default_factory=list)
    best: dict[int, Best] = field(default_factory=dict)
    held: int = 0
    """Characters of the rows in `best`"""

    def __post_init__(self) -> None:
        size = len(self.index)
        self.coverage, self.longest = np.zeros(size), np.zeros(size)
        """(items,): largest share over training rows"""
        self.sharing, self.exceeding = np.zeros(size, np.int64), np.zeros(size, np.int64)
        """(items,): training rows that share an n-gram with it, and that make it contaminated"""
        self.frequency = np.zeros(self.index.ngrams, np.int64)
        """(n-grams,): training rows that hold it"""
        self.seen = np.zeros(len(self.index.flat), bool)

    def add(self, places: Sequence[Place], documents: Sequence[Sequence[str]]) -> None:
        """Takes rows, each as the texts that n-grams do not cross."""
        self.rows += len(documents)
        self.empty += sum(not any(texts) for texts in documents)
        self.characters += sum(len(text) for texts in documents for text in texts)
        document, phrase = self.index.search(documents)
        used = self.index.posting_begin[phrase + 1] > self.index.posting_begin[phrase]
        document, phrase = document[used], phrase[used]
        if not len(document):
            return
        present, counts = np.unique(phrase, return_counts=True)
        self.frequency[present] += counts
        holders, begin = np.unique(document, return_index=True)
        self.rows_sharing += int(np.count_nonzero(np.add.reduceat(self.index.is_ngram[phrase], begin, dtype=np.int64)))
        # rows that hold the same n-grams cover the same (of a template, most do), but need not hold the same items whole
        alike: dict[tuple[bytes, int], list[int]] = {}
        for holder, first, end in zip(holders.tolist(), begin.tolist(), [*begin[1:].tolist(), len(phrase)]):
            alike.setdefault((phrase[first:end].tobytes(), holder * (self.rule.name == "whole")), []).append(holder)
        groups = [np.frombuffer(key, np.int64) for key, _ in alike]
        members = [sorted(group, key=places.__getitem__) for group in alike.values()]
        posted = [int((self.index.posting_begin[g + 1] - self.index.posting_begin[g]).sum()) for g in groups]
        start = 0
        while start < len(groups):
            stop, total = start + 1, posted[start]
            while stop < len(groups) and total + posted[stop] <= EXPANDED:
                total += posted[stop]
                stop += 1
            self._cover(groups[start:stop], members[start:stop], places, documents)
            start = stop

    def _cover(
        self,
        groups: list[np.ndarray],
        members: list[list[int]],
        places: Sequence[Place],
        documents: Sequence[Sequence[str]],
    ) -> None:
        numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        entries = self.index.cover(numbers, np.concatenate(groups))
        item, group = entries.item, entries.group
        self.seen[entries.places] = True
        np.maximum.at(self.coverage, item, entries.coverage)
        np.maximum.at(self.longest, item, entries.longest)
        sizes = np.array([len(group) for group in members])
        np.add.at(self.sharing, item, sizes[group])
        share = self.rule.share(entries.coverage, entries.longest)
        if self.rule.name == "union":
            over = np.zeros(len(item), bool) if self.targets is None else self.targets[item]
        else:
            over = self.rule.decides(share, self.index.item_short[item])
        if self.rule.name == "whole":
            for at in np.flatnonzero(over).tolist():
                over[at] = self.index.stands_whole(int(item[at]), documents[members[group[at]][0]])
        np.add.at(self.exceeding, item[over], sizes[group[over]])
        chosen = np.flatnonzero(over)
        chosen = chosen[np.lexsort((item[chosen], -share[chosen], group[chosen]))]
        for at in chosen[np.unique(group[chosen], return_index=True)[1]].tolist():
            self.rows_contaminating += len(members[group[at]])
            for member in members[group[at]] if self.list_rows else ():
                phrases = np.unique(self.index.phrase_of[entries.places[entries.begin[at] : entries.end[at]]])
                excerpt = excerpt_of(self.index, documents[member], phrases)
                self.found.append(Found(places[member], int(item[at]), float(share[at]), excerpt))

        first = sorted(range(len(groups)), key=lambda number: places[members[number][0]])
        rank = np.empty(len(groups), np.int64)
        rank[first] = np.arange(len(groups))
        order = np.lexsort((rank[group], -share, item))
        for at in order[np.unique(item[order], return_index=True)[1]].tolist():
            covered = entries.places[entries.begin[at] : entries.end[at]]
            self._keep(int(item[at]), float(share[at]), members[group[at]][0], covered, places, documents)

    def _keep(
        self,
        item: int,
        share: float,
        member: int,
        covered: np.ndarray,
        places: Sequence[Place],
        documents: Sequence[Sequence[str]],
    ) -> None:
        """Remembers the row of an item if it is the best so far."""
        if self._is_better(item, share, places[member]):
            self._put(item, Best(places[member], share, covered.copy(), documents[member], None))

    def _is_better(self, item: int, share: float, place: Place) -> bool:
        before = self.best.get(item)
        return before is None or (-share, place) < (-before.share, before.place)

    def _put(self, item: int, best: Best) -> None:
        before = self.best.get(item)
        self.held -= sum(map(len, before.texts)) if before else 0
        if self.held + sum(map(len, best.texts)) > HELD:
            best = best.without_texts(self.index)
        self.held += sum(map(len, best.texts))
        self.best[item] = best

    def merge(self, other: Scan) -> None:
        """Takes what a scan of other rows, with the same index and rule, has found: as if these rows had been added here."""
        for name in ("rows", "empty", "characters", "rows_sharing", "rows_contaminating"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("coverage", "longest"):
            np.maximum(getattr(self, name), getattr(other, name), out=getattr(self, name))
        for name in ("sharing", "exceeding", "frequency"):
            np.add(getattr(self, name), getattr(other, name), out=getattr(self, name))
        self.seen |= other.seen
        self.found += other.found
        for item, best in other.best.items():
            if self._is_better(item, best.share, best.place):
                self._put(item, best)

    @property
    def matches(self) -> dict[int, Match]:
        """Item -> its best row, for all items that share an n-gram."""
        return {item: self._match(item, best) for item, best in sorted(self.best.items())}

    def _match(self, item: int, best: Best) -> Match:
        spans = []
        words: dict[int, list[Span]] = {}
        for number, first, behind in self.index.runs(best.covered):
            if number not in words:
                words[number] = self.index.words.spans(self.index.texts(item)[number])
            spans.append((number, words[number][first][0], words[number][behind - 1][1]))
        excerpt = best.without_texts(self.index).excerpt
        assert excerpt is not None
        return Match(best.place, best.share, tuple(spans), excerpt)

    def union(self) -> np.ndarray:
        """(items,): share of each item's words that all rows together cover."""
        shares = np.zeros(len(self.index))
        places = np.flatnonzero(self.seen)
        covered = self.index.cover_places(np.zeros(len(places), np.int64), places)
        shares[covered.item] = covered.coverage
        return shares

    def share(self) -> np.ndarray:
        """(items,): what the rule compares with its threshold."""
        return self.union() if self.rule.name == "union" else self.rule.share(self.coverage, self.longest)

    def contaminated(self) -> np.ndarray:
        """(items,) bool."""
        if self.rule.name != "union":
            return self.exceeding > 0
        return self.rule.decides(self.union(), self.index.item_short)

    def found_short(self) -> np.ndarray:
        """(items,) bool: items of fewer than n words that stand whole in some row."""
        return self.index.item_short & (self.coverage == 1)


def scan_rows(
    scan: Scan,
    rows: Iterable[tuple[Place, Row]],
    texts_of: RowTexts,
    *,
    name: str = "training data",
    say: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Lets `scan` take all rows, some megabytes at a time. say: takes a line of progress every few seconds."""
    began = told = time.perf_counter()
    places: list[Place] = []
    documents: list[list[str]] = []
    size = 0
    for place, row in rows:
        texts = texts_of(place, row)
        places.append(place)
        documents.append(texts)
        size += sum(map(len, texts)) + 200
        if size >= CHUNK:
            scan.add(places, documents)
            places, documents, size = [], [], 0
            if (now := time.perf_counter()) - told >= EVERY:
                told = now
                done = scan.characters / 1e6
                say(
                    f"{name}: {scan.rows:,} rows, {done:,.0f} million characters, {done / (now - began):.1f} million/s; "
                    f"{np.count_nonzero(scan.coverage):,} of {len(scan.index):,} items share an n-gram"
                )
    scan.add(places, documents)
    return scan
