"""Traces that the arms of the trial of budget forcing share, each made once, and what is read from them."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.trials._thinking import EVALUATION, VALIDATION, Item, Thinker, Trace, until

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Budgets of the curve of maxima, in thinking tokens of the natural traces"""
MOST_IGNORES = 4
"""Ends that are put off at the end of the curve of extensions"""
VALIDATION_ITEMS = 128
"""Questions whose sampled traces say how long a trace may be that is not rejected"""


class Traces:
    """The traces of one seed: stages, so that the arms which read them do not generate them again."""

    def __init__(
        self, thinker: Thinker, model: PreTrainedModel, tokenizer: Any, context: Context, ignores: tuple[int, ...]
    ) -> None:
        self.thinker, self.model, self.tokenizer, self.context, self.ignores = (
            thinker,
            model,
            tokenizer,
            context,
            ignores,
        )
        self.items: list[Item] = thinker.questions(EVALUATION, thinker.items)

    def _answers(self, items: Sequence[Item], questions: Sequence[str] | None = None, **options: Any) -> list[Trace]:
        texts = questions if questions is not None else [item.question for item in items]
        asked = [(text, item.answer) for text, item in zip(texts, items, strict=True)]
        return self.thinker.answers(self.model, self.tokenizer, asked, report=self.context.progress, **options)

    def forced(self, **options: Any) -> list[Trace]:
        """Greedy traces under further limits of budget forcing."""
        inputs = tuple(sorted(options.items()))
        return self.thinker.stored(self.context, "forced", inputs, lambda: [self._answers(self.items, **options)])[0]

    def natural(self) -> list[Trace]:
        return self.forced()

    def put_off(self, ignores: int, wait: bool) -> list[Trace]:
        return self.forced(num_ignore=ignores, ignore_text=self.thinker.string(wait))

    def sampled(self, wait: bool) -> list[list[Trace]]:
        """Samples of each question, that together have the tokens of the longest extended trace."""
        needs = [max(trace.tokens for trace in part) for part in zip(*(self.put_off(n, wait) for n in self.ignores))]

        def build() -> list[list[Trace]]:
            return until(needs, [], lambda short, number: self._sample(short, None, f"sampling {number}"))

        return self.thinker.stored(self.context, "sampled", (self.ignores, wait), build)

    def told(self, ignores: int, wait: bool) -> list[list[Trace]]:
        """Greedy traces of questions that ask for the thinking tokens of the extended ones, and samples up to their tokens."""
        forced = self.put_off(ignores, wait)
        questions = [
            self.thinker.told(item.question, trace.thinking) for item, trace in zip(self.items, forced, strict=True)
        ]

        def build() -> list[list[Trace]]:
            first = self._answers(self.items, questions)
            needs = [trace.tokens for trace in forced]
            return until(needs, first, lambda short, number: self._sample(short, questions, f"sampling {number}"))

        return self.thinker.stored(self.context, "told", (ignores, wait), build)

    def _sample(self, short: Sequence[int], questions: Sequence[str] | None, stream: str) -> list[Trace]:
        items = [self.items[number] for number in short]
        texts = None if questions is None else [questions[number] for number in short]
        return self._answers(items, texts, sampled=self.context.stream(stream))

    def median_lengths(self) -> list[float]:
        """For each question the median of the thinking tokens that samples of questions of its length take; of a given model that
        of all questions."""
        items = self.thinker.questions(VALIDATION, VALIDATION_ITEMS)
        build = functools.partial(self._answers, items, sampled=self.context.stream("validation"))
        (drawn,) = self.thinker.stored(self.context, "validation", (VALIDATION_ITEMS,), lambda: [build()])
        groups: dict[Hashable, list[int]] = {}
        for item, trace in zip(items, drawn, strict=True):
            groups.setdefault(self._group(item), []).append(trace.thinking)
        return [statistics.median(groups[self._group(item)]) for item in self.items]

    def _group(self, item: Item) -> Hashable:
        return len(item.question) if self.thinker.own else None


def enough(samples: Sequence[Sequence[Trace]], forced: Sequence[Trace]) -> list[list[Trace]]:
    """Of each question's samples the first ones that have the tokens of its extended trace."""
    from trialist.decoding.budget_forcing.baselines import until_spent

    return [
        list(part[: until_spent([trace.tokens for trace in part], trace.tokens)])
        for part, trace in zip(samples, forced, strict=True)
    ]


def elected(voting: Sequence[Trace]) -> Trace:
    """The first trace with the answer of the majority; the first of all where none has an answer."""
    from trialist.decoding.budget_forcing.baselines import majority_vote

    answer = majority_vote([trace.answer for trace in voting])
    return next((trace for trace in voting if answer is not None and trace.answer == answer), voting[0])


def repetition(text: str, own: bool) -> float:
    """Share of pieces that stood in the trace before: lines of a sum and what follows them, or four words. None of few words."""
    from trialist.evaluation.thinking import ngram_repetition

    return ngram_repetition(text, 10) or 0.0 if own else ngram_repetition(text.split(), 4) or 0.0


def readings(traces: Traces) -> tuple[dict[str, tuple[tuple[float, float], ...]], list[str]]:
    """Accuracy over thinking tokens under maxima and under extensions, with either string, and Control, Scaling and
    Performance of each in words."""
    from trialist.evaluation.thinking import thinking_metrics

    natural = traces.natural()
    mean = statistics.fmean(trace.thinking for trace in natural)
    limits = sorted({max(1, round(share * mean)) for share in SHARES})
    records: dict[str, list[dict[str, float]]] = {"maximum": [], "wait": [], "untrained_string": []}
    for limit in limits:
        records["maximum"].append({**_record(traces.forced(max_thinking_tokens=limit)), "maximum": limit})
    for name, wait in (("wait", True), ("untrained_string", False)):
        records[name].append(_record(natural))
        records[name] += [_record(traces.put_off(count, wait)) for count in range(1, MOST_IGNORES + 1)]
    curves, notes = {}, []
    for name, found in records.items():
        points = sorted({(record["tokens"], record["accuracy"]) for record in found})
        curves[f"accuracy_of_{name}_by_thinking_tokens"] = tuple(points)
        one = thinking_metrics(found)
        scaling = "undefined" if one.scaling is None else f"{one.scaling:.2f} per 1,000 tokens"
        notes.append(f"{name}: control {one.control:.0%}, scaling {scaling}, performance {one.performance:.3f}")
    return curves, notes


def _record(traces: Sequence[Trace]) -> dict[str, float]:
    return {
        "tokens": statistics.fmean(trace.thinking for trace in traces),
        "accuracy": statistics.fmean(trace.correct for trace in traces),
    }
