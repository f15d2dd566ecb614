"""Does selective attention recall the last value of a variable in sequences longer than those it was trained on?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from trialist.data.recall import Task

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._evaluation import TrainedModelTrial
from trialist.trials._language_model import (
    BUILT_IN,
    PRELOAD,
    VERSIONS,
    arm_model,
    arm_remarks,
    attention_arms,
    check_inputs,
    check_length,
    model_context,
    model_inputs,
    train,
)
from trialist.trials._symbols import accuracy, mean_loss, symbol_ids

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
VALIDATION, EVALUATION = 30_001, 30_002
"""Seeds of the generated items that tune and that decide; the same items for every seed and arm"""


@dataclass(frozen=True)
class SelectiveRecallTrial(TrainedModelTrial):
    """Does selective attention recall the last value of a variable in sequences four times as long as in training?"""

    claim = Claim(
        statement="Trained on variable assignment with overwrites, selective attention keeps its accuracy at four times the "
        "training length, where standard attention loses it.",
        source="arXiv:2410.02703",
        reported="variable assignment is a motivating task of the paper: standard attention must spread over stale values",
        endpoint=Endpoint("accuracy_4x", unit="share of answers", better="higher", margin=0.05),
        secondary=(
            Endpoint("accuracy_2x", unit="share of answers", better="higher"),
            Endpoint("accuracy_1x", unit="share of answers", better="higher"),
        ),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=3, metric=Endpoint("validation_loss", unit="nats", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", batch=8, steps=200, test_items=128, seeds=3,
                     about="continued training of a given model, hours on 2 cores"),
        "gpu": dict(layers=6, width=256, heads=8, batch=256, steps=5_000, fewest=8, most=64, test_items=2048, seeds=6,
                    about="minutes on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.recall")
    versions = VERSIONS
    usage = (
        "from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM\n"
        'config = ModularDecoderConfig(num_hidden_layers=3, layer_types=["selective_attention"] * 3)\n'
        "model = ModularDecoderForCausalLM(config)"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains a small one from scratch"""
    layers: int = 3
    """Layers of the built-in decoder"""
    width: int = 64
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder (the control with more heads has twice as many of the same width)"""
    fewest: int = 4
    """Fewest pairs in a training sequence"""
    most: int = 24
    """Most pairs in a training sequence; the test asks at 1, 2 and 4 times as many"""
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
        return 2 * 4 * self.most + 3

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

    def remarks(self) -> tuple[str, ...]:
        return arm_remarks(self.model)

    def arms(self) -> Iterator[Arm]:
        return attention_arms(
            self.model, ("assignment", "copying"), learning_rate=self.learning_rate, learning_rates=LEARNING_RATES
        )

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.recall import VOCABULARY, RecallBatches

        device = resolve_device(self.device)
        model = arm_model(
            arm, context, self.model, device=device, lora=self.lora, vocab_size=VOCABULARY.size, layers=self.layers,
            width=self.width, heads=self.heads, length=self.longest,
        )  # fmt: skip
        symbols = symbol_ids(model.config.vocab_size, VOCABULARY.size)
        task = cast("Task", arm.setting)

        def batches(source: RecallBatches, step: int) -> dict[str, Any]:
            batch = source(step)
            labels = batch["labels"]
            named = {
                "input_ids": symbols[batch["input_ids"]],
                "labels": symbols[labels.clamp(min=0)].where(labels >= 0, labels),
            }
            return {name: tensor.to(device) for name, tensor in named.items()}

        training = RecallBatches(task, self.batch, context.stream("data_order"), self.fewest, self.most)

        def score(times: int) -> float:
            pairs = times * self.most
            items = RecallBatches(task, min(self.batch, self.test_items), EVALUATION, pairs, pairs)
            count = -(-self.test_items // items.batch_size)
            return sum(accuracy(model, batches(items, step)) for step in range(count)) / count

        outcome, last = train(
            model,
            lambda step: batches(training, step),
            context,
            steps=self.steps,
            learning_rate=arm["learning_rate"],
            dtype=self.dtype,
            evaluate=lambda _: {f"accuracy_{times}x": score(times) for times in (1, 2, 4)},
            evaluations=3,
        )
        if outcome.diverged is not None:
            return outcome
        validation = RecallBatches(task, self.batch, VALIDATION, self.fewest, self.most)
        loss = mean_loss(model, [batches(validation, step) for step in range(8)])
        outcome = dataclasses.replace(outcome, metrics={**last, "validation_loss": loss})
        if not self.benchmark:
            return outcome
        from trialist.data.tokenizers import load_tokenizer

        return self.hand_over(outcome, model, load_tokenizer(self.model), context, batch=self.batch)
