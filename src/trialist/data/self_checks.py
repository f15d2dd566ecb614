"""Running sums whose traces check themselves: lines of modular sums, errors that are planted, "W" and a re-computation.

    question  a7b5c9d4?
    trace     b5=2;c9=1;d4=5;                   after 7 come 7+5, 2+9 and 1+4, each modulo 10
              b5=2;c9=3;d4=7;Wb5=2;c9=1;d4=5;   an error planted in the second line, found at the end
    answer    #5

Numbers have names, so that a line finds its number by what it is called. A question may be preceded by a capital that tells how
long its trace is, for models that are asked for a length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WAIT, UNTRAINED, END, ASK, LINE = "W", "H", "#", "?", ";"
"""The string in place of an end, one that no trace has, the end of a trace, of a question, of a line"""
NAMES = "abcdefghijklmnopqrst"
LETTERS = "ABCDEFGIJKLMNOPQRSTU"
CHARACTERS = f"0123456789={LINE}{ASK}{END}{WAIT}{UNTRAINED}{NAMES}{LETTERS}"
SPECIAL = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)


@dataclass(frozen=True)
class Question:
    terms: tuple[int, ...]
    modulus: int = 10

    @property
    def text(self) -> str:
        return "".join(f"{name}{term}" for name, term in zip(NAMES, self.terms)) + ASK

    @property
    def answer(self) -> str:
        return str(sum(self.terms) % self.modulus)


@dataclass(frozen=True)
class SelfChecks:
    """What traces are like. Shares are of all traces."""

    fewest: int = 4
    """Fewest numbers of a sum"""
    most: int = 12
    """Most numbers of a sum"""
    modulus: int = 10
    """Numbers and sums are below it, 2 to 10"""
    planted: float = 0.3
    """Share of traces with an error, and a re-computation behind "W" """
    confirmed: float = 0.1
    """Share of traces without an error that are computed again behind "W", too: it is no proof that something is wrong"""
    named: float = 0.5
    """Share of questions that tell the length of their trace"""
    letter_tokens: int = 16
    """Tokens of a trace by which letters count"""

    def check(self) -> None:
        if not 2 <= self.fewest <= self.most <= len(NAMES):
            raise ValueError(
                f"fewest={self.fewest} and most={self.most}: sums of 2 to {len(NAMES)} numbers, the fewest first"
            )
        if not 2 <= self.modulus <= 10:
            raise ValueError(f"modulus={self.modulus}: 2 to 10, so that a number is one digit")
        if not (
            self.planted >= 0 and self.confirmed >= 0 and self.planted + self.confirmed <= 1 and 0 <= self.named <= 1
        ):
            raise ValueError(
                f"planted={self.planted}, confirmed={self.confirmed}, named={self.named}: shares, the first two at most 1"
            )
        if 2 * self.longest_trace > self.letter_tokens * len(LETTERS):
            raise ValueError(f"most={self.most}: traces are longer than letters can tell; raise letter_tokens")

    @property
    def longest_trace(self) -> int:
        """Tokens of the longest trace without a re-computation."""
        return len("b5=2;") * (self.most - 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest row: beginning, letter, question, trace and re-computation, answer, end."""
        return 2 + (2 * self.most + 1) + (2 * self.longest_trace + 1) + 3

    def letter(self, tokens: int) -> str:
        """How a question tells that its trace has so many tokens."""
        return LETTERS[min(max(tokens - 1, 0) // self.letter_tokens, len(LETTERS) - 1)]

    def question(self, draw: random.Random, terms: int | None = None) -> Question:
        count = draw.randint(self.fewest, self.most) if terms is None else terms
        return Question(tuple(draw.randrange(self.modulus) for _ in range(count)), self.modulus)

    def trace(self, question: Question, draw: random.Random) -> str:
        kind = draw.random()
        if kind < self.planted:
            wrong, by = draw.randrange(len(question.terms) - 1), draw.randrange(1, self.modulus)
            return lines(question, wrong, by) + WAIT + lines(question)
        if kind < self.planted + self.confirmed:
            return lines(question) + WAIT + lines(question)
        return lines(question)

    def row(self, question: Question, draw: random.Random) -> tuple[str, str]:
        """What is given, and what is to be learnt."""
        trace = self.trace(question, draw)
        letter = self.letter(len(trace)) if draw.random() < self.named else ""
        return letter + question.text, trace + END + question.answer


def lines(question: Question, wrong: int | None = None, by: int = 0) -> str:
    """The sums line by line; line `wrong` is off by `by`, and those behind it go on from there."""
    total, found = question.terms[0], []
    for number, term in enumerate(question.terms[1:]):
        total = (total + term + (by if number == wrong else 0)) % question.modulus
        found.append(f"{NAMES[number + 1]}{term}={total}{LINE}")
    return "".join(found)


def answer_of(text: str) -> str | None:
    """The digit behind the first end of a trace; None where there is none."""
    _, end, answer = text.partition(END)
    return answer[0] if end and answer[:1].isdigit() else None


@dataclass(frozen=True)
class SelfCheckBatches:
    """Batches of rows by step; a batch has sums of one length, so that little of it is padding."""

    task: SelfChecks
    batch: int
    seed: int

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, T), padded on the right; the given part has no labels."""
        import torch

        draw = random.Random(f"{self.seed} {step}")
        terms = draw.randint(self.task.fewest, self.task.most)
        rows = [self.task.row(self.task.question(draw, terms), draw) for _ in range(self.batch)]
        encoded = [([BOS, *encode(given)], [*encode(learnt), EOS]) for given, learnt in rows]
        width = max(len(given) + len(learnt) for given, learnt in encoded)
        ids = torch.full((self.batch, width), PAD)
        labels = torch.full((self.batch, width), -100)
        for number, (given, learnt) in enumerate(encoded):
            end = len(given) + len(learnt)
            ids[number, :end] = torch.tensor(given + learnt)
            labels[number, len(given) : end] = torch.tensor(learnt)
        return {"input_ids": ids, "labels": labels}


def questions(task: SelfChecks, count: int, seed: int) -> list[Question]:
    """Different questions, each length equally often as far as the count allows.

    Raises ValueError where there are not that many different ones of the fewest numbers.
    """
    draw = random.Random(seed)
    lengths = [task.fewest + number % (task.most - task.fewest + 1) for number in range(count)]
    wanted, different = lengths.count(task.fewest), task.modulus**task.fewest
    if wanted > different:
        raise ValueError(
            f"{count} questions of {task.fewest} to {task.most} numbers are asked for, {wanted} of them with {task.fewest}, and "
            f"there are {different} such sums below {task.modulus}; raise fewest or modulus, or ask for fewer"
        )
    found: dict[Question, None] = {}
    for terms in lengths:
        while (question := task.question(draw, terms)) in found:
            pass
        found[question] = None
    return list(found)


def encode(text: str) -> list[int]:
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]


def character_tokenizer() -> Any:
    """The tokenizer of this task: one token a character, padding on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *CHARACTERS]
    tokenizer = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL[PAD])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        padding_side="left",
    )
