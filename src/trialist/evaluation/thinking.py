"""How well a method of test-time scaling keeps to its budgets and what it gains by them (s1, arXiv 2501.19393), and repetition.

With A the evaluations of one method at different budgets, a the thinking tokens that one really took, f(a) its accuracy:

    Control     = 1 / |A| * sum over a of 1[a_min <= a <= a_max]
    Scaling     = 1 / C(|A|, 2) * sum over pairs b > a of (f(b) - f(a)) / (b - a)
    Performance = max over a of f(a)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PER = 1000
"""Tokens by which Scaling is counted; the scale of the paper's table is not known"""


@dataclass(frozen=True)
class ThinkingMetrics:
    """What one method reaches over its budgets."""

    control: float
    """Share of evaluations within their limits"""
    scaling: float | None
    """Mean slope over pairs, accuracy gained per 1,000 thinking tokens; None where no pair differs in tokens"""
    performance: float
    """The best accuracy"""
    evaluations: int
    skipped_pairs: int
    """Pairs of equal tokens, which have no slope and are left out of Scaling, out of its number of pairs too"""


def thinking_metrics(records: Iterable[Mapping[str, Any]]) -> ThinkingMetrics:
    """Control, Scaling and Performance.

    records: an evaluation each: `tokens`, mean thinking tokens; `accuracy`, in [0, 1]; `maximum` and `minimum`, its limits, where
        it has them (an evaluation without limits is within them). `evaluations` makes them of rows of items.
    Raises ValueError for no records, and for values that are missing or no finite numbers, with the record.
    """
    rows = [_checked(record, number) for number, record in enumerate(records, start=1)]
    if not rows:
        raise ValueError("no evaluations: give one record at least, with its tokens and accuracy")
    within = [low <= tokens <= high for tokens, _, low, high in rows]
    slopes = [(g - f) / (b - a) for (a, f, *_), (b, g, *_) in itertools.combinations(rows, 2) if a != b]
    return ThinkingMetrics(
        control=sum(within) / len(rows),
        scaling=PER * math.fsum(slopes) / len(slopes) if slopes else None,
        performance=max(accuracy for _, accuracy, *_ in rows),
        evaluations=len(rows),
        skipped_pairs=math.comb(len(rows), 2) - len(slopes),
    )


def _checked(record: Mapping[str, Any], number: int) -> tuple[float, float, float, float]:
    values = []
    for name, default in (("tokens", None), ("accuracy", None), ("minimum", -math.inf), ("maximum", math.inf)):
        value = record.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"record {number}: {name!r} is {record.get(name)!r}; it must be a number")
        values.append(float(value))
    if not math.isfinite(values[0]) or not 0 <= values[1] <= 1:
        raise ValueError(
            f"record {number}: tokens {values[0]} and accuracy {values[1]}; accuracy is a share, in [0, 1]"
        )
    return values[0], values[1], values[2], values[3]


def evaluations(rows: Iterable[Mapping[str, Any]], by: str = "maximum") -> list[dict[str, float | None]]:
    """Records for `thinking_metrics` of rows of items: the rows of one budget are one evaluation, with their mean tokens.

    rows: `tokens`, `correct` (0 or 1) and the budget of each, `maximum` and `minimum` where it has them.   by: what names the
    budget, such as `num_ignore` where ends are put off.
    """
    groups: dict[Hashable, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get(by), []).append(row)
    found = []
    for group in groups.values():
        tokens = math.fsum(float(row["tokens"]) for row in group) / len(group)
        accuracy = math.fsum(float(row["correct"]) for row in group) / len(group)
        limits = {name: group[0].get(name) for name in ("minimum", "maximum")}
        found.append({"tokens": tokens, "accuracy": accuracy, **limits})
    return found


def ngram_repetition(tokens: Sequence[Hashable], n: int = 4) -> float | None:
    """Share of n-grams that stood before already, in [0, 1): 0 where none is repeated; None for fewer than n tokens.

    tokens: ids, or words. Loops, which several strings in place of an end bring about, show in it.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
