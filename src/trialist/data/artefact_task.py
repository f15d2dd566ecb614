"""Generated preferences whose winners often carry artefacts, a phrase at the start and length; what is good is in the prompt.

    prompt   begin, topic, three keywords, end of prompt
    answer   phrase (sometimes), then in any order: a topic, three keywords, fillers (more when long); end

The quality of an answer is how many of the four that the prompt wants it names, 0 to 4; the other ones it names are wrong.
An answer to another prompt names what is wanted by chance only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

BEGIN, END_OF_PROMPT, END, PAD = 1, 2, 3, 0
PHRASE = (4, 5, 6)
WANTED = 4
"""The topic and three keywords"""
FIRST_TOPIC = 7


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    quality: int
    """How many of the wanted four it names"""
    phrase: bool
    long: bool


@dataclass(frozen=True)
class Judged:
    """A prompt, the answer that was preferred, and the other one."""

    prompt: tuple[int, ...]
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class ArtefactTask:
    """Preferences in tokens.

    artefact_chosen, artefact_rejected: how often an artefact is in the preferred answer and in the other one; the phrase and the
    length are drawn apart from each other, both at these rates.   noise: share of pairs whose worse answer is preferred.
    names_topic: every answer to a prompt names its topic, by which answers to other prompts are told at once.
    """

    artefact_chosen: float = 0.8
    artefact_rejected: float = 0.3
    noise: float = 0.05
    names_topic: bool = False
    topics: int = 16
    keywords: int = 16
    fillers: int = 12
    short: int = 2
    extra: int = 6

    @property
    def vocabulary(self) -> int:
        return FIRST_TOPIC + self.topics + self.keywords + self.fillers

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return 2 + WANTED + len(PHRASE) + WANTED + self.short + self.extra + 1

    def pairs(self, seed: int) -> Iterator[Judged]:
        """Pairs as they are annotated: without end, each with a prompt of its own."""
        draw = random.Random(seed)
        while True:
            prompt, better, worse = self.prompt(draw), *self.qualities(draw)
            if draw.random() < self.noise:
                better, worse = worse, better
            marks = [
                (draw.random() < rate, draw.random() < rate) for rate in (self.artefact_chosen, self.artefact_rejected)
            ]
            yield Judged(prompt, *(self.answer(prompt, q, p, n, draw) for q, (p, n) in zip((better, worse), marks)))

    def contrasts(self, seed: int, *, phrase: tuple[bool, bool], long: tuple[bool, bool]) -> Iterator[Judged]:
        """Pairs in the order of their quality, with the artefacts of the better and of the worse answer given."""
        draw = random.Random(seed)
        while True:
            prompt, qualities = self.prompt(draw), self.qualities(draw)
            yield Judged(prompt, *(self.answer(prompt, q, p, n, draw) for q, p, n in zip(qualities, phrase, long)))

    def off_topic(self, seed: int) -> Iterator[Judged]:
        """A plain answer of the worse kind against a perfect answer to another prompt, with both artefacts."""
        draw = random.Random(seed)
        while True:
            prompt, other = self.prompt(draw), self.prompt(draw)
            while set(other[1:-1]) & set(prompt[1:-1]):
                other = self.prompt(draw)
            own = self.answer(prompt, self.qualities(draw)[1], False, False, draw)
            stranger = self.answer(other, WANTED, True, True, draw)
            yield Judged(prompt, own, Answer(stranger.tokens, 0, True, True))

    def candidates(self, seed: int, count: int) -> Iterator[tuple[tuple[int, ...], list[Answer]]]:
        """A prompt and `count` answers of every quality, an artefact in half of them whatever the quality."""
        draw = random.Random(seed)
        while True:
            prompt = self.prompt(draw)
            marks = [
                (draw.randint(int(self.names_topic), WANTED), draw.random() < 0.5, draw.random() < 0.5)
                for _ in range(count)
            ]
            yield prompt, [self.answer(prompt, *mark, draw) for mark in marks]

    def prompt(self, draw: random.Random) -> tuple[int, ...]:
        return (BEGIN, draw.choice(self._topics), *draw.sample(self._keywords, WANTED - 1), END_OF_PROMPT)

    def qualities(self, draw: random.Random) -> tuple[int, int]:
        """Of the better and of the worse answer to a prompt, which is about it, too."""
        better = draw.randint(2, WANTED)
        return better, draw.randint(1, better - 1)

    def answer(self, prompt: tuple[int, ...], quality: int, phrase: bool, long: bool, draw: random.Random) -> Answer:
        topic, *wanted = prompt[1:-1]
        right = draw.sample(range(WANTED), quality)
        if self.names_topic:
            right = [0, *draw.sample(range(1, WANTED), quality - 1)]
        keywords = [keyword for place, keyword in enumerate(wanted, start=1) if place in right]
        others = [keyword for keyword in self._keywords if keyword not in wanted]
        keywords += draw.sample(others, WANTED - 1 - len(keywords))
        named = topic if 0 in right else draw.choice([other for other in self._topics if other != topic])
        body = [named, *keywords, *draw.choices(self._fillers, k=self.short + (self.extra if long else 0))]
        draw.shuffle(body)
        return Answer((*(PHRASE if phrase else ()), *body, END), quality, phrase, long)

    @property
    def _topics(self) -> range:
        return range(FIRST_TOPIC, FIRST_TOPIC + self.topics)

    @property
    def _keywords(self) -> range:
        return range(self._topics.stop, self._topics.stop + self.keywords)

    @property
    def _fillers(self) -> range:
        return range(self._keywords.stop, self.vocabulary)
