"""At how many bits each step of decoding reads nested weights: schedules of progressive mixed precision (arXiv 2410.13461).

A schedule says what each row of a batch asks for at a step; `ProgressivePrecision` runs the batch at the largest of these. Step 0
is the first forward pass that reads a generated token; the pass over the prompt, which chooses the first token, is no step.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import Cache

from trialist.training.precision_schedule import PrecisionClassifier, last_layer

# R rows of a batch, P columns of its prompts, V vocabulary

FILE = "schedule.json"
WEIGHTS = "classifier.safetensors"


@dataclass(frozen=True, eq=False)
class PromptPass:
    """What there is once the prompts were read."""

    lengths: tuple[int, ...]
    """Tokens of each prompt, padding aside"""
    mask: Tensor
    """(R, P), 0 where there is padding"""
    cache: Cache | None = None


class PrecisionSchedule(Protocol):
    """What a row asks for, step by step."""

    reads_logits: ClassVar[bool]
    """Whether `next` needs them"""

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits that it may ask for, descending."""

    def start(self, prompt: PromptPass) -> Any:
        """The state of one batch."""

    def next(self, state: Any, step: int, logits: Tensor | None) -> list[int]:
        """Bits that each row asks for at a step, called once for each in order.

        logits: (R, V), of which the token was chosen that the step reads.
        """


class FixedSchedule(ABC):
    """A schedule that looks at nothing but the number of the step."""

    reads_logits: ClassVar[bool] = False

    @property
    @abstractmethod
    def precisions(self) -> tuple[int, ...]:
        """Bits that it asks for, the highest first."""

    @abstractmethod
    def at(self, step: int) -> int:
        """Bits at a step, from 0."""

    def over(self, steps: int) -> list[int]:
        """Bits of the first steps."""
        return [self.at(step) for step in range(steps)]

    def start(self, prompt: PromptPass) -> int:
        return len(prompt.lengths)

    def next(self, state: int, step: int, logits: Tensor | None) -> list[int]:
        return [self.at(step)] * state


@dataclass(frozen=True)
class StaticSchedule(FixedSchedule):
    """`high` bits for the first `high_steps` steps, `low` bits from then on. Equal precisions are that precision throughout.

    Raises ValueError for high < low, and for a number of steps below 0.
    """

    high: int
    low: int
    high_steps: int

    def __post_init__(self) -> None:
        _check_bits(self.high, self.low)
        _check_order(self.high, self.low)
        if self.high_steps < 0:
            raise ValueError(f"high_steps={self.high_steps}: steps of decoding, at least 0")

    @property
    def precisions(self) -> tuple[int, ...]:
        return _descending(self.high, self.low)

    def at(self, step: int) -> int:
        return self.high if step < self.high_steps else self.low


@dataclass(frozen=True)
class PiecewiseSchedule(FixedSchedule):
    """Several switches: `parts` are (first step, bits), the first one at step 0, later ones with fewer bits.

    Raises ValueError for parts that are out of order, or whose bits rise.
    """

    parts: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        parts = tuple((int(start), int(bits)) for start, bits in self.parts)
        object.__setattr__(self, "parts", parts)
        if not parts or parts[0][0] != 0:
            raise ValueError(f"a schedule begins at step 0: {_written(parts) or 'there are no parts'}")
        _check_bits(*(bits for _, bits in parts))
        for (before, more), (start, bits) in pairwise(parts):
            if start <= before:
                raise ValueError(f"the steps of a schedule ascend, and {start} follows {before}: {_written(parts)}")
            if bits > more:
                raise ValueError(f"precision only falls, and {bits} bits follow {more}: {_written(parts)}")

    @property
    def precisions(self) -> tuple[int, ...]:
        return _descending(*(bits for _, bits in self.parts))

    def at(self, step: int) -> int:
        return next(bits for start, bits in reversed(self.parts) if start <= step)


@dataclass(frozen=True)
class ReversedSchedule(FixedSchedule):
    """A control: the first `steps` steps of another schedule in reverse order, low precision first."""

    of: FixedSchedule
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    @property
    def precisions(self) -> tuple[int, ...]:
        return self.of.precisions

    def at(self, step: int) -> int:
        return self.of.at(max(0, self.steps - 1 - step))


@dataclass(frozen=True)
class RandomSchedule(FixedSchedule):
    """A control: the first `steps` steps of another schedule in random order, so each precision as often as there."""

    of: FixedSchedule
    steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        order = torch.randperm(self.steps, generator=torch.Generator().manual_seed(self.seed)).tolist()
        object.__setattr__(self, "_order", tuple(order))

    @property
    def precisions(self) -> tuple[int, ...]:
        return self.of.precisions

    def at(self, step: int) -> int:
        order: tuple[int, ...] = self._order  # type: ignore[attr-defined]
        return self.of.at(order[step] if step < self.steps else step)


@dataclass(eq=False)
class _Confidences:
    """Latest probabilities of the most likely token (R, window), the oldest first, and which rows are at low precision."""

    seen: Tensor
    count: int
    low: Tensor


@dataclass(frozen=True)
class ConfidenceSchedule:
    """`high` bits until the model is surer than it used to be, `low` bits from then on, row by row.

    A row switches at the first step at which the probability of its most likely token is at least mean + k std (that of a
    population) of those at the `window` steps before. Where beams are exchanged, the rows are the places of beams.
    """

    high: int
    low: int
    window: int = 10
    k: float = 1.0

    reads_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_bits(self.high, self.low)
        _check_order(self.high, self.low)
        if self.window < 2:
            raise ValueError(f"window={self.window}: steps, at least 2, or there is no spread")
        if not math.isfinite(self.k):
            raise ValueError(f"k={self.k}: a finite number of standard deviations")

    @property
    def precisions(self) -> tuple[int, ...]:
        return _descending(self.high, self.low)

    def start(self, prompt: PromptPass) -> _Confidences:
        rows = len(prompt.lengths)
        return _Confidences(torch.zeros(rows, self.window), 0, torch.zeros(rows, dtype=torch.bool))

    def next(self, state: _Confidences, step: int, logits: Tensor | None) -> list[int]:
        assert logits is not None
        surest = logits.float().log_softmax(-1).amax(-1).exp().cpu()  # (R,)
        if state.count >= self.window:
            mean, std = state.seen.mean(1), state.seen.std(1, correction=0)
            state.low |= surest >= mean + self.k * std
        state.seen = torch.cat([state.seen[:, 1:], surest[:, None]], 1)
        state.count += 1
        return [self.low if low else self.high for low in state.low.tolist()]


@dataclass(frozen=True, eq=False)
class LearnedSchedule:
    """A static schedule for each row, whose steps at `high` bits a classifier chooses from the last layer's keys and values of
    the prompt, as the pass over the prompt wrote them.

    high_steps: ascending, one for each class. prefill_bits: at which the keys and values were written that the classifier was
    trained on; None where that is not known. Raises ValueError for a classifier with another number of classes.
    """

    classifier: PrecisionClassifier
    high: int
    low: int
    high_steps: tuple[int, ...]
    prefill_bits: int | None = None

    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "high_steps", tuple(self.high_steps))
        _check_bits(self.high, self.low)
        _check_order(self.high, self.low)
        if list(self.high_steps) != sorted(set(self.high_steps)) or not self.high_steps or self.high_steps[0] < 0:
            raise ValueError(f"high_steps={self.high_steps}: ascending numbers of steps, at least 0")
        if self.classifier.classes != len(self.high_steps):
            raise ValueError(
                f"the classifier has {self.classifier.classes} classes for {len(self.high_steps)} high_steps"
            )

    @property
    def precisions(self) -> tuple[int, ...]:
        return _descending(self.high, self.low)

    def start(self, prompt: PromptPass) -> list[StaticSchedule]:
        """Raises ValueError for a cache that does not hold the whole last layer of these prompts."""
        keys, values = last_layer(prompt.cache, len(prompt.lengths), prompt.mask.shape[1])
        classifier = self.classifier.to(keys.device).eval()
        with torch.no_grad():
            classes = classifier(keys.mean(1), values.mean(1), prompt.mask[:, -keys.shape[2] :]).argmax(-1)
        return [StaticSchedule(self.high, self.low, self.high_steps[choice]) for choice in classes.tolist()]

    def next(self, state: list[StaticSchedule], step: int, logits: Tensor | None) -> list[int]:
        return [schedule.at(step) for schedule in state]


KINDS: dict[str, type] = {
    "static": StaticSchedule,
    "piecewise": PiecewiseSchedule,
    "reversed": ReversedSchedule,
    "random": RandomSchedule,
    "confidence": ConfidenceSchedule,
    "learned": LearnedSchedule,
}


def parse_schedule(text: str) -> PiecewiseSchedule:
    """The schedule that `4@0,3@85,2@170` says: 4 bits from step 0, 3 from step 85, 2 from step 170. Raises ValueError."""
    parts = []
    for part in text.split(","):
        bits, at, start = part.strip().partition("@")
        if not at or not bits.isdigit() or not start.isdigit():
            raise ValueError(f"{part.strip()!r} is no part of a schedule; write BITS@STEP, as in 4@0,3@85,2@170")
        parts.append((int(start), int(bits)))
    return PiecewiseSchedule(tuple(parts))


def save_schedule(schedule: PrecisionSchedule, folder: str | Path) -> None:
    """Writes a schedule into a folder: `schedule.json`, and `classifier.safetensors` of a learned one."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(schedule, LearnedSchedule):
        weights = {name: x.detach().cpu().contiguous() for name, x in schedule.classifier.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps(_as_json(schedule), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / FILE)


def load_schedule(folder: str | Path) -> Any:
    """What `save_schedule` wrote. Raises FileNotFoundError where there is none, ValueError for a damaged one."""
    file = Path(os.path.expanduser(folder)) / FILE
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{folder} holds no {FILE}; `trialist train precision-schedule --output {folder}` writes one"
        )
    from safetensors import SafetensorError

    damage = (
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        RuntimeError,
        SafetensorError,
    )
    try:
        return _from_json(json.loads(file.read_text(encoding="utf-8")), file.parent)
    except damage as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _as_json(schedule: Any) -> dict[str, Any]:
    kind = next((kind for kind, cls in KINDS.items() if type(schedule) is cls), None)
    if kind is None:
        raise ValueError(f"{type(schedule).__name__} cannot be saved; the schedules that can are {', '.join(KINDS)}")
    if isinstance(schedule, LearnedSchedule):
        said = {field.name: getattr(schedule, field.name) for field in fields(schedule) if field.name != "classifier"}
        return {"kind": kind, **said, "classifier": schedule.classifier.sizes}
    if isinstance(schedule, RandomSchedule | ReversedSchedule):
        said = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
        return {"kind": kind, **said, "of": _as_json(schedule.of)}
    return {"kind": kind, **asdict(schedule)}


def _from_json(stored: Mapping[str, Any], folder: Path) -> Any:
    said = {name: value for name, value in stored.items() if name != "kind"}
    if stored["kind"] not in KINDS:
        raise ValueError(
            f"{folder / FILE}: a schedule of the kind {stored['kind']!r} is unknown; known are {', '.join(KINDS)}"
        )
    if stored["kind"] == "learned":
        from safetensors.torch import load_file

        classifier = PrecisionClassifier(**said["classifier"])
        classifier.load_state_dict(load_file(folder / WEIGHTS))
        said["classifier"] = classifier.eval()
    if "of" in said:
        said["of"] = _from_json(said["of"], folder)
    return KINDS[stored["kind"]](**said)


def _descending(*bits: int) -> tuple[int, ...]:
    return tuple(sorted(set(bits), reverse=True))


def _check_bits(*precisions: int) -> None:
    for bits in precisions:
        if not 1 <= bits <= 8:
            raise ValueError(f"{bits} bits: nested weights have 1 to 8")


def _check_order(high: int, low: int) -> None:
    if high < low:
        raise ValueError(f"high={high} is below low={low}: precision only falls while a text grows")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1")


def _written(parts: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{bits}@{start}" for start, bits in parts)
