"""Presets against what their sources do, on random rows with planted copies."""

from __future__ import annotations

import collections
import random
import re
import unicodedata

import pytest

from trialist.data.benchmark_items import Items
from trialist.data.matching import Matching
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Scan
from trialist.data.streams import Place

WORDS = "The cat, sat; 12 on A (mat) Don't run 3.5 far é—Straße x+y naïve “so” 1,200 dogs".split()  # noqa: SIM905


def rows_and_items(seed: int) -> tuple[list[str], list[str]]:
    """Rows of 40 to 90 words into some of which pieces of items are put, with other case, spaces and numbers."""
    chance = random.Random(seed)
    items = [" ".join(chance.choices(WORDS, k=chance.randrange(5, 60))) for _ in range(15)]
    rows = []
    for _ in range(60):
        words = chance.choices(WORDS, k=chance.randrange(40, 90))
        source = chance.choice(items).split()
        start = chance.randrange(len(source))
        piece = " ".join(source[start : start + chance.randrange(4, 25)])
        if chance.random() < 0.5:
            piece = re.sub(r"12|3\.5|1,200", lambda _: chance.choice(("7", "88.25", "6,000")), piece)
        words[chance.randrange(40)] = chance.choice((piece, piece.upper() if piece.isascii() else piece, ""))
        rows.append(chance.choice((" ", "  ", "\n")).join(words))
    return rows, items


def found(preset: str, rows: list[str], items: list[str]) -> list[int]:
    matching = Matching(benchmarks=("x",), preset=preset)  # type: ignore[arg-type]
    benchmark = Items("b", ("text",), tuple(map(str, range(len(items)))), tuple((text,) for text in items))
    index = OverlapIndex([benchmark], matching.chosen("n"), matching.words_of())
    scan = Scan(index, matching.decision(), list_rows=True)
    scan.add([Place("t", number) for number in range(len(rows))], [[row] for row in rows])
    return sorted(row.place.number for row in scan.found)


def sharing(rows: list[str], items: list[str], n: int, words_of) -> list[int]:
    """Rows with an n-gram that is in a set of those of the items."""

    def ngrams(text: str) -> set[str]:
        words = words_of(text)
        return {" ".join(words[at : at + n]) for at in range(len(words) - n + 1)}

    wanted = set().union(*(ngrams(text) for text in items))
    return [number for number, row in enumerate(rows) if ngrams(row) & wanted]


def test_open_r1_removes_the_rows_that_its_script_removes():
    sizes = collections.Counter()
    for seed in range(10):
        rows, items = rows_and_items(seed)
        expected = sharing(rows, items, 8, lambda text: text.lower().strip().split())
        assert found("open-r1", rows, items) == expected
        sizes[0 < len(expected) < len(rows)] += 1
    assert sizes[True] == 10


def test_gpt3_removes_the_rows_that_the_janitor_cuts(capsys):
    janitor = pytest.importorskip("lm_eval.decontamination.janitor").Janitor
    cut = 0
    for seed in range(10):
        rows, items = rows_and_items(seed)
        rows = [f"{row} {'zzz ' * 60}" for row in rows]  # a row of 200 characters or less is gone in any case
        peer = janitor(ngram_n=13)
        for text in items:
            peer.register_contaminant_python(text)
        expected = [number for number, row in enumerate(rows) if peer.clean_python(row) != [row]]
        assert found("gpt3", rows, items) == expected
        cut += len(expected)
    assert cut > 50


def test_datatrove_removes_the_rows_with_an_ngram_of_its_simplified_text():
    def simplified(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P" and c != "+")
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        return re.sub(r"\d+", "0", text).split()

    numbers = 0
    for seed in range(10):
        rows, items = rows_and_items(seed)
        expected = sharing(rows, items, 12, simplified)
        assert found("datatrove", rows, items) == expected
        numbers += len(expected) - len(set(found("gpt3", rows, items)) & set(expected))
    assert numbers > 10
