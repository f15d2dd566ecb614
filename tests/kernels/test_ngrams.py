from __future__ import annotations

import random

import numpy as np
import pytest

from trialist.kernels import ngrams
from trialist.kernels.ngrams import ALONE, BETWEEN, BREAK_BYTE, IN_WORD, SKIPPED, UNKNOWN, Phrases

BACKENDS = [
    pytest.param("c", marks=pytest.mark.skipif(not ngrams.available(), reason="no C compiler")),
    "reference",
]
PLAIN = np.full(256, IN_WORD, np.uint8)
PLAIN[list(b" \n,")] = BETWEEN


def phrases_of(
    texts: list[list[bytes]], length: int, kinds: np.ndarray = PLAIN, backend: str = "auto", **given
) -> Phrases:
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
    flat = np.array([vocabulary[word] for text in texts for word in text], np.uint32)
    starts, at = [], 0
    for text in texts:
        starts += range(at, at + len(text) - length + 1)
        at += len(text)
    lengths = np.full(len(starts), length, np.uint8)
    return Phrases(list(vocabulary), flat, np.array(starts, np.int64), lengths, kinds, backend=backend, **given)


def naive(
    texts: list[list[bytes]], length: int, documents: list[list[list[bytes]]]
) -> set[tuple[int, tuple[bytes, ...]]]:
    """(document, phrase) pairs by sets of tuples; a document is a list of runs of words."""
    wanted = {tuple(text[at : at + length]) for text in texts for at in range(len(text) - length + 1)}
    found = set()
    for number, runs in enumerate(documents):
        for words in runs:
            found |= {(number, tuple(words[at : at + length])) for at in range(len(words) - length + 1)}
    return {pair for pair in found if pair[1] in wanted}


def names(phrases: Phrases, texts: list[list[bytes]], length: int) -> dict[int, tuple[bytes, ...]]:
    spelled = [tuple(text[at : at + length]) for text in texts for at in range(len(text) - length + 1)]
    return dict(zip(phrases.number.tolist(), spelled))


def random_case(seed: int) -> tuple[list[list[bytes]], int, list[list[list[bytes]]], list[bytes]]:
    """Texts to index, length of phrases, documents as runs of words, and the same as bytes."""
    chance = random.Random(seed)
    pool = [
        b"a",
        b"bb",
        b"seven77",
        b"eight888",
        b"ninechars",
        b"x" * 16,
        b"y" * 17,
        b"\xc3\xa9t\xc3\xa9",
        b"long" * 20,
    ]
    stranger = [b"unknown", b"b", b"x" * 15, b"x" * 18, b"long" * 40, b"eight889", b"ninecharz"]
    length = chance.randint(1, 5)
    texts = [chance.choices(pool, k=chance.randrange(12)) for _ in range(9)]
    documents, written = [], []
    for _ in range(chance.randrange(1, 9)):
        runs = []
        for _ in range(chance.randrange(1, 4)):
            words = chance.choices(pool, k=chance.randrange(40)) + chance.choices(stranger, k=chance.randrange(3))
            chance.shuffle(words)
            if chance.random() < 0.5:
                words += chance.choice(texts)
            runs.append(words)
        pieces = [b"".join(chance.choice((b" ", b", ", b"\n\n", b" " * 70)) + word for word in run) for run in runs]
        documents.append(runs)
        written.append(BREAK_BYTE.join(piece.upper() if chance.random() < 0.3 else piece for piece in pieces))
    return texts, length, documents, written


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [64, 3, 0], ids=["good hashes", "three bits", "all hashes equal"])
def test_hits_are_those_of_sets_of_tuples_whatever_the_hash(backend, bits, monkeypatch):
    monkeypatch.setattr(ngrams, "HASH_BITS", bits)
    shared = 0
    for seed in range(40):
        texts, length, documents, written = random_case(seed)
        phrases = phrases_of(texts, length, backend=backend)
        named = names(phrases, texts, length)
        document, phrase = phrases.search(written)
        found = [(d, named[p]) for d, p in zip(document.tolist(), phrase.tolist())]
        assert len(found) == len(set(found)), "a pair came twice"
        assert set(found) == naive(texts, length, documents), seed
        assert list(document) == sorted(document)
        shared += len(found)
    assert shared > 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_words_are_searched_like_their_letters(backend):
    for seed in range(20):
        texts, length, documents, written = random_case(seed)
        phrases = phrases_of(texts, length, backend=backend)
        vocabulary = {word: n for n, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
        rows = [
            np.array(
                [n for run in runs for n in [*(vocabulary.get(word, UNKNOWN) for word in run), UNKNOWN]], np.uint32
            )
            for runs in documents
        ]
        by_letters, by_number = (set(zip(*map(list, phrases.search(data)))) for data in (written, rows))
        assert by_letters == by_number


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_place_of_a_phrase_is_located(backend):
    texts, text = [[b"one", b"two"]], b"One, two one  two two" + BREAK_BYTE + b"one" + BREAK_BYTE + b"two one two"
    phrase, begin, end = phrases_of(texts, 2, backend=backend).locate(text)
    assert [text[a:b].lower() for a, b in sorted(zip(begin.tolist(), end.tolist()))] == [
        b"one, two",
        b"one  two",
        b"one two",
    ]
    assert set(phrase.tolist()) == {0}
    many = b"one two " * 9_000
    assert len(phrases_of(texts, 2, backend=backend).locate(many)[0]) == 9_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_symbols_can_be_words_and_can_be_left_out_of_words(backend):
    kinds = np.full(256, IN_WORD, np.uint8)
    kinds[list(b" ")], kinds[list(b"+=")], kinds[list(b"'.")] = BETWEEN, ALONE, SKIPPED
    texts = [[b"a", b"+", b"bc"], [b"dont", b"+", b"+"]]
    phrases = phrases_of(texts, 3, kinds, backend)
    found = [phrases.search([text])[1].tolist() for text in (b"A+b'c'.", b"a + bc=", b"a bc", b"..don't++", b"a+ b c")]
    assert found == [[0], [0], [], [1], []]
    _, begin, end = phrases.locate(b"x ..don't++ y")
    assert (begin.tolist(), end.tolist()) == ([4], [11])


@pytest.mark.parametrize("backend", BACKENDS)
def test_case_counts_where_it_should(backend):
    for lower, wanted in ((True, 2), (False, 1)):
        phrases = phrases_of([[b"a", b"ninechars"]], 2, backend=backend, lower=lower)
        assert len(phrases.search([b"a ninechars", b"A NineChars", b"@ ninechars"])[0]) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_indexed_and_nothing_searched_find_nothing(backend):
    assert len(phrases_of([[]], 3, backend=backend).search([b"a b c"])[0]) == 0
    phrases = phrases_of([[b"a", b"b"]], 2, backend=backend)
    assert [len(phrases.search(texts)[0]) for texts in ([], [b""], [b"", b"a b", b""])] == [0, 0, 1]


@pytest.mark.skipif(not ngrams.available(), reason="no C compiler")
def test_hits_that_do_not_fit_at_once_are_fetched_in_portions(monkeypatch):
    monkeypatch.setattr(ngrams, "ROOM", 3)
    texts = [[b"%d" % n, b"x", b"%d" % (n + 1)] for n in range(5)]
    phrases = phrases_of(texts, 3)
    written = [b" ".join(b" ".join(text) for text in texts[: number % 6]) for number in range(40)]
    document, phrase = phrases.search(written)
    assert set(zip(document.tolist(), phrase.tolist())) == {(d, p) for d in range(40) for p in range(d % 6)}
    assert len(document) == sum(d % 6 for d in range(40))


@pytest.mark.parametrize("length", [1, 2, 63, 64])
def test_the_longest_phrases_are_found_across_batches(length):
    words = [b"w%d" % n for n in range(700)]
    phrases = phrases_of([words], length)
    document, _ = phrases.search([b" ".join(words), b" ".join(reversed(words))])
    assert int((document == 0).sum()) == 700 - length + 1
    assert int((document == 1).sum()) == (700 if length == 1 else 0)
    with pytest.raises(ValueError, match="phrases have 1 to 64 words, not 65"):
        phrases_of([words], 65)
