"""Questions whose answers a program can check: rows of a prompt and a number, the verifier, and the reward it gives.

The verifier is that of the Tulu 3 recipe for grade-school mathematics (arXiv 2411.15124): the last signed number of the
completion, commas removed, must equal the answer as a string. Departure: a comma is removed only where it groups thousands,
so that `(3,4)` ends with 4 and not with 34; and a sign behind a digit or a closing bracket is an operation, so that `10-7`
ends with 7 and not with -7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trialist.data.corpora import load_rows, parse_columns

ARITHMETIC = "arithmetic"
"""Name of the rows that are generated: sums and differences of two numbers below 100"""
ARITHMETIC_ROWS, ARITHMETIC_SEED = 2_000, 0
GROUPING = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"(?:(?<![\d)\]])[-+])?(?:\d+(?:\.\d+)?|\.\d+)")
SOLUTION = "####"
"""Stands before the answer at the end of a worked solution, as in GSM8K"""


def last_number(text: str) -> str | None:
    """The last signed number of a text, without commas and a leading plus; None where there is none.

    `1,234` is 1234, `-3` is -3, the full stop of `3.` is none of the number, `3.50` stays as it is.
    """
    found = NUMBER.findall(GROUPING.sub("", text))
    return found[-1].removeprefix("+") if found else None


def verified(completion: str, answer: str) -> bool:
    """Whether the last number of the completion is the answer, letter for letter. An answer's own commas do not count."""
    return last_number(completion) == last_number(answer) is not None


def rewards(
    completions: Sequence[str], answers: Sequence[str], ended: Sequence[bool], *, accepted: float, unfinished: float
) -> list[float]:
    """`accepted` for each completion with the right answer and 0 for any other; `unfinished` where it has not ended."""
    return [
        (accepted if verified(completion, answer) else 0.0) if whole else unfinished
        for completion, answer, whole in zip(completions, answers, ended, strict=True)
    ]


def read_verifiable(
    data: str, *, columns: str = "", split: str | None = None, max_examples: int | None = None
) -> list[dict[str, Any]]:
    """Rows with `prompt` (a string, or a list of messages) and `answer` (a number, as the verifier reads it).

    data: `arithmetic`, or what `load_rows` takes. columns: our columns under other names, `prompt=question`. Of an answer
    that is a worked solution, what follows its last `####` counts.
    Raises ValueError that names the row: without a number in its answer, with an empty prompt, or messages that
    are broken or end with the assistant; and the errors of `load_rows`.
    """
    if data == ARITHMETIC:
        return arithmetic(ARITHMETIC_ROWS if max_examples is None else max_examples, ARITHMETIC_SEED)
    rows = load_rows(
        data, required=("prompt", "answer"), columns=parse_columns(columns), split=split, max_examples=max_examples
    )
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        prompt, place = row["prompt"], f"{data} row {number}"
        _check_prompt(prompt, place)
        answer = last_number(str(row["answer"]).rpartition(SOLUTION)[2])
        if answer is None:
            raise ValueError(
                f"{place}: no number in 'answer' {str(row['answer'])[-40:]!r}, so nothing could be verified; drop the row, or "
                "name the column with columns answer=..."
            )
        found.append({"prompt": prompt, "answer": answer})
    return found


def arithmetic(count: int, seed: int, largest: int = 99) -> list[dict[str, Any]]:
    """Sums and differences of two numbers from 0 to `largest`, as questions: rows of `prompt` and `answer`."""
    generator = np.random.default_rng(seed)
    numbers = generator.integers(largest + 1, size=(count, 2)).tolist()
    minus = generator.integers(2, size=count).tolist()
    return [
        {"prompt": f"What is {a} {'-' if m else '+'} {b}?", "answer": str(a - b if m else a + b)}
        for (a, b), m in zip(numbers, minus, strict=True)
    ]


def _check_prompt(prompt: Any, place: str) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{place}: 'prompt' is empty")
        return
    messages = isinstance(prompt, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in prompt
    )
    if not messages or not prompt:
        raise ValueError(
            f"{place}: 'prompt' must be a string, or a list of messages with role and content; it is {prompt!r:.80}"
        )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(f"{place}: 'prompt' ends with the assistant's turn; it must end before the answer")
