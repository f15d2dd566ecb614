"""What an evaluation is, and what it says about a model: aggregates, and the score of every item."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[float, float], None]
"""Called with what is done and what there is to do, in any unit"""


def silent(done: float, total: float) -> None:
    """A progress that shows nothing."""


@dataclass(frozen=True)
class Metric:
    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""


@dataclass(frozen=True)
class Evaluated:
    """Scores of one model. The metric's value is the mean of its item scores wherever both are there."""

    ids: tuple[str, ...]
    """One for each item: its name in the data, and a digest of its content"""
    scores: Mapping[str, tuple[float, ...]]
    """Metric -> score of each item, the deciding metric first"""
    metrics: Mapping[str, float]
    """Metric -> value; `metric/part` for the parts of a benchmark (a phenomenon, a subject)"""
    clusters: tuple[str, ...] | None = None
    """For each item the document or prompt that it shares with others; None where every item stands for itself"""
    tokens: int = 0
    """Tokens that the model was asked to score or continue"""
    notes: tuple[str, ...] = field(default=())
    """What a reader of the numbers should know"""

    def __post_init__(self) -> None:
        for name, values in self.scores.items():
            if len(values) != len(self.ids):
                raise ValueError(f"{name}: {len(values)} scores for {len(self.ids)} items")


@dataclass(frozen=True)
class Evaluation(ABC):
    """A benchmark with its options; called with a model and its tokenizer it returns the scores."""

    about: ClassVar[str] = ""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics with item scores; the first decides."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, FileNotFoundError or ImportError for what is missing, before a model is loaded."""

    @abstractmethod
    def digest(self) -> str:
        """What identifies the content of the data."""

    @abstractmethod
    def check_fit(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
        """Raises ValueError where an item is longer than the `context` tokens that a model takes (None: no limit)."""

    @abstractmethod
    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 16, seed: int = 0,
        progress: Progress = silent,
    ) -> Evaluated:  # fmt: skip
        """Scores the model. batch: sequences in a forward pass. seed: draws few-shot examples where they are drawn."""


def item_id(name: object, content: str) -> str:
    """A name with a digest of the item's content: items of the same name from other data never pass for the same."""
    return f"{name}#{hashlib.blake2b(content.encode(), digest_size=3).hexdigest()}"


def context_length(model: Any) -> int | None:
    """Tokens that a model takes at most, as its configuration says; None where it says nothing."""
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions")
    return next((size for name in names if (size := getattr(config, name, None))), None)


def too_long(what: str, tokens: int, context: int) -> ValueError:
    return ValueError(
        f"{what} takes {tokens:,} tokens with this tokenizer, and the model's context is {context:,}; nothing is cut off "
        "silently: choose a model with a longer context (for one trained here, a larger --length), or fewer --shots"
    )
