"""Contamination against plain Python sets on the same texts and items: equal hits first, then time; and its memory.

Peers: the loop of open-r1, which looks every n-gram of a row up in a dictionary from the n-grams of the items to these;
that loop with places, so that it finds how much of each item a row covers; the janitor of lm-eval, in its Python mode; and,
for memory, the dictionary from every n-gram of the training data to its rows that s1 builds. Of twenty items one is a passage
of the texts, one a passage with every tenth word changed, and the others are words of the texts in random order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare, threads
from trialist.analysis.contamination import ContaminationAnalysis
from trialist.data.benchmark_items import Items
from trialist.data.corpora import load_documents
from trialist.data.files import cut_text
from trialist.data.overlap import OverlapIndex
from trialist.data.scan import Scan
from trialist.data.streams import Place
from trialist.data.words import Words

N, ITEMS, WORDS, REPEATED = 8, 5_000, 60, 20
OURS, OPEN_R1, DICTIONARY, JANITOR, S1 = (
    "trialist", "loop of open-r1", "dictionary of strings", "janitor of lm-eval", "dictionary of s1"
)  # fmt: skip


@functools.cache
def texts() -> list[str]:
    """The sources of Python's standard library in random order, in pieces as a training row has: about 10 million characters."""
    pieces = [piece for document in load_documents("python-stdlib").texts for piece in cut_text(document)]
    return [pieces[at] for at in np.random.default_rng(0).permutation(len(pieces))]


def first(characters: int) -> list[str]:
    """Rows of so many characters, or a few more; the texts again and again where they are not enough."""
    sizes = itertools.accumulate(len(text) for text in itertools.cycle(texts()))
    return list(
        itertools.islice(itertools.cycle(texts()), next(n for n, size in enumerate(sizes, 1) if size >= characters))
    )


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


def ngrams(text: str, n: int = N) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]


def rows_of_items(passages: Sequence[str]) -> dict[str, set[int]]:
    """n-gram -> the texts that hold it: open-r1 has one of the items, s1 one of the training data."""
    lookup: dict[str, set[int]] = defaultdict(set)
    for number, text in enumerate(passages):
        for ngram in ngrams(text):
            lookup[ngram].add(number)
    return lookup


def hits_by_open_r1(lookup: dict[str, set[int]], rows: Sequence[str]) -> list[int]:
    """The rows that share an n-gram, as open-r1 finds them: all n-grams of a row as a set, then each looked up."""
    return [number for number, row in enumerate(rows) if any(ngram in lookup for ngram in set(ngrams(row)))]


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


def index_of(passages: Sequence[str], n: int, words: Words) -> OverlapIndex:
    named = Items("passages", ("text",), tuple(map(str, range(len(passages)))), tuple((text,) for text in passages))
    return OverlapIndex([named], n, words, short="skip")


def rows_with_hits(index: OverlapIndex, documents: Sequence[Sequence[str]]) -> list[int]:
    return np.unique(index.search(documents)[0]).tolist()


def work_of(rows: Sequence[str]) -> tuple[str, Limit]:
    size = sum(len(text.encode()) for text in rows)
    return f"{size / 1e6:.1f} MB in {len(rows):,} rows", Limit(flops=0, bytes=size)


def rows() -> list[Row]:
    passages = items(first(3_000_000))
    with threads(1):
        return [*search(passages), janitor(passages), command(passages), *memory()]


def search(passages: Sequence[str]) -> Iterator[Row]:
    searched = texts()
    work, limit = work_of(searched)
    documents = [[text] for text in searched]
    index = index_of(passages, N, Words("whitespace"))
    lookup = rows_of_items(passages)
    assert rows_with_hits(index, documents) == hits_by_open_r1(lookup, searched)
    work += f", {index.ngrams:,} n-grams of {ITEMS:,} items"
    yield compare(
        {"n-gram search": functools.partial(index.search, documents),
         OPEN_R1: functools.partial(hits_by_open_r1, lookup, searched)},
        work=f"every n-gram of an item in every row, of the peer only which rows hold one: {work}", repeats=REPEATED, limit=limit,
    ).row("n-gram search", OPEN_R1, at_most=0.2)  # fmt: skip

    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for item, text in enumerate(passages):
        for at, ngram in enumerate(ngrams(text)):
            places[ngram].append((item, at))
    sizes = [len(text.split()) for text in passages]
    sources = [Place("texts", number) for number in range(1, len(searched) + 1)]

    def coverage() -> list[float]:
        scan = Scan(index)
        for start in range(0, len(documents), 2_000):  # some megabytes at a time, as a data set is read
            scan.add(sources[start : start + 2_000], documents[start : start + 2_000])
        return scan.coverage.tolist()

    assert coverage() == coverage_by_sets(places, sizes, searched)
    yield compare(
        {"contamination scan": coverage,
         DICTIONARY: functools.partial(coverage_by_sets, places, sizes, searched)},
        work=f"coverage of every item, with the best row on our side only: {work}", repeats=REPEATED, limit=limit,
    ).row("contamination scan", DICTIONARY, at_most=0.1)  # fmt: skip


def plain_words(text: str) -> str:
    return " ".join(word for word in text.split() if word.isalnum() and word.isascii())


def janitor(passages: Sequence[str]) -> Row:
    """Which rows the janitor would cut, on fewer of them: it takes seconds for a megabyte."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # no C++ module is there
        from lm_eval.decontamination.janitor import Janitor

    # words that are punctuation alone end the janitor's n-grams, and rows of 200 characters or less are gone in any case
    searched = [text for text in map(plain_words, first(3_000_000)) if len(text) > 200]
    plain = [plain_words(text) for text in passages]
    documents = [[text] for text in searched]
    index = index_of(plain, 13, Words("bare"))
    peer = Janitor(ngram_n=13)
    for text in plain:
        peer.register_contaminant_python(text)

    def cut() -> list[int]:
        return [number for number, text in enumerate(searched) if peer.clean_python(text) != [text]]

    ours = functools.partial(rows_with_hits, index, documents)
    assert ours() == cut()
    work, limit = work_of(searched)
    result = compare(
        {"n-gram search, preset gpt3": ours, JANITOR: cut},
        work=f"rows that share 13 words, letters and digits only: {work}", repeats=REPEATED, limit=limit,
    )  # fmt: skip
    return result.row("n-gram search, preset gpt3", JANITOR, at_most=0.1)


def write(folder: Path, characters: int, passages: Sequence[str]) -> tuple[Path, Path]:
    """Training rows and items as JSON Lines."""
    train, exam = folder / "train.jsonl", folder / "exam.jsonl"
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in first(characters)))
    exam.write_text("".join(json.dumps({"question": text}) + "\n" for text in passages))
    return train, exam


def analysis(train: Path, exam: Path, output: Path) -> int:
    """What the command does; the rows that share an n-gram."""
    options = dict(preset="open-r1", examples=20)
    entry = ContaminationAnalysis(train=(str(train),), benchmarks=(str(exam),), output=str(output), **options)  # type: ignore[arg-type]
    entry(say=lambda _: None)
    return json.loads(output.with_suffix(".json").read_text())["train"][0]["rows contaminating"]


def script(train: Path, exam: Path) -> int:
    """The script of open-r1 on files: reads both, finds the rows, and reports nothing of the items."""
    lookup = rows_of_items([json.loads(line)["question"] for line in exam.open()])
    with train.open() as lines:
        return sum(any(ngram in lookup for ngram in set(ngrams(json.loads(line)["text"]))) for line in lines)


def command(passages: Sequence[str]) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, exam = write(folder, 30_000_000, passages)
        outputs = (folder / f"report{number}" for number in itertools.count())

        def whole() -> int:
            return analysis(train, exam, next(outputs))

        assert whole() == script(train, exam)
        size = train.stat().st_size
        result = compare(
            {"contamination, whole command": whole, OPEN_R1: functools.partial(script, train, exam)},
            work=f"{size / 1e6:.0f} MB of JSON Lines and {ITEMS:,} items, from reading to the report (the peer has none)",
            repeats=REPEATED, limit=Limit(flops=0, bytes=size),
        )  # fmt: skip
    return result.row("contamination, whole command", OPEN_R1, at_most=0.5)


def memory() -> Iterator[Row]:
    """Peak memory of the whole command, which is to depend on the items alone, and of the peers."""
    module = "benchmarks.contamination"
    small, large = (peak_memory(module, OURS, size) for size in ("10000000", "100000000"))
    row = Row(
        what="contamination, peak memory",
        work=f"the whole command, {ITEMS:,} items, 10 and 100 MB of training text",
        measured=f"{small:.0f} MB and {large:.0f} MB",
        ratio=f"{large / small:.2f}",
        target="at most 1.5 times for ten times the data",
        met=large <= 1.5 * small,
    )
    yield row
    for peer in (OPEN_R1, S1):
        theirs = peak_memory(module, peer, "10000000")
        yield dataclasses.replace(
            row, work=f"{ITEMS:,} items, 10 MB of training text", measured=f"{small:.0f} MB", against=f"{peer}: {theirs:.0f} MB",
            ratio=f"{small / theirs:.2f}", target="", met=None,
        )  # fmt: skip


def prepared(folder: Path, characters: int) -> tuple[Path, Path]:
    return write(folder, characters, items(first(3_000_000)))


def measured(name: str, characters: str) -> Callable[[], object]:
    """One of the contenders of this process, for its peak memory."""
    folder = Path(tempfile.mkdtemp())
    with ProcessPoolExecutor(1) as apart:  # what it takes to make the files stays out of this process
        train, exam = apart.submit(prepared, folder, int(characters)).result()
    if name == OURS:
        return functools.partial(analysis, train, exam, folder / "report")
    if name == OPEN_R1:
        return functools.partial(script, train, exam)
    return lambda: rows_of_items([json.loads(line)["text"] for line in train.open()])
