"""Where n-grams stand in a training row, and the piece of the row around the longest match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trialist.data.overlap import OverlapIndex
from trialist.data.words import Span, TokenWords
from trialist.kernels.ngrams import BREAK_BYTE

AROUND = 160
"""Characters shown on both sides of a match"""
MOST = 800
"""Characters of a match that are shown"""
LONG = 20_000
"""From this length on, texts whose Unicode form was changed are shown in the form that was compared"""


@dataclass(frozen=True)
class Excerpt:
    """A piece of a training row and which of its characters match."""

    text: str
    marks: tuple[Span, ...]
    cut: tuple[bool, bool] = (False, False)
    """Whether the text goes on before and behind"""


def excerpt_of(index: OverlapIndex, texts: Sequence[str], phrases: np.ndarray) -> Excerpt:
    """The surroundings of the longest run of these n-grams in a row."""
    turn, spans = max(
        located(index, texts, phrases).items(), key=lambda found: max(end - begin for begin, end in found[1])
    )
    text = texts[turn]
    if isinstance(index.words, TokenWords):
        pass
    elif len(text) <= LONG or text.isascii():
        spans = index.words.as_written(text, spans)
    else:
        text = index.words.normalise(text)
    begin, end = max(spans, key=lambda span: span[1] - span[0])
    first, behind = max(0, begin - AROUND), min(len(text), min(end, begin + MOST) + AROUND)
    marks = [
        (max(begin, first) - first, min(end, behind) - first) for begin, end in spans if end > first and begin < behind
    ]
    return Excerpt(text[first:behind], tuple(marks), (first > 0, behind < len(text)))


def located(index: OverlapIndex, texts: Sequence[str], phrases: np.ndarray) -> dict[int, list[Span]]:
    """Text of a row -> the runs of characters that these n-grams cover in it, of `normalise(text)` where words are not tokens."""
    if isinstance(index.words, TokenWords):
        words = [index.words.spans(text) for text in texts]
        sizes = [len(spans) + 1 for spans in words]
        (numbers,) = index.words.numbered([texts], index.number_of)
        found = index.phrases.locate(numbers)
    else:
        pieces = [index.words.encode([text]) for text in texts]
        sizes = [len(piece) + 1 for piece in pieces]
        found = index.phrases.locate(BREAK_BYTE.join(pieces))
    kept = np.isin(found[0], phrases)
    begins, ends = found[1][kept], found[2][kept]
    offsets = np.cumsum([0, *sizes])
    turns: dict[int, list[Span]] = {}
    for at in np.lexsort((ends, begins)).tolist():
        turn = int(np.searchsorted(offsets, begins[at], "right")) - 1
        begin, end = int(begins[at] - offsets[turn]), int(ends[at] - offsets[turn])
        if isinstance(index.words, TokenWords):
            begin, end = words[turn][begin][0], words[turn][end - 1][1]
        elif not texts[turn].isascii():
            begin, end = (len(pieces[turn][:byte].decode("utf-8", "surrogatepass")) for byte in (begin, end))
        runs = turns.setdefault(turn, [])
        if runs and begin <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((begin, end))
    return turns
