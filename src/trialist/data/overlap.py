"""Which n-grams of benchmark items occur in texts, and how much of each item one text covers.

A word of an item is *covered* by a text when some n-gram of the item that holds the word occurs in the text. n-grams never
go from one field of an item, or from one turn of a text, into the next. The share of a field is that of its words which some
n-gram that counts could cover; the share of an item is the mean over its fields. A field of fewer than n words is looked for
whole: beside longer fields it has their share where it is found, so that it never decides alone, and 0 elsewhere; an item
that has none but short fields has the share of those found.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trialist.data.benchmark_items import Items
from trialist.data.words import TokenWords, Words
from trialist.kernels.ngrams import IN_WORD, LONGEST, UNKNOWN, Phrases

EXPANDED = 1 << 22
"""Places of n-grams that are worked on at a time"""


@dataclass(frozen=True)
class Coverage:
    """What groups of texts cover of items: one entry for each group and item that share an n-gram."""

    group: np.ndarray
    item: np.ndarray
    coverage: np.ndarray
    """Share of the item that is covered"""
    longest: np.ndarray
    """The same with the longest run of covered words of each field"""
    begin: np.ndarray
    end: np.ndarray
    """`places[begin : end]` are the covered n-grams of the entry"""
    places: np.ndarray
    """Where n-grams stand in `OverlapIndex.flat`, increasing within an entry"""


class OverlapIndex:
    """All n-grams of the items of several benchmarks.

    n: words in an n-gram, 1 to 64. words: what a word is.
    short: `skip` does not look for fields of fewer than n words; else they are looked for whole.
    ignored: texts whose n-grams count nowhere. common: n-grams in more than this share of a benchmark's items do not count for
    that benchmark; 1 ignores none. Neither touches short fields.
    """

    def __init__(
        self,
        benchmarks: Sequence[Items],
        n: int = 8,
        words: Words | TokenWords | None = None,
        *,
        short: Literal["exact", "count", "skip"] = "exact",
        ignored: Iterable[str] = (),
        common: float = 1.0,
        backend: Literal["auto", "c", "reference"] = "auto",
    ) -> None:
        if not 1 <= n <= LONGEST:
            raise ValueError(f"n must be from 1 to {LONGEST} words, not {n}")
        if short not in ("exact", "count", "skip"):
            raise ValueError(f"short {short!r}: one of exact, count, skip")
        if not 0 < common <= 1:
            raise ValueError(f"common is a share above 0, at most 1, not {common}")
        if not any(len(items) for items in benchmarks):
            raise ValueError("there are no benchmark items to look for")
        self.benchmarks, self.n, self.words = tuple(benchmarks), n, words or Words()
        vocabulary: dict[Hashable, int] = {}
        flat: list[int] = []
        fields: list[tuple[int, int]] = []  # item, words
        for item, texts in enumerate(texts for items in benchmarks for texts in items.texts):
            for text in texts:
                numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in self.words.split(text)]
                flat += numbers
                fields.append((item, len(numbers)))
        self.field_item, self.field_words = np.array(fields, np.int64).reshape(-1, 2).T.copy()
        self.field_begin = np.concatenate([[0], np.cumsum(self.field_words)])
        self.flat = np.array(flat, np.uint32)
        self.field_of = np.repeat(np.arange(len(fields)), self.field_words)  # (flat,)
        self._describe_items()
        self._build_phrases(vocabulary, short, backend)
        self._build_postings(self._ignored(ignored), common)

    def _describe_items(self) -> None:
        self.item_benchmark = np.repeat(np.arange(len(self.benchmarks)), [len(items) for items in self.benchmarks])
        count = len(self.item_benchmark)
        filled = self.field_words > 0
        self.item_words = np.bincount(self.field_item, self.field_words, count).astype(np.int64)
        self.field_long = self.field_words >= self.n
        self.short_fields = np.bincount(self.field_item[filled & ~self.field_long], minlength=count)  # (items,)
        self.item_empty = self.item_words == 0
        self.item_short = ~self.item_empty & (np.bincount(self.field_item[self.field_long], minlength=count) == 0)
        self.item_first_field = np.searchsorted(self.field_item, np.arange(count))

    def _build_phrases(
        self, vocabulary: dict[Hashable, int], short: str, backend: Literal["auto", "c", "reference"]
    ) -> None:
        wanted = self.field_long | ((self.field_words > 0) & (short != "skip"))
        self.field_length = np.minimum(self.field_words, self.n)  # words of the field's phrases
        counts = np.where(wanted, self.field_words - self.field_length + 1, 0)
        before = np.concatenate([[0], np.cumsum(counts)])
        starts = np.arange(before[-1]) + np.repeat(self.field_begin[:-1] - before[:-1], counts)
        lengths = np.repeat(self.field_length, counts)
        if isinstance(self.words, TokenWords):
            ids = np.array(list(vocabulary), np.int64)
            self.number_of = np.full(max(len(self.words.tokenizer), ids.max(initial=0) + 1), UNKNOWN, np.uint32)
            self.number_of[ids] = np.arange(len(ids))
            spelled = [str(word).encode() for word in vocabulary]
            kinds, lower = np.full(256, IN_WORD, np.uint8), False
        else:
            spelled, kinds, lower = list(vocabulary), self.words.kinds, self.words.lower  # type: ignore[arg-type]
        self.phrases = Phrases(spelled, self.flat, starts, lengths, kinds, lower, backend)
        self.starts = starts
        self.first_start = np.unique(self.phrases.number, return_index=True)[1]  # (phrases,)
        self.is_ngram = self.field_long[self.field_of[starts[self.first_start]]]  # (phrases,): others are short fields
        self.phrase_of = np.full(len(self.flat), UNKNOWN, np.uint32)  # (flat,): the phrase that begins at each word
        self.phrase_of[starts] = self.phrases.number

    def _ignored(self, texts: Iterable[str]) -> np.ndarray:
        """(phrases,) bool: n-grams that count nowhere."""
        ignored = np.zeros(self.phrases.size, bool)
        for number, text in enumerate(texts, start=1):
            if (size := len(self.words.split(text))) < self.n:
                raise ValueError(f"ignored text {number} ({text[:60]!r}) has {size} words, fewer than n = {self.n}")
            ignored[self.search([[text]])[1]] = True
        return ignored & self.is_ngram

    def _build_postings(self, ignored: np.ndarray, common: float) -> None:
        number = self.phrases.number.astype(np.int64)
        keep = ~ignored[number] if len(number) else np.zeros(0, bool)
        if common < 1:
            item = self.field_item[self.field_of[self.starts]]
            pairs = np.unique(np.stack([number, item]), axis=1)
            benchmark = self.item_benchmark[pairs[1]]
            width = len(self.benchmarks)
            keys, items = np.unique(pairs[0] * width + benchmark, return_counts=True)
            sizes = np.bincount(self.item_benchmark, minlength=width)
            often = (items > np.maximum(1, common * sizes[keys % width])) & self.is_ngram[keys // width]
            frequent = keys[often]
            keep &= ~np.isin(number * width + self.item_benchmark[item], frequent)
        kept = np.flatnonzero(keep)
        order = kept[np.argsort(number[kept], kind="stable")]
        self.postings = self.starts[order]
        """Places of each phrase in `flat`, phrase after phrase, increasing"""
        self.posting_begin = np.concatenate([[0], np.cumsum(np.bincount(number[kept], minlength=self.phrases.size))])
        self._count_what_is_left(self.starts[kept])

    def _count_what_is_left(self, kept: np.ndarray) -> None:
        """What can be covered when the n-grams that do not count are taken out. kept: places of the others, in `flat`."""
        steps = np.bincount(kept, minlength=len(self.flat) + 1)
        steps -= np.bincount(kept + self.field_length[self.field_of[kept]], minlength=len(self.flat) + 1)
        within = np.cumsum(steps[:-1]) > 0
        self.field_left = np.bincount(self.field_of[within], minlength=len(self.field_words))
        """(fields,): words within an n-gram that counts"""
        left = self.field_long & (self.field_left > 0)
        count = len(self.item_benchmark)
        self.long_fields = np.bincount(self.field_item[left], minlength=count)
        """(items,): fields of n words or more of which something is left"""
        self.item_left = np.bincount(self.field_item[left], self.field_left[left], count).astype(np.int64)
        self.item_ignored = ~self.item_empty & ~self.item_short & (self.long_fields == 0)
        """(items,) bool: nothing is left to look for"""

    @property
    def ngrams(self) -> int:
        """How many different n-grams, and short fields, are looked for."""
        return self.phrases.size

    @property
    def item_comparable(self) -> np.ndarray:
        """(items,) bool: those with an n-gram to look for."""
        return self.long_fields > 0

    def __len__(self) -> int:
        return len(self.item_benchmark)

    def name(self, item: int) -> tuple[str, str]:
        """Benchmark and id of an item."""
        benchmark = self.benchmarks[self.item_benchmark[item]]
        return benchmark.name, benchmark.ids[self._within(item)]

    def texts(self, item: int) -> tuple[str, ...]:
        return self.benchmarks[self.item_benchmark[item]].texts[self._within(item)]

    def _within(self, item: int) -> int:
        return item - int(np.searchsorted(self.item_benchmark, self.item_benchmark[item]))

    def phrase_text(self, phrase: int) -> str:
        """The n-gram as it is written where it stands first."""
        return self.text_at(int(self.starts[self.first_start[phrase]]))

    def text_at(self, place: int, following: int = 1) -> str:
        """The n-gram at a place in `flat`, and those that begin with the next words, as written. following: how many."""
        field = int(self.field_of[place])
        item = int(self.field_item[field])
        text = self.texts(item)[field - int(self.item_first_field[item])]
        spans = self.words.spans(text)
        first = place - int(self.field_begin[field])
        return text[spans[first][0] : spans[first + int(self.field_length[field]) + following - 2][1]]

    def search(self, documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Every (document, phrase) that occurs, sorted. A document is a sequence of texts that n-grams do not cross."""
        if isinstance(self.words, TokenWords):
            found = self.phrases.search(self.words.numbered(documents, self.number_of))
        else:
            found = self.phrases.search([self.words.encode(texts) for texts in documents])
        document, phrase = (array.astype(np.int64) for array in found)
        order = np.lexsort((phrase, document))
        return document[order], phrase[order]

    def cover(self, group: np.ndarray, phrase: np.ndarray) -> Coverage:
        """What groups that hold these phrases cover; (group, phrase) are distinct pairs, sorted by group."""
        counts = self.posting_begin[phrase + 1] - self.posting_begin[phrase]
        before = np.cumsum(counts) - counts
        index = np.arange(counts.sum()) + np.repeat(self.posting_begin[phrase] - before, counts)
        size = max(1, len(self.flat))
        return self.cover_places(*np.divmod(np.sort(np.repeat(group, counts) * size + self.postings[index]), size))

    def cover_places(self, group: np.ndarray, place: np.ndarray) -> Coverage:
        """The same from the places in `flat` of the n-grams that each group holds, sorted by group and place."""
        if not len(place):
            none = np.zeros(0, np.int64)
            return Coverage(none, none, none.astype(float), none.astype(float), none, none, none)
        field = self.field_of[place]
        length = self.field_length[field]
        new = np.concatenate([[True], (field[1:] != field[:-1]) | (group[1:] != group[:-1])])  # another field, or group
        step = np.concatenate([place[1:] - place[:-1], [0]])
        last = np.concatenate([new[1:], [True]])
        gained = np.where(last, length, np.minimum(length, step))
        entry = np.flatnonzero(new)
        covered = np.add.reduceat(gained, entry)
        apart = new | np.concatenate([[True], step[:-1] > length[:-1]])  # a word between is not covered
        run = np.flatnonzero(apart)
        run_end = np.concatenate([run[1:], [len(place)]]) - 1
        run_words = place[run_end] + length[run_end] - place[run]
        longest = np.maximum.reduceat(run_words, np.searchsorted(run, entry))

        long = self.field_long[field[entry]]
        left = self.field_left[field[entry]]
        item, of = self.field_item[field[entry]], group[entry]
        first = np.flatnonzero(np.concatenate([[True], (item[1:] != item[:-1]) | (of[1:] != of[:-1])]))
        found = [np.add.reduceat(np.where(long, words / left, 0.0), first) for words in (covered, longest)]
        whole = np.add.reduceat(~long, first, dtype=np.int64)  # short fields
        of, item, begin = of[first], item[first], entry[first]
        end = np.concatenate([begin[1:], [len(place)]])
        decides = (found[0] > 0) | self.item_short[item]
        item, found, whole = item[decides], [share[decides] for share in found], whole[decides]
        coverage, longest = (self._of_item(item, share, whole) for share in found)
        return Coverage(of[decides], item, coverage, longest, begin[decides], end[decides], place)

    def _of_item(self, item: np.ndarray, long: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """Shares of items from the sums over their long fields and from how many short ones stand whole."""
        fields = self.long_fields[item]
        mean = np.where(fields > 0, long / np.maximum(fields, 1), 1.0)
        return mean * (fields + whole) / (fields + self.short_fields[item])

    def stands_whole(self, item: int, texts: Sequence[str]) -> bool:
        """Whether every field of an item stands word for word in one of the texts."""
        rows = [self.words.split(text) for text in texts]
        fields = [self.words.split(text) for text in self.texts(item)]
        return all(
            any(row[at : at + len(field)] == field for row in rows for at, word in enumerate(row) if word == field[0])
            for field in fields
            if field
        )

    def runs(self, places: np.ndarray) -> list[tuple[int, int, int]]:
        """Covered words of one item as (field within the item, first word, word behind the last), from sorted places."""
        found: list[tuple[int, int, int]] = []
        for place in places.tolist():
            field = int(self.field_of[place])
            within = field - int(self.item_first_field[self.field_item[field]])
            first = place - int(self.field_begin[field])
            behind = first + int(self.field_length[field])
            if found and found[-1][0] == within and first <= found[-1][2]:
                found[-1] = (within, found[-1][1], behind)
            else:
                found.append((within, first, behind))
        return found
