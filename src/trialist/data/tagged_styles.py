"""A made-up language of four styles, each text under a tag that often, but not always, names its style.

Texts are sentences of six words. Words of a sentence follow each other by chance that is fixed by the seed of the language; two
of the six places hold a word that is typical of a style. Which style a text has can be read off these words, exactly, and how
fluent it is off a trigram model of other texts without tags.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
IGNORED = -100


@dataclass(frozen=True)
class StyleLanguage:
    """seed: of the language. noise: share of texts whose style is another than the tag says; 0.75 makes tags mean nothing."""

    seed: int
    noise: float = 0.35
    untagged: float = 0.2
    """Share of training texts without a tag, so that a model knows what there is without one"""
    typical: float = 0.85
    """Share of style words that are of the text's own style"""
    ends: float = 0.3
    """Share of sentences after which a text ends"""
    styles: ClassVar[int] = 4
    roles: ClassVar[int] = 6
    words: ClassVar[int] = 12
    """Words of each role"""
    styled: ClassVar[tuple[int, ...]] = (1, 4)
    """Roles whose words belong to styles"""
    sentences: ClassVar[int] = 6
    """At most, in a text"""
    sharpness: ClassVar[float] = 1.5

    @property
    def first_word(self) -> int:
        return EOS + 1 + self.styles

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        return self.first_word + self.roles * self.words

    @property
    def longest(self) -> int:
        """Tokens of a text at most, the first token, the tag and the end included."""
        return self.sentences * self.roles + 3

    def tag(self, style: int) -> int:
        return EOS + 1 + style

    @functools.cached_property
    def affinity(self) -> np.ndarray:
        """How well words follow each other: `(words in all, words of the next role)`."""
        generator = np.random.default_rng([self.seed, 1])
        return self.sharpness * generator.standard_normal((self.roles * self.words, self.words))

    def draw(self, count: int, seed: int | Sequence[int]) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """`count` texts as token ids up to the end token, their styles, and the tags (as styles) that they stand under."""
        generator = np.random.default_rng(seed)
        tags = generator.integers(self.styles, size=count)
        others = (tags + generator.integers(1, self.styles, size=count)) % self.styles
        styles = np.where(generator.random(count) < self.noise, others, tags)
        length = self.sentences * self.roles
        drawn = np.empty((count, length), dtype=np.int64)
        previous = (
            generator.integers(self.words, size=count) + (self.roles - 1) * self.words
        )  # as if a sentence had ended
        for place in range(length):
            role = place % self.roles
            score = self.affinity[previous] + generator.gumbel(size=(count, self.words))
            if role in self.styled:
                score[self._other_words(styles, generator)] = -np.inf
            previous = score.argmax(1) + role * self.words
            drawn[:, place] = previous
        ended = generator.random((count, self.sentences)) < self.ends
        ended[:, -1] = True
        lengths = (ended.argmax(1) + 1) * self.roles
        texts = [[*(row[:n] + self.first_word).tolist(), EOS] for row, n in zip(drawn, lengths)]
        return texts, styles, tags

    def _other_words(self, styles: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Which words of a style role cannot stand here, `(texts, words)`: all but those of one style, mostly the text's."""
        strange = generator.random(len(styles)) >= self.typical
        shown = np.where(strange, (styles + generator.integers(1, self.styles, size=len(styles))) % self.styles, styles)
        return np.arange(self.words)[None] // (self.words // self.styles) != shown[:, None]

    def batch(self, rows: int, seed: int, step: int) -> dict[str, Tensor]:
        """Training texts, padded on the right; neither the first token nor the tag is predicted."""
        texts, _, tags = self.draw(rows, [seed, step])
        kept = np.random.default_rng([seed, step, 1]).random(rows) >= self.untagged
        heads = [[BOS, *([self.tag(tag)] if tagged else [])] for tag, tagged in zip(tags.tolist(), kept)]
        T = max(len(head) + len(text) for head, text in zip(heads, texts))
        batch = {name: torch.zeros(rows, T, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
        batch["labels"] += IGNORED
        for row, (head, text) in enumerate(zip(heads, texts)):
            end = len(head) + len(text)
            batch["input_ids"][row, :end] = torch.tensor(head + text)
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, len(head) : end] = torch.tensor(text)
        return batch

    def adherence(self, text: Sequence[int], style: int) -> float:
        """1 where the style is the likeliest one for the words of a text, a share where several are, 0 where it is not; 0 for a
        text without any style word."""
        words = np.asarray(text, dtype=np.int64) - self.first_word
        words = words[(words >= 0) & np.isin(words // self.words, self.styled)]
        counts = np.bincount(words % self.words // (self.words // self.styles), minlength=self.styles)
        likeliest = counts == counts.max()
        return float(likeliest[style] / likeliest.sum()) if len(words) else 0.0


class Trigrams:
    """Log-probabilities of texts by counts of three tokens, mixed with those of two, of one, and with an even spread."""

    WEIGHTS = (0.7, 0.2, 0.09, 0.01)

    def __init__(self, texts: Sequence[Sequence[int]], size: int) -> None:
        self.size = size
        self.counts = np.zeros((size, size, size))
        for a, b, c in (triple for text in texts for triple in _triples(text)):
            self.counts[a, b, c] += 1
        self.pairs = self.counts.sum(0)

    def score(self, text: Sequence[int]) -> float:
        """Log-probability in nats of all tokens of a text."""
        total = 0.0
        for a, b, c in _triples(text):
            three, two, one = self.counts[a, b], self.pairs[b], self.pairs.sum(0)
            parts = [counts[c] / counts.sum() if counts.sum() else 1 / self.size for counts in (three, two, one)]
            total += float(np.log(np.dot(self.WEIGHTS, [*parts, 1 / self.size])))
        return total


def _triples(text: Sequence[int]) -> list[tuple[int, int, int]]:
    padded = [BOS, BOS, *text]
    return list(zip(padded, padded[1:], padded[2:]))
