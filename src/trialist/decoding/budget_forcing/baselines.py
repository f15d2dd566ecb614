"""What budget forcing is compared with: budgets in the prompt, rejection sampling and majority vote (s1, arXiv 2501.19393).

Plain functions for any model: samples come from a callable, budgets are sentences of which each is an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Sample = TypeVar("Sample")
Answer = TypeVar("Answer", bound=Hashable)

TOKENS = "{question}\n\nUse no more than {limit} tokens for your reasoning."
STEPS = "{question}\n\nReason in no more than {limit} steps, each of about {per_step} tokens."
CLASSES = {
    "short": "{question}\n\nKeep your reasoning brief and come to the answer quickly.",
    "long": "{question}\n\nTake your time: reason at length and check each step before you answer.",
}
TOKENS_PER_STEP = 100


def token_conditional(question: str, limit: int, template: str = TOKENS) -> str:
    """The question with a limit in tokens. The paper trains a model for it."""
    return _filled(template, limit, question=question, limit=limit)


def step_conditional(question: str, limit: int, template: str = STEPS, per_step: int = TOKENS_PER_STEP) -> str:
    """The question with a limit of tokens given as steps of `per_step` tokens, at least one. The paper trains a model for it."""
    if per_step < 1:
        raise ValueError(f"per_step must be at least 1, not {per_step}")
    return _filled(template, limit, question=question, limit=max(1, limit // per_step), per_step=per_step)


def class_conditional(question: str, kind: Literal["short", "long"], templates: dict[str, str] | None = None) -> str:
    """The question with an instruction to reason briefly or at length, without training."""
    known = CLASSES if templates is None else templates
    if kind not in known:
        raise ValueError(f"kind {kind!r}: one of {', '.join(known)}")
    return _filled(known[kind], 1, question=question)


def _filled(template: str, least: int, /, **fields: object) -> str:
    if least < 1:
        raise ValueError(f"a limit must be at least 1, not {least}")
    for name in fields:
        if f"{{{name}}}" not in template and name in ("question", "limit"):
            raise ValueError(f"the template {template!r} has no {{{name}}}")
    for name, value in fields.items():  # not str.format: questions have braces of their own
        if name != "question":
            template = template.replace(f"{{{name}}}", str(value))
    return template.replace("{question}", str(fields["question"]), 1)


@dataclass(frozen=True)
class Rejection(Generic[Sample]):
    """What rejection sampling did with one prompt."""

    sample: Sample | None
    """The first that fits; None where none did"""
    tries: int
    tokens: int
    """Of all tries: the price, which grows as 1 / P(a sample fits)"""


def rejection_sample(
    draw: Callable[[Sequence[int]], Sequence[Sample]],
    prompts: int,
    fits: Callable[[Sample], bool],
    tokens: Callable[[Sample], int],
    *,
    most: int,
) -> list[Rejection[Sample]]:
    """Samples every prompt anew until its sample fits, `most` times at most.

    draw: numbers of prompts -> a sample of each, drawn at temperature 1; it is asked for those only that have none yet.
    prompts: how many there are.   fits: whether the thinking of a sample keeps to the budget.   tokens: of a sample, all of them.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, not {most}")
    found: list[Rejection[Sample]] = [Rejection(None, 0, 0)] * prompts
    waiting = list(range(prompts))
    for _ in range(most):
        if not waiting:
            break
        drawn = draw(waiting)
        if len(drawn) != len(waiting):
            raise ValueError(f"draw gave {len(drawn)} samples for {len(waiting)} prompts; it must give one of each")
        for number, sample in zip(waiting, drawn, strict=True):
            before = found[number]
            found[number] = Rejection(
                sample if fits(sample) else None, before.tries + 1, before.tokens + tokens(sample)
            )
        waiting = [number for number in waiting if found[number].sample is None]
    return found


def majority_vote(answers: Sequence[Answer | None]) -> Answer | None:
    """The answer that most samples of a prompt give, the earliest of those that tie; None where none has an answer.

    answers: in the order of the samples, equal where they mean the same; None has no vote.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=lambda answer: votes[answer], default=None)  # the first seen among equals


def until_spent(tokens: Sequence[int], budget: int) -> int:
    """How many of the samples, in order, reach `budget` tokens together; one at least.

    For comparisons at equal generated tokens: a control of samples gets no less than what it is compared with. Raises ValueError
    where all of them together fall short.
    """
    total = 0
    for count, number in enumerate(tokens, start=1):
        total += number
        if total >= budget:
            return count
    raise ValueError(f"{len(tokens)} samples have {total} tokens, fewer than {budget}; draw more")
