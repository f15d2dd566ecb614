"""Copies of test items as they stand in training data: word for word, and edited in ways that hide them from a search.

An item is one text, or a question with its answer. Edits change the question; of the answer they change numbers alone, and
these as in the question.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Texts = tuple[str, ...]

MARK = re.compile(r"[,.;:!?](?=\s|$)")
MARKS = ("", ",", ".", ";", ":", "!", "?")
CASES = (str.lower, str.upper, str.title)
NUMBERS = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "twenty", "thirty", "hundred",
)  # fmt: skip
NUMBER = re.compile(rf"\d+|\b(?:{'|'.join(NUMBERS)})\b")
WORD = re.compile(r"\S+\s*")
REWORDED = {
    "how many": "what number of", "how much": "what amount of", "in total": "all together", "at the end": "finally",
    "as well as": "and also", "there are": "one finds", "there is": "one finds", "the": "this", "a": "one", "an": "one",
    "and": "plus", "or": "or else", "but": "though", "if": "in case", "when": "whenever", "then": "after that", "each": "every",
    "all": "the whole of", "some": "a few", "many": "a lot of", "more than": "over", "less than": "under", "of": "out of",
    "in": "within", "on": "upon", "at": "around", "for": "on behalf of", "from": "out from", "with": "along with",
    "to": "so as to", "by": "through", "is": "happens to be", "are": "happen to be", "was": "had been", "were": "had been",
    "has": "owns", "have": "own", "had": "owned", "not": "in no way", "can": "is able to", "will": "is going to",
    "does": "do", "do": "really do", "he": "this man", "she": "this woman", "they": "these people", "it": "that thing",
    "his": "this man's", "her": "this woman's", "their": "these people's", "that": "which", "this": "the present",
    "buys": "purchases", "bought": "purchased", "gives": "hands over", "gave": "handed over", "makes": "produces",
    "made": "produced", "costs": "is priced at", "needs": "requires", "get": "obtain", "gets": "obtains", "use": "employ",
    "used": "employed", "return": "give back", "returns": "gives back", "raise": "throw", "same": "identical",
}  # fmt: skip
"""Phrases, in small letters, and what a template puts in their place"""
PHRASE = re.compile(rf"\b(?:{'|'.join(sorted(REWORDED, key=len, reverse=True))})\b", re.IGNORECASE)


def verbatim(texts: Texts, draw: np.random.Generator) -> Texts:
    return texts


def restyled(texts: Texts, draw: np.random.Generator) -> Texts:
    """In other letters, and with other punctuation behind the words or none."""
    question = CASES[draw.integers(len(CASES))](texts[0])
    return MARK.sub(lambda mark: MARKS[draw.integers(len(MARKS))], question), *texts[1:]


def numbers_swapped(texts: Texts, draw: np.random.Generator) -> Texts:
    """Every number is another one of as many digits, the same wherever it stands."""
    swaps: dict[str, str] = {}

    def swap(found: re.Match[str]) -> str:
        number = found[0]
        while swaps.setdefault(number, number) == number:
            if number.isdigit():
                digits = [draw.integers(1, 10), *draw.integers(10, size=len(number) - 1)]
                swaps[number] = "".join(map(str, digits))
            else:
                swaps[number] = NUMBERS[draw.integers(len(NUMBERS))]
        return swaps[number]

    return tuple(NUMBER.sub(swap, text) for text in texts)


def reworded(texts: Texts, draw: np.random.Generator) -> Texts:
    """Frequent words and phrases by others of about their meaning, as a template does it."""

    def other(found: re.Match[str]) -> str:
        words = REWORDED[found[0].lower()]
        return words.capitalize() if found[0][0].isupper() else words

    return PHRASE.sub(other, texts[0]), *texts[1:]


def dropped(texts: Texts, draw: np.random.Generator, *, share: float) -> Texts:
    """Without this share of the words, drawn at random."""
    words = WORD.findall(texts[0])
    return "".join(word for word, chance in zip(words, draw.random(len(words))) if chance >= share), *texts[1:]


EDITS: dict[str, Callable[[Texts, np.random.Generator], Texts]] = {
    "verbatim": verbatim,
    "restyled": restyled,
    "numbers swapped": numbers_swapped,
    "5 % dropped": functools.partial(dropped, share=0.05),
    "15 % dropped": functools.partial(dropped, share=0.15),
    "30 % dropped": functools.partial(dropped, share=0.30),
    "reworded": reworded,
}


def copies_of(items: Sequence[Texts], edits: Sequence[str], copies: int, draw: np.random.Generator) -> list[Texts]:
    """So many copies of each item, the edits in turn."""
    return [EDITS[edits[number % len(edits)]](item, draw) for item in items for number in range(copies)]
