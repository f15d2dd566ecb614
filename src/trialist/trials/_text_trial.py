"""What trials share whose arms train language models on one text and are scored in bits per byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Outcome
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
from trialist.trials._text import Text, bits_per_byte, load_rows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from trialist.data.packing import PackedRows


@dataclass(frozen=True)
class TextTrial(TrainedModelTrial):
    """A trial that trains decoders from scratch on one text."""

    budget = Budget("tokens")
    preload = (*PRELOAD, "trialist.data.packing", "trialist.data.order", "trialist.data.tokenizers")
    versions = VERSIONS

    data: str = "python-stdlib"
    """Text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name (python-stdlib, enwik8)"""
    tokenizer: str = "bytes"
    """Tokenizer of the built-in decoder: `bytes`, `bpe-N` for N tokens trained on the training split, or a model's"""
    layers: int = 4
    """Layers of the built-in decoder"""
    width: int = 128
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder"""
    length: int = 256
    """Tokens in a training sequence"""
    batch: int = 8
    """Sequences in a step"""
    steps: int = 200
    """Training steps"""
    learning_rate: float = 4e-3
    """Peak learning rate where nothing was tuned"""
    test_bytes: int = 65_536
    """Bytes of test text (and of validation text for tuning)"""
    split: str | None = None
    """Split of the data to read: `train` is cut 80/10/10, another name is the test set; without it as the data come"""
    columns: str = ""
    """Column that holds the text, text=NAME"""
    max_examples: int | None = None
    """Most documents to read"""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`"""
    dtype: str = "float32"
    """float32, or bfloat16 for autocast"""

    @property
    def base(self) -> str:
        """The model whose training is continued, or the built-in decoder."""
        return BUILT_IN

    @property
    def rank(self) -> int:
        """Of LoRA adapters; 0 trains all weights."""
        return 0

    @property
    def held_out(self) -> int:
        """Rows of the training text on which no arm trains."""
        return 0

    @property
    def text(self) -> Text:
        return Text(
            data=self.data,
            tokenizer=self.tokenizer if self.base == BUILT_IN else self.base,
            split=self.split,
            columns=self.columns,
            max_examples=self.max_examples,
            length=self.length,
            train_tokens=(self.steps * self.batch + self.held_out) * self.length,
            test_bytes=self.test_bytes,
        )

    def check(self) -> None:
        check_inputs(
            self.base, self.dtype, self.rank, layers=self.layers, width=self.width, heads=self.heads, length=self.length,
            batch=self.batch, steps=self.steps, test_bytes=self.test_bytes,
        )  # fmt: skip
        given = self.base != BUILT_IN
        if given:
            check_length(self.base, self.length)
        elif self.width % (2 * self.heads):
            raise ValueError(f"--width {self.width} must be an even multiple of --heads {self.heads}")
        self.text.check()
        known = None if self.text.tokenizer.startswith("bpe-") else self.text.tokenizer
        self.check_benchmark(known, model_context(self.base) if given else self.length)

    def digests(self) -> Mapping[str, str]:
        return {**model_inputs(self.base, self.device), "data": self.text.digest(), **self.benchmark_digests()}

    def remarks(self) -> tuple[str, ...]:
        return self.text.remarks()

    def prepared(self, context: Context, *, shuffled: bool) -> tuple[Path, Any]:
        """The folder of packed rows, and the tokenizer; `shuffled` puts each document's tokens in random order."""
        from trialist.data.tokenizers import load_tokenizer

        folder = self.text.stage(context, shuffled)
        tokenizer = load_tokenizer(str(folder))
        if self.benchmark and self.base == BUILT_IN:
            self.evaluation.check_fit(tokenizer, self.length)  # one that was trained just now is known only here
        return folder, tokenizer

    def fit_text(
        self,
        model: PreTrainedModel,
        folder: Path,
        context: Context,
        *,
        learning_rate: float,
        part: str,
        evaluations: int,
        **options: Any,
    ) -> tuple[Outcome, Mapping[str, float]]:
        """Trains on the packed rows of `folder`; bits per byte of `part` on the way and at the end.

        options: of `train`. Raises ValueError where the text does not fill more rows than are held out.
        """
        from trialist.data.order import PackedBatches

        rows = training_rows(folder, self.held_out)
        scored, name = load_rows(folder, part), "bits_per_byte" if part == "test" else f"{part}_bits_per_byte"
        device = resolve_device(self.device)
        batches = PackedBatches(rows, self.batch, context.stream("data_order"))

        def evaluate(trained: nn.Module) -> Mapping[str, float]:
            return {name: bits_per_byte(trained, *scored, batch=self.batch)}

        outcome, last = train(
            model, lambda step: {name: tensor.to(device) for name, tensor in batches(step).items()}, context,
            steps=self.steps, learning_rate=learning_rate, dtype=self.dtype, evaluate=evaluate, evaluations=evaluations,
            **options,
        )  # fmt: skip
        epochs = self.steps * self.batch / len(rows)
        notes = (f"the training text was passed {epochs:.1f} times",) if epochs > 1.05 else ()
        return dataclasses.replace(outcome, notes=notes), last


@dataclass(frozen=True)
class AnyModelTextTrial(TextTrial):
    """A trial that trains decoders from scratch on one text, or goes on with a given model."""

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains a small one from scratch"""
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    @property
    def base(self) -> str:
        return self.model

    @property
    def rank(self) -> int:
        return self.lora

    def new_model(self, arm: Arm, context: Context, tokenizer: Any) -> PreTrainedModel:
        """A fresh decoder, or the given model, with the arm's attention."""
        return arm_model(
            arm, context, self.model, device=resolve_device(self.device), lora=self.lora, vocab_size=len(tokenizer),
            layers=self.layers, width=self.width, heads=self.heads, length=self.length,
        )  # fmt: skip


def training_rows(folder: Path, held_out: int) -> PackedRows:
    """The rows of the training text but the last `held_out`. Raises ValueError where none is left."""
    from trialist.data.packing import PackedRows

    rows = load_rows(folder, "train")[0]
    left = len(rows) - held_out
    if left < 1:
        raise ValueError(
            f"the training text fills {len(rows)} sequences of {rows.length} tokens, and {held_out} of them are held out; give "
            "more text, a smaller --length or hold out fewer"
        )
    return PackedRows(rows.tokens[:left], rows.positions[:left], rows.pieces[:0])
