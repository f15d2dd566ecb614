"""Exact search of many phrases at once in running text: in C (`ngrams.c`), or in plain Python, which is the reference.

A phrase is a sequence of word numbers. Texts come as bytes whose words are found by a table of 256 kinds, or as arrays of
word numbers. Hashes only propose; what they propose is compared, so the result does not depend on them.

Work: every byte is read once; a word costs a lookup in the vocabulary (a few cache lines, and common words stay in the
cache) and, where all of the last n words are known, a hash of n multiplications and one bit of the filter.
Memory: proportional to the phrases, whatever is searched.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from trialist.kernels.compile import load_library

BETWEEN, IN_WORD, ALONE, SKIPPED = range(4)
"""What a byte does: separates words, belongs to one, is one by itself, is left out of words"""
BREAK_BYTE = b"\xff"
"""Ends a run of words; never part of UTF-8"""
LONGEST = 64
"""Words in a phrase, at most"""
UNKNOWN = 2**32 - 1
HASH_BITS = 64
"""Of the hashes that are used; fewer cost time and change no result"""
BATCH = 256
"""Words of a text worked on at a time, as in ngrams.c"""
ROOM = 1 << 16
"""Hits fetched at a time"""

Hits = tuple[np.ndarray, np.ndarray]

_POINTERS = ("kind", "letters", "letter_at", "words", "phrases", "flat", "phrase_at", "filter", "endings", "stamp",
             "scratch")  # fmt: skip
_MASKS = ("word_mask", "phrase_mask", "filter_mask", "hash_mask", "fold")


class _Index(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_uint64) for name in _MASKS),
        ("longest_word", ctypes.c_int64),
        ("plain", ctypes.c_int64),
    ]


class _Hits(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("document", "phrase", "begin", "end")),
        *((name, ctypes.c_int64) for name in ("room", "count", "next")),
    ]


def available() -> bool:
    """Whether the C kernel could be compiled here; the first call compiles it."""
    return load_library("ngrams.c") is not None


class Phrases:
    """Phrases to be found: `flat[starts[i] : starts[i] + lengths[i]]` for every i, equal ones under one number.

    vocabulary: the words that `flat` (uint32) numbers, as bytes, all different.
    kinds: (256,) uint8, what each byte does. lower: whether capital letters of ASCII are compared as small ones; those of the
    vocabulary are small then.
    backend: `c`, `reference`, or `auto`: C where it compiles.
    """

    number: np.ndarray
    """(starts,) uint32: the number of the phrase at each start, in the order of first places"""
    size: int
    """How many different phrases there are"""

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        flat: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        kinds: np.ndarray,
        lower: bool = True,
        backend: Literal["auto", "c", "reference"] = "auto",
    ) -> None:
        if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= LONGEST):
            raise ValueError(f"phrases have 1 to {LONGEST} words, not {lengths.min()} to {lengths.max()}")
        if backend not in ("auto", "c", "reference"):
            raise ValueError(f"backend {backend!r}: one of auto, c, reference")
        if backend == "c" and not available():
            raise ValueError("backend 'c': ngrams.c could not be compiled here; take 'reference'")
        self.backend = "c" if backend == "c" or (backend == "auto" and available()) else "reference"
        self.flat = np.ascontiguousarray(flat, np.uint32)
        self.starts, self.lengths = np.ascontiguousarray(starts, np.int64), np.ascontiguousarray(lengths, np.uint8)
        self.kinds, self.lower = np.ascontiguousarray(kinds, np.uint8), lower
        self._searcher: _InC | _InPython = (_InC if self.backend == "c" else _InPython)(self, list(vocabulary))
        self.number, self.size = self._searcher.number, self._searcher.size

    def search(self, texts: Sequence[bytes] | Sequence[np.ndarray]) -> Hits:
        """Every (text, phrase) that occurs, once, as two uint32 arrays, text after text.

        texts: bytes, or arrays of word numbers (uint32) with `UNKNOWN` for other words.
        """
        parts = [(hits[0], hits[1]) for hits in self._searcher.search(texts, everywhere=False)]
        return tuple(map(np.concatenate, zip(*parts))) if parts else (np.zeros(0, np.uint32),) * 2  # type: ignore[return-value]

    def locate(self, text: bytes | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every occurrence in one text: phrase (uint32), first byte or word and the one behind the last (int64)."""
        parts = [hits[1:] for hits in self._searcher.search([text], everywhere=True)]  # type: ignore[arg-type]
        empty = np.zeros(0, np.uint32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        return tuple(map(np.concatenate, zip(*parts))) if parts else empty  # type: ignore[return-value]


def _power_of_two(least: int) -> int:
    return 1 << max(6, (least - 1).bit_length())


class _InC:
    def __init__(self, phrases: Phrases, vocabulary: list[bytes]) -> None:
        library: Any = load_library("ngrams.c")
        self.library = library
        self.library.ngrams_phrases.restype = ctypes.c_int64
        most = len(phrases.starts)
        words, table, bits = (_power_of_two(size) for size in (2 * len(vocabulary), 2 * most, 16 * most))
        sizes = np.array([0, *map(len, vocabulary)], np.int64)
        self.arrays: dict[str, np.ndarray] = {
            "kind": phrases.kinds,
            "letters": np.frombuffer(b"".join(vocabulary) + bytes(8), np.uint8),
            "letter_at": np.cumsum(sizes),
            "words": np.zeros((words, 4), np.uint64),
            "phrases": np.zeros((table, 2), np.uint32),
            "flat": phrases.flat,
            "phrase_at": np.zeros(most, np.int64),
            "filter": np.zeros(bits // 64, np.uint64),
            "endings": np.zeros(max(1, len(vocabulary)), np.uint64),
            "scratch": np.zeros(BATCH * (int(sizes.max()) + 2) + 8, np.uint8),
        }
        self.index = _Index(**{name: array.ctypes.data for name, array in self.arrays.items()})
        self.index.word_mask, self.index.phrase_mask, self.index.filter_mask = words - 1, table - 1, bits - 1
        self.index.hash_mask = (1 << HASH_BITS) - 1
        self.index.fold = 0x2020202020202020 if phrases.lower else 0
        self.index.longest_word = sizes.max()
        self.index.plain = int(phrases.kinds.max() <= IN_WORD)
        self.number = np.zeros(most, np.uint32)
        self.library.ngrams_words(ctypes.byref(self.index), ctypes.c_int64(len(vocabulary)))
        given = (phrases.starts, phrases.lengths, self.arrays["phrase_at"], self.number)
        starts, lengths, phrase_at, number = (ctypes.c_void_p(array.ctypes.data) for array in given)
        self.size = self.library.ngrams_phrases(
            ctypes.byref(self.index), starts, lengths, ctypes.c_int64(most), phrase_at, number
        )
        self.stamps = np.zeros(max(1, self.size), np.uint32)
        self.index.stamp = self.stamps.ctypes.data
        self.next_stamp = 1

    def search(self, texts: Sequence[bytes] | Sequence[np.ndarray], *, everywhere: bool) -> Iterator[Any]:
        if not texts or not self.size:
            return
        if self.next_stamp + len(texts) >= 2**32:
            self.stamps[:] = 0
            self.next_stamp = 1
        in_bytes = isinstance(texts[0], bytes)
        joined: Any = (
            b"".join((*texts, bytes(8))) if in_bytes else np.concatenate([np.asarray(t, np.uint32) for t in texts])
        )  # type: ignore[arg-type]
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        text = ctypes.cast(ctypes.c_char_p(joined), ctypes.c_void_p) if in_bytes else None
        numbers = None if in_bytes else ctypes.c_void_p(joined.ctypes.data)
        room = 1 << 12 if everywhere else ROOM
        hits = _Hits(next=0)
        while hits.next < len(texts):
            before = hits.next
            arrays = {"document": np.empty(room, np.uint32), "phrase": np.empty(room, np.uint32)}
            if everywhere:
                arrays |= {"begin": np.empty(room, np.int64), "end": np.empty(room, np.int64)}
            for name, array in arrays.items():
                setattr(hits, name, array.ctypes.data)
            hits.room, hits.count = room, 0
            self.library.ngrams_search(
                ctypes.byref(self.index), ctypes.byref(hits), text, numbers, ctypes.c_void_p(starts.ctypes.data),
                ctypes.c_int64(len(texts)), ctypes.c_uint32(self.next_stamp),
            )  # fmt: skip
            if hits.next == before:
                room *= 4  # not even one text fits
            elif hits.count:
                yield tuple(array[: hits.count].copy() for array in arrays.values())
        self.next_stamp += len(texts)


class _InPython:
    """The same with dictionaries; the oracle of the C kernel, and what runs where there is no compiler."""

    def __init__(self, phrases: Phrases, vocabulary: list[bytes]) -> None:
        self.kinds, self.lower = phrases.kinds, phrases.lower
        self.word_number = {word: number for number, word in enumerate(vocabulary)}
        words = phrases.flat.tolist()
        known: dict[tuple[int, ...], int] = {}
        spans = zip(phrases.starts.tolist(), phrases.lengths.tolist())
        found = [known.setdefault(tuple(words[at : at + length]), len(known)) for at, length in spans]
        self.number, self.size = np.array(found, np.uint32), len(known)
        self.by_length: dict[int, dict[tuple[int, ...], int]] = {}
        for phrase, number in known.items():
            self.by_length.setdefault(len(phrase), {})[phrase] = number
        between, _, alone, self.skipped = (
            bytes(np.flatnonzero(self.kinds == kind).astype(np.uint8)) for kind in range(4)
        )
        by_itself = re.escape(BREAK_BYTE + alone)
        self.token = re.compile(b"[" + by_itself + b"]|[^" + by_itself + re.escape(between) + b"]+")
        codes = np.arange(256, dtype=np.uint8)
        capital = (codes >= ord("A")) & (codes <= ord("Z")) & self.lower
        self.folded = np.where(capital, codes + 32, codes).astype(np.uint8).tobytes()

    def search(self, texts: Sequence[bytes] | Sequence[np.ndarray], *, everywhere: bool) -> Iterator[Any]:
        text: Any
        for document, text in enumerate(texts):
            numbers, begins, ends = self.read(text) if isinstance(text, bytes) else (text.tolist(), None, None)
            found: dict[Any, None] = {}
            for length, phrases in self.by_length.items():
                shifted = [numbers[offset:] for offset in range(length)]
                for at, words in enumerate(zip(*shifted)):
                    if (number := phrases.get(words)) is None:
                        continue
                    last = at + length - 1
                    place = (begins[at], ends[last]) if begins is not None and ends is not None else (at, last + 1)
                    found[(number, *place) if everywhere else (number,)] = None
            if found:
                columns = list(zip(*found))
                yield (
                    np.full(len(found), document, np.uint32),
                    np.array(columns[0], np.uint32),
                    *(np.array(column, np.int64) for column in columns[1:]),
                )

    def read(self, text: bytes) -> tuple[list[int], list[int], list[int]]:
        """Word numbers, `UNKNOWN` for other words and for breaks, with the bytes where words begin and end."""
        numbers, begins, ends = [], [], []
        for match in self.token.finditer(text):
            piece = match[0]
            kept = piece.translate(self.folded, self.skipped)
            if not kept:
                continue
            lead = len(piece) - len(piece.lstrip(self.skipped)) if self.skipped else 0
            tail = len(piece) - len(piece.rstrip(self.skipped)) if self.skipped else 0
            numbers.append(self.word_number.get(kept, UNKNOWN) if piece != BREAK_BYTE else UNKNOWN)
            begins.append(match.start() + lead)
            ends.append(match.end() - tail)
        return numbers, begins, ends
