"""Generated preferences whose winners often carry artefacts, a phrase at the start and length; what is good is in the prompt.

    prompt   begin, side, topic, three keywords, end of prompt
    answer   phrase (sometimes), then in any order: a topic, three keywords, three statements, fillers (more when long); end

The quality of an answer has two parts:

- `relevance`, 0 to 4: how many of the four words that the prompt wants it names; the other ones it names are wrong. An answer to
  another prompt names what is wanted by chance only.
- `correctness`, 0 to 3: how many of its statements are on the prompt's side, of which there are two. Answers to other prompts
  are as often right as answers to this one, so a comparison with them tells nothing of it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

BEGIN, END_OF_PROMPT, END, PAD = 1, 2, 3, 0
PHRASE = (4, 5, 6)
SIDES = (7, 8)
WANTED = 4
"""The topic and three keywords"""
STATEMENTS = 3
FIRST_STATEMENT = 9
QUALITIES = tuple(itertools.product(range(1, WANTED + 1), range(STATEMENTS + 1)))
"""(relevance, correctness) of answers to a prompt, all equally frequent"""
Part = Literal["relevance", "correctness"]


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    relevance: int
    """How many of the wanted four it names"""
    correctness: int
    """How many of its three statements are on the prompt's side"""
    phrase: bool
    long: bool

    @property
    def quality(self) -> int:
        return self.relevance + self.correctness


@dataclass(frozen=True)
class Judged:
    """A prompt, the answer that was preferred, and the other one."""

    prompt: tuple[int, ...]
    chosen: Answer
    rejected: Answer
    mislabelled: bool = False
    """Whether the preferred answer is the worse one"""


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
    statements: int = 4
    """Different statements on each side"""
    fillers: int = 12
    short: int = 2
    extra: int = 6

    @property
    def vocabulary(self) -> int:
        return FIRST_STATEMENT + 2 * self.statements + self.topics + self.keywords + self.fillers

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return 3 + WANTED + len(PHRASE) + WANTED + STATEMENTS + self.short + self.extra + 1

    def pairs(self, seed: int) -> Iterator[Judged]:
        """Pairs as they are annotated: without end, each with a prompt of its own.

        The better answer has the higher quality, or at equal quality the higher correctness. The two parts of the quality are
        independent over the answers to a prompt, and `correctness` is symmetric about its mean, whichever the side.
        """
        draw = random.Random(seed)
        while True:
            prompt = self.prompt(draw)
            worse, better = sorted(draw.sample(QUALITIES, 2), key=lambda parts: (sum(parts), parts[1]))
            mislabelled = draw.random() < self.noise
            marks = [
                (draw.random() < rate, draw.random() < rate) for rate in (self.artefact_chosen, self.artefact_rejected)
            ]
            order = (worse, better) if mislabelled else (better, worse)
            chosen, rejected = (self.answer(prompt, *parts, *mark, draw) for parts, mark in zip(order, marks))
            yield Judged(prompt, chosen, rejected, mislabelled)

    def contrasts(
        self,
        seed: int,
        part: Part,
        *,
        phrase: tuple[bool, bool] = (False, False),
        long: tuple[bool, bool] = (False, False),
    ) -> Iterator[Judged]:
        """Pairs whose better answer is better in `part` and equal in the other one, with the artefacts of both given.

        With one seed pair n has the same prompt and qualities whatever the artefacts.
        """
        for number in itertools.count():
            draw = random.Random(f"{seed} {number}")
            prompt = self.prompt(draw)
            relevance, correctness = draw.choice(QUALITIES)
            if part == "relevance":
                worse, better = sorted(draw.sample(range(1, WANTED + 1), 2))
                parts = [(better, correctness), (worse, correctness)]
            else:
                worse, better = sorted(draw.sample(range(STATEMENTS + 1), 2))
                parts = [(relevance, better), (relevance, worse)]
            chosen, rejected = (self.answer(prompt, *own, p, n, draw) for own, p, n in zip(parts, phrase, long))
            yield Judged(prompt, chosen, rejected)

    def off_topic(self, seed: int) -> Iterator[Judged]:
        """A plain answer that is at least half on topic, against an answer of that correctness to another prompt, with both
        artefacts."""
        draw = random.Random(seed)
        while True:
            prompt, other = self.prompt(draw), self.prompt(draw)
            while set(other[2:-1]) & set(prompt[2:-1]):
                other = self.prompt(draw)
            relevance, correctness = draw.randint(WANTED // 2, WANTED), draw.randint(0, STATEMENTS)
            own = self.answer(prompt, relevance, correctness, False, False, draw)
            asked = (BEGIN, prompt[1], *other[2:])  # the statements are on the side of the prompt they are compared for
            stranger = self.answer(asked, WANTED, correctness, True, True, draw)
            yield Judged(prompt, own, Answer(stranger.tokens, 0, correctness, True, True))

    def candidates(self, seed: int, count: int) -> Iterator[tuple[tuple[int, ...], list[Answer]]]:
        """A prompt and `count` answers of every quality, an artefact in half of them whatever the quality."""
        draw = random.Random(seed)
        while True:
            prompt = self.prompt(draw)
            marks = [(*draw.choice(QUALITIES), draw.random() < 0.5, draw.random() < 0.5) for _ in range(count)]
            yield prompt, [self.answer(prompt, *mark, draw) for mark in marks]

    def prompt(self, draw: random.Random) -> tuple[int, ...]:
        words = draw.choice(self._topics), *draw.sample(self._keywords, WANTED - 1)
        return (BEGIN, draw.choice(SIDES), *words, END_OF_PROMPT)

    def answer(
        self, prompt: tuple[int, ...], relevance: int, correctness: int, phrase: bool, long: bool, draw: random.Random
    ) -> Answer:
        side, topic, *wanted = prompt[1:-1]
        named = draw.sample(range(WANTED), relevance)
        if self.names_topic:
            named = [0, *draw.sample(range(1, WANTED), relevance - 1)]
        keywords = [keyword for place, keyword in enumerate(wanted, start=1) if place in named]
        others = [keyword for keyword in self._keywords if keyword not in wanted]
        keywords += draw.sample(others, WANTED - 1 - len(keywords))
        about = topic if 0 in named else draw.choice([other for other in self._topics if other != topic])
        right, wrong = self.sides if side == SIDES[0] else self.sides[::-1]
        said = [*draw.choices(right, k=correctness), *draw.choices(wrong, k=STATEMENTS - correctness)]
        body = [about, *keywords, *said, *draw.choices(self._fillers, k=self.short + (self.extra if long else 0))]
        draw.shuffle(body)
        return Answer((*(PHRASE if phrase else ()), *body, END), relevance, correctness, phrase, long)

    @property
    def sides(self) -> tuple[range, range]:
        """The statements that are right for prompts of the first side, and those for prompts of the second."""
        middle = FIRST_STATEMENT + self.statements
        return range(FIRST_STATEMENT, middle), range(middle, middle + self.statements)

    @property
    def _topics(self) -> range:
        first = FIRST_STATEMENT + 2 * self.statements
        return range(first, first + self.topics)

    @property
    def _keywords(self) -> range:
        return range(self._topics.stop, self._topics.stop + self.keywords)

    @property
    def _fillers(self) -> range:
        return range(self._keywords.stop, self.vocabulary)
