"""Contamination against plain Python sets on the same texts and items: equal hits first, then time.

The peer does what the scripts of open-r1 and s1 do: the n-grams of the items in a set of strings, those of every row looked
up in it. The second row also finds how much of each item a row covers, with a dictionary from n-grams to places on the side
of the peer. Of twenty items one is a passage of the texts, one a passage with every tenth word changed, and the others are
words of the texts in random order.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from benchmarks.timer import Limit, Row, compare, threads
from trialist.data.benchmark_items import Items
from trialist.data.corpora import load_documents
from trialist.data.files import cut_text
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Scan
from trialist.data.streams import Place
from trialist.data.words import Words

N, ITEMS, WORDS, CHARACTERS, REPEATED = 8, 5_000, 60, 3_000_000, 20


def texts() -> list[str]:
    """About 3 million characters of Python source, in pieces as a training row has."""
    pieces: list[str] = []
    for document in load_documents("python-stdlib").texts:
        pieces += cut_text(document)
    order = np.random.default_rng(0).permutation(len(pieces))
    sizes = np.cumsum([len(pieces[at]) for at in order])
    return [pieces[at] for at in order[: int(np.searchsorted(sizes, CHARACTERS)) + 1]]


def items(rows: Sequence[str]) -> list[str]:
    draw = np.random.default_rng(1)
    words = [row.split() for row in rows]
    every = [word for row in words for word in row]
    long = [row for row in words if len(row) > WORDS]
    made = []
    for number in range(ITEMS):
        row = long[draw.integers(len(long))]
        start = draw.integers(len(row) - WORDS)
        passage = row[start : start + WORDS]
        others = [every[at] for at in draw.integers(len(every), size=WORDS)]
        if number % 20 == 1:
            passage = [other if at % 10 == 0 else word for at, (word, other) in enumerate(zip(passage, others))]
        made.append(" ".join(passage if number % 20 < 2 else others))
    return made


def ngrams(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[at : at + N]) for at in range(len(words) - N + 1)]


def hits_by_sets(wanted: set[str], rows: Sequence[str]) -> list[set[str]]:
    return [set(ngrams(row)) & wanted for row in rows]


def coverage_by_sets(
    places: dict[str, list[tuple[int, int]]], sizes: Sequence[int], rows: Sequence[str]
) -> list[float]:
    """The largest share of each item that a row covers."""
    best = [0.0] * len(sizes)
    for row in rows:
        covered: dict[int, set[int]] = defaultdict(set)
        for ngram in set(ngrams(row)):
            for item, at in places.get(ngram, ()):
                covered[item].update(range(at, at + N))
        for item, marks in covered.items():
            best[item] = max(best[item], len(marks) / sizes[item])
    return best


def rows() -> list[Row]:
    searched = texts()
    passages = items(searched)
    index = OverlapIndex(
        [Items("passages", ("text",), tuple(map(str, range(len(passages)))), tuple((text,) for text in passages))],
        N,
        Words("whitespace"),
    )
    documents = [[text] for text in searched]
    sources = [Place("texts", number) for number in range(1, len(searched) + 1)]
    wanted = {ngram for text in passages for ngram in ngrams(text)}
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for item, text in enumerate(passages):
        for at, ngram in enumerate(ngrams(text)):
            places[ngram].append((item, at))
    sizes = [len(text.split()) for text in passages]

    def coverage() -> list[float]:
        scan = Scan(index)
        scan.add(sources, documents)
        return scan.coverage.tolist()

    document, phrase = index.search(documents)
    spelled = {number: " ".join(index.phrase_text(number).lower().split()) for number in set(phrase.tolist())}
    found: list[set[str]] = [set() for _ in searched]
    for row, number in zip(document.tolist(), phrase.tolist()):
        found[row].add(spelled[number])
    assert found == hits_by_sets(wanted, searched)
    assert coverage() == coverage_by_sets(places, sizes, searched)

    size = sum(len(text.encode()) for text in searched)
    work = f"{size / 1e6:.1f} MB in {len(searched):,} rows, {index.ngrams:,} n-grams of {ITEMS:,} items, {len(phrase):,} hits"
    limit = Limit(flops=0, bytes=size)
    with threads(1):
        hits = compare(
            {"n-gram search": functools.partial(index.search, documents),
             "sets of strings": functools.partial(hits_by_sets, wanted, searched)},
            work=f"every n-gram of an item in every row: {work}", repeats=REPEATED, limit=limit,
        )  # fmt: skip
        whole = compare(
            {"contamination scan": coverage,
             "dictionary of strings": functools.partial(coverage_by_sets, places, sizes, searched)},
            work=f"coverage of every item, with the best row and its excerpt on our side only: {work}",
            repeats=REPEATED, limit=limit,
        )  # fmt: skip
    return [
        hits.row("n-gram search", "sets of strings", at_most=0.2),
        whole.row("contamination scan", "dictionary of strings", at_most=0.2),
    ]
