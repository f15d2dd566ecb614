"""How many steps at high precision are enough: the number for a task, and a classifier that tells it from a prompt.

Both want prompts that nothing is reported on afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trialist.decoding.options import generate
from trialist.decoding.precision.progressive import ProgressivePrecision, average_bits, check_precisions
from trialist.decoding.precision.schedules import LearnedSchedule, StaticSchedule
from trialist.decoding.precision.scoring import divergences, rouge_l
from trialist.models.nested.precision import available_bits, precision
from trialist.training.precision_schedule import ClassifierReport, PromptExample, fit_classifier, last_layer

# B prompts of a batch, P columns, T generated tokens

Tokens = Sequence[int]
Metric = Callable[[Sequence[Tokens], Sequence[Tokens]], Sequence[float]]
"""Scores of continuations, the higher the better, of prompts and their continuations as token ids"""
GRID = (0.0, 1 / 3, 2 / 3, 1.0)
"""Shares of the steps that are tried, as in the paper"""


@dataclass(frozen=True)
class Candidate:
    """What a number of high steps gives."""

    high_steps: int
    average_bits: float
    """Mean over generated tokens of the reference continuations"""
    score: float
    """Mean over prompts, the higher the better"""
    loss: float
    """Mean over prompts of what is lost against high precision at all steps"""
    half_width: float | None
    """Of the 95 % interval of `loss`; None with fewer than 3 prompts"""


@dataclass(frozen=True)
class StaticTuning:
    """The cheapest schedule whose loss is within the tolerance, and what every candidate gave."""

    schedule: StaticSchedule
    metric: str
    tolerance: float
    candidates: tuple[Candidate, ...]

    def lines(self) -> list[str]:
        """The table in words, a candidate a line."""
        found = []
        for row in self.candidates:
            spread = "" if row.half_width is None else f" ± {row.half_width:.4f}"
            chosen = "  <- chosen" if row.high_steps == self.schedule.high_steps else ""
            found.append(
                f"{row.high_steps:>4} high steps  {row.average_bits:.2f} bits  {self.metric} {row.score:.4f}  "
                f"loss {row.loss:+.4f}{spread}{chosen}"
            )
        return found


def tune_static(
    model: Any,
    prompts: Sequence[Tokens],
    metric: Literal["kl", "rouge"] | Metric = "kl",
    grid: Sequence[float] = GRID,
    tolerance: float = 0.02,
    *,
    high: int | None = None,
    low: int | None = None,
    prefill_bits: int | None = None,
    steps: int = 256,
    reference: Any = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> StaticTuning:
    """The fewest steps at `high` bits, of those in `grid`, that lose at most `tolerance` against `high` bits throughout.

    metric: "kl", minus the mean divergence from the reference on its own greedy continuations, in nats a token, where every
        position counts alike; "rouge", ROUGE-L over tokens between the greedy continuations, in [0, 1], which rewards early
        precision mechanically; or a function that scores continuations of a task, the higher the better.
    grid: shares of `steps`, in [0, 1]; 1 is always among them. tolerance: in the unit of the metric.
    high, low: bits; the two highest that the model has where not given. prefill_bits: None is the highest of the model.
    reference: a model with the same tokens; None is the nested model at its highest precision.

    Raises ValueError for a grid outside of [0, 1], a tolerance below 0, bits that the model does not have, and prompts that leave
    no room for `steps` tokens.
    """
    setup = _Setup(model, prompts, metric, grid, tolerance, high, low, prefill_bits, steps, reference, batch)
    scores: list[list[float]] = [[] for _ in setup.high_steps]
    lengths: list[int] = []
    for _, group in setup.batches(progress):
        for found, losses in zip(scores, setup.scores(group)):
            found += losses
        lengths += group.lengths
    every = torch.tensor(scores, dtype=torch.float64)  # (candidates, prompts)
    losses = every[-1] - every
    rows = [
        Candidate(
            h, _mean_bits(setup, h, lengths), float(every[at].mean()), float(losses[at].mean()), _half_width(losses[at])
        )
        for at, h in enumerate(setup.high_steps)
    ]
    chosen = next(row for row in rows if row.loss <= tolerance)
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    return StaticTuning(StaticSchedule(setup.high, setup.low, chosen.high_steps), name, tolerance, tuple(rows))


def train_scheduler(
    model: Any,
    prompts: Sequence[Tokens],
    metric: Literal["kl", "rouge"] | Metric = "kl",
    grid: Sequence[float] = GRID,
    tolerance: float = 0.02,
    *,
    high: int | None = None,
    low: int | None = None,
    prefill_bits: int | None = None,
    steps: int = 256,
    reference: Any = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
    **training: Any,
) -> tuple[LearnedSchedule, ClassifierReport]:
    """A schedule that chooses among the numbers of high steps in `grid` by the prompt, and how it does on prompts left out.

    The label of a prompt is the fewest high steps that lose at most `tolerance` against high precision throughout, for it alone.
    training: of `fit_classifier`, such as `epochs`. Everything else, and the errors, are as of `tune_static`.
    """
    setup = _Setup(model, prompts, metric, grid, tolerance, high, low, prefill_bits, steps, reference, batch)
    examples: list[PromptExample] = []
    for _, group in setup.batches(progress):
        scores = torch.tensor(setup.scores(group), dtype=torch.float64)  # (classes, B)
        labels = (scores >= scores[-1] - tolerance).to(torch.int8).argmax(0).tolist()
        examples += setup.examples(group, labels)
    heads = int(setup.heads or 0)
    classifier, report = fit_classifier(examples, heads=heads, classes=len(setup.high_steps), seed=seed, **training)
    return LearnedSchedule(classifier, setup.high, setup.low, setup.high_steps, setup.prefill), report


@dataclass(frozen=True, eq=False)
class _Group:
    """Prompts of a batch, padded on the left, and the reference's continuations."""

    prompts: list[Tokens]
    input_ids: Tensor
    mask: Tensor
    continuation: Tensor
    """(B, T), of which each row has `lengths` tokens, the one that ends it included"""
    lengths: list[int]

    @property
    def texts(self) -> list[list[int]]:
        return [row[:length] for row, length in zip(self.continuation.tolist(), self.lengths)]


class _Setup:
    """What both searches share: candidates, reference continuations, and scores of prompts under each candidate."""

    def __init__(
        self, model: Any, prompts: Sequence[Tokens], metric: Any, grid: Sequence[float], tolerance: float, high: int | None,
        low: int | None, prefill_bits: int | None, steps: int, reference: Any, batch: int,
    ) -> None:  # fmt: skip
        available = available_bits(model)
        self.model, self.reference = model, model if reference is None else reference
        self.high = available[-1] if high is None else high
        below = [bits for bits in available if bits < self.high]
        self.low = (below[-1] if below else self.high) if low is None else low
        self.prefill = available[-1] if prefill_bits is None else prefill_bits
        check_precisions(model, (self.prefill, self.high, self.low))
        StaticSchedule(self.high, self.low, 0)
        if steps < 1 or batch < 1:
            raise ValueError(f"steps={steps} and batch={batch} must be at least 1")
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}: at least 0, in the unit of the metric")
        if wrong := [share for share in grid if not 0 <= share <= 1]:
            raise ValueError(f"the grid has {wrong[0]}; its numbers are shares of the steps, from 0 to 1")
        if metric not in ("kl", "rouge") and not callable(metric):
            raise ValueError(f"metric={metric!r}: kl, rouge, or a function of prompts and continuations")
        if not prompts or not all(prompts):
            raise ValueError("prompts are lists of at least one token id, and at least one of them is needed")
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = max(map(len, prompts))
        if context is not None and longest + steps > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {steps} steps are more than the model's context of {context}; shorten the "
                "prompts, or lower steps"
            )
        self.metric, self.steps, self.batch = metric, steps, batch
        self.high_steps = tuple(sorted({int(share * steps + 1e-9) for share in (*grid, 1.0)}))
        self.prompts = sorted(prompts, key=len)
        self.heads: int | None = None

    def batches(self, progress: Callable[[int, int], None] | None) -> Iterator[tuple[int, _Group]]:
        for start in range(0, len(self.prompts), self.batch):
            group = self._group(list(self.prompts[start : start + self.batch]))
            yield start, group
            if progress is not None:
                progress(min(start + self.batch, len(self.prompts)), len(self.prompts))

    def _group(self, prompts: list[Tokens]) -> _Group:
        P = max(map(len, prompts))
        ids = torch.zeros(len(prompts), P, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, P - len(prompt) :], mask[row, P - len(prompt) :] = torch.tensor(list(prompt)), 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        if self.reference is self.model:
            with precision(self.model, available_bits(self.model)[-1]):
                texts = self._continued(self.model, ids, mask, ())
        else:
            texts = self._continued(self.reference, ids, mask, ())
        T = max(map(len, texts))
        continuation = torch.tensor([text + [0] * (T - len(text)) for text in texts], device=ids.device)
        return _Group(prompts, ids, mask, continuation, [len(text) for text in texts])

    def _continued(self, model: Any, ids: Tensor, mask: Tensor, options: Sequence[Any]) -> list[list[int]]:
        """Greedy continuations as token ids, the end included."""
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        found = generate(
            model, options, ids, attention_mask=mask, max_new_tokens=self.steps, do_sample=False, num_beams=1,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        cut = [next((at for at, token in enumerate(row, 1) if token in ends), len(row)) for row in found]
        return [row[:length] for row, length in zip(found, cut)]

    def scores(self, group: _Group) -> list[list[float]]:
        """Of every candidate, of every prompt, the higher the better."""
        found = []
        for h in self.high_steps:
            schedule = StaticSchedule(self.high, self.low, h)
            if self.metric == "kl":
                bits = schedule.over(group.continuation.shape[1] - 1)
                kl = divergences(
                    self.model, self.reference, group.input_ids, group.mask, group.continuation, bits, self.prefill
                )
                found.append([-float(row[:length].mean()) for row, length in zip(kl, group.lengths)])
                continue
            option = ProgressivePrecision(schedule, self.prefill)
            texts = self._continued(self.model, group.input_ids, group.mask, (option,))
            if self.metric == "rouge":
                found.append([rouge_l(text, expected) for text, expected in zip(texts, group.texts)])
            else:
                found.append([float(score) for score in self.metric(group.prompts, texts)])
        return found

    def examples(self, group: _Group, labels: list[int]) -> list[PromptExample]:
        """The prompts as the classifier will see them when it serves."""
        from transformers import DynamicCache

        found = []
        for prompt, label in zip(group.prompts, labels):
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([list(prompt)], device=self.model.device)
            with torch.no_grad(), precision(self.model, self.prefill):
                self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            keys, values = last_layer(cache, 1, len(prompt))
            self.heads = keys.shape[1]
            name = ",".join(map(str, prompt))
            found.append(PromptExample(keys[0].mean(0).float(), values[0].mean(0).float(), label, name))
        return found


def _mean_bits(setup: _Setup, high_steps: int, lengths: Sequence[int]) -> float:
    schedule = StaticSchedule(setup.high, setup.low, high_steps)
    total = math.fsum(length * average_bits(schedule, length, setup.prefill) for length in lengths)
    return total / sum(lengths)


def _half_width(losses: Tensor) -> float | None:
    from scipy import stats

    if len(losses) < 3:
        return None
    return float(losses.std() / math.sqrt(len(losses)) * stats.t.ppf(0.975, len(losses) - 1))
