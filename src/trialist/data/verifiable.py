"""Questions whose answers a program can check: rows of a prompt, an answer and a verifier, and the reward it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trialist.data.corpora import load_rows, parse_columns
from trialist.data.verifiers import load_verifier

ARITHMETIC = "arithmetic"
"""Name of the rows that are generated: sums and differences of two numbers below 100"""
ARITHMETIC_ROWS, ARITHMETIC_SEED = 2_000, 0


def rewards(
    completions: Sequence[str],
    answers: Sequence[str],
    verifiers: Sequence[str],
    ended: Sequence[bool],
    *,
    accepted: float,
    unfinished: float,
) -> list[float]:
    """`accepted` for each completion that its verifier accepts and 0 for any other; `unfinished` where it has not ended."""
    return [
        (accepted if load_verifier(name).accepts(completion, answer) else 0.0) if whole else unfinished
        for completion, answer, name, whole in zip(completions, answers, verifiers, ended, strict=True)
    ]


def read_verifiable(
    data: str,
    *,
    columns: str = "",
    split: str | None = None,
    max_examples: int | None = None,
    verifier: str = "number",
) -> list[dict[str, Any]]:
    """Rows with `prompt` (a string, or a list of messages), `answer` (as the verifier reads it) and `verifier` (its name).

    data: `arithmetic`, or what `load_rows` takes. columns: our columns under other names, `prompt=question`. verifier: what
    `load_verifier` takes, for rows whose own column `verifier` names none.
    Raises ValueError that names the row: with an answer that the verifier cannot read, an empty prompt, or messages that
    are broken or end with the assistant; and the errors of `load_rows` and `load_verifier`.
    """
    if data == ARITHMETIC:
        count = ARITHMETIC_ROWS if max_examples is None else max_examples
        return [{**row, "verifier": "number"} for row in arithmetic(count, ARITHMETIC_SEED)]
    load_verifier(verifier)
    rows = load_rows(
        data, required=("prompt", "answer"), columns=parse_columns(columns), split=split, max_examples=max_examples
    )
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        prompt, place = row["prompt"], f"{data} row {number}"
        _check_prompt(prompt, place)
        name = row.get("verifier") or verifier
        try:
            answer = load_verifier(name).read(row["answer"])
        except ValueError as error:
            raise ValueError(
                f"{place}: 'answer' cannot be verified: {error}; drop the row, name the column with columns answer=..., or take "
                f"another verifier than {name}"
            ) from error
        found.append({"prompt": prompt, "answer": answer, "verifier": name})
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
