"""What the trials on recall of assigned values share: their inputs, their models and items, and the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Endpoint, Outcome, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._evaluation import TrainedModelTrial
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    arm_model,
    check_inputs,
    check_length,
    model_context,
    model_inputs,
    train,
)
from trialist.trials._symbols import accuracy, mean_loss, symbol_ids

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from trialist.data.recall import RecallBatches, Task

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
VALIDATION, EVALUATION = 30_001, 30_002
"""Seeds of the generated items that tune and that decide; the same items for every seed and arm"""


@dataclass(frozen=True)
class RecallTrial(TrainedModelTrial):
    """A trial whose models are asked for what a sequence of symbols said."""

    budget = Budget("tokens")
    tuning = Tuning(tries=3, metric=Endpoint("validation_loss", unit="nats", better="lower"))
    preload = (*PRELOAD, "trialist.data.recall")
    versions = VERSIONS
    times: ClassVar[tuple[int, ...]] = (1,)
    """Lengths at which the test asks, in multiples of the longest in training"""

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains a small one from scratch"""
    layers: int = 3
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    fewest: int = 4
    """Fewest pairs in a training sequence"""
    most: int = 24
    """Most pairs in a training sequence"""
    batch: int = 64
    """Sequences in a step"""
    steps: int = 1600
    """Training steps"""
    learning_rate: float = 1e-3
    """Peak learning rate where nothing was tuned"""
    test_items: int = 256
    """Test sequences at each length"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    @property
    def longest(self) -> int:
        return 2 * max(self.times) * self.most + 3

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, layers=self.layers, width=self.width, heads=self.heads, fewest=self.fewest,
            batch=self.batch, steps=self.steps, test_items=self.test_items,
        )  # fmt: skip
        if self.most < self.fewest:
            raise ValueError(f"--most {self.most} must be at least --fewest {self.fewest}")
        if self.model != BUILT_IN:
            check_length(self.model, self.longest)
        elif self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        if self.benchmark and self.model == BUILT_IN:
            raise ValueError(
                f"benchmark {self.benchmark}: the built-in decoder of this trial reads symbols and has no tokenizer for text; "
                "name a --model, or take selective-attention"
            )
        self.check_benchmark(self.model, model_context(self.model) if self.benchmark else None)

    def digests(self) -> Mapping[str, str]:
        return {**model_inputs(self.model, self.device), **self.benchmark_digests()}

    def new_model(self, arm: Arm, context: Context) -> PreTrainedModel:
        """A fresh decoder of symbols, or the given model, with the arm's attention."""
        from trialist.data.recall import VOCABULARY

        return arm_model(
            arm, context, self.model, device=resolve_device(self.device), lora=self.lora, vocab_size=VOCABULARY.size,
            layers=self.layers, width=self.width, heads=self.heads, length=self.longest,
        )  # fmt: skip

    def batch_for(self, model: PreTrainedModel, source: RecallBatches, step: int) -> dict[str, Any]:
        """A batch in the tokens of the model, on the device."""
        from trialist.data.recall import VOCABULARY

        symbols, batch = symbol_ids(model.config.vocab_size, VOCABULARY.size), source(step)
        labels = batch["labels"]
        named = {
            "input_ids": symbols[batch["input_ids"]],
            "labels": symbols[labels.clamp(min=0)].where(labels >= 0, labels),
        }
        return {name: tensor.to(resolve_device(self.device)) for name, tensor in named.items()}

    def items(self, model: PreTrainedModel, task: Task, times: int = 1) -> list[dict[str, Any]]:
        """The items that decide, at `times` the longest training length."""
        from trialist.data.recall import RecallBatches

        pairs = times * self.most
        source = RecallBatches(task, min(self.batch, self.test_items), EVALUATION, pairs, pairs)
        return [self.batch_for(model, source, step) for step in range(-(-self.test_items // source.batch_size))]

    def score(self, model: PreTrainedModel, task: Task, times: int = 1) -> float:
        """Share of right answers."""
        items = self.items(model, task, times)
        return sum(accuracy(model, batch) for batch in items) / len(items)

    def fit_recall(
        self,
        model: PreTrainedModel,
        task: Task,
        context: Context,
        *,
        learning_rate: float,
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        **options: Any,
    ) -> Outcome:
        """Trains on the task; an outcome with what `evaluate` said at the end, and the loss on validation items.

        options: of `train`.
        """
        from trialist.data.recall import RecallBatches

        training = RecallBatches(task, self.batch, context.stream("data_order"), self.fewest, self.most)
        outcome, last = train(
            model, lambda step: self.batch_for(model, training, step), context, steps=self.steps, learning_rate=learning_rate,
            dtype=self.dtype, evaluate=evaluate, evaluations=3, **options,
        )  # fmt: skip
        if outcome.diverged is not None:
            return outcome
        validation = RecallBatches(task, self.batch, VALIDATION, self.fewest, self.most)
        loss = mean_loss(model, [self.batch_for(model, validation, step) for step in range(8)])
        return dataclasses.replace(outcome, metrics={**last, "validation_loss": loss})

    def with_benchmark_scores(self, outcome: Outcome, model: Any, context: Context) -> Outcome:
        if not self.benchmark:
            return outcome
        from trialist.data.tokenizers import load_tokenizer

        return self.hand_over(outcome, model, load_tokenizer(self.model), context, batch=self.batch)
