"""Does selective attention model text better at equal training tokens?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
from trialist.trials._text import Text, bits_per_byte, load_rows

LEARNING_RATES = (2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class SelectiveAttentionTrial(TrainedModelTrial):
    """Does selective attention model text better than standard attention at equal training tokens?"""

    claim = Claim(
        statement="At equal training tokens, selective attention models text better than standard attention, "
        "also than standard attention with twice the heads.",
        source="arXiv:2410.02703",
        reported="language modelling on C4 as good as that of transformers with about twice the heads and attention "
        "parameters, for models up to about 1B parameters",
        endpoint=Endpoint("bits_per_byte", unit="bits per byte", better="lower", margin=0.02, floor=4.5),
    )
    budget = Budget("tokens")
    tuning = Tuning(tries=3, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "demo": dict(steps=180, batch=4, test_bytes=16_384, seeds=3, about="under 5 minutes on 2 cores"),
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", length=512, batch=2, steps=150, test_bytes=131_072, seeds=3,
            about="continued training of a given model, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            test_bytes=1_000_000, dtype="bfloat16", seeds=3, about="an hour on one GPU",
        ),
        "paper": dict(
            data="allenai/c4:en", tokenizer="bpe-8192", layers=12, width=768, heads=12, length=512, batch=256, steps=524_288,
            test_bytes=10_000_000, dtype="bfloat16", seeds=3, about="the paper's setting, many GPU days",
        ),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.packing", "trialist.data.order", "trialist.data.tokenizers")
    versions = VERSIONS
    usage = (
        "from transformers import AutoModelForCausalLM\n"
        "from trialist.models import enable_selective_attention\n"
        'model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")\n'
        "enable_selective_attention(model)  # then continue training: the heads must learn to select"
    )

    model: str = BUILT_IN
    """Hub id, local folder or asset of a model whose training is continued; `decoder` trains a small one from scratch"""
    data: str = "python-stdlib"
    """Text: Hub id, local .txt, .jsonl or .parquet file or folder, or a built-in name (python-stdlib, enwik8)"""
    tokenizer: str = "bytes"
    """Tokenizer of the built-in decoder: `bytes`, or `bpe-N` for N tokens trained on the training split"""
    layers: int = 4
    """Layers of the built-in decoder"""
    width: int = 128
    """Width of the built-in decoder"""
    heads: int = 4
    """Attention heads of the built-in decoder (the control with more heads has twice as many of the same width)"""
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
    lora: int = 0
    """Rank of LoRA adapters for a given model; 0 trains all weights"""

    def check(self) -> None:
        check_inputs(
            self.model, self.dtype, self.lora, layers=self.layers, width=self.width, heads=self.heads, length=self.length,
            batch=self.batch, steps=self.steps, test_bytes=self.test_bytes,
        )  # fmt: skip
        if self.model != BUILT_IN:
            check_length(self.model, self.length)
        elif self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}")
        self.text.check()
        known = None if self.model == BUILT_IN and self.tokenizer != "bytes" else self.text.tokenizer
        self.check_benchmark(known, self.length if self.model == BUILT_IN else model_context(self.model))

    def digests(self) -> Mapping[str, str]:
        return {**model_inputs(self.model, self.device), "data": self.text.digest(), **self.benchmark_digests()}

    def remarks(self) -> tuple[str, ...]:
        return (*self.text.remarks(), *arm_remarks(self.model))

    @property
    def text(self) -> Text:
        return Text(
            data=self.data,
            tokenizer=self.tokenizer if self.model == BUILT_IN else self.model,
            split=self.split,
            columns=self.columns,
            max_examples=self.max_examples,
            length=self.length,
            train_tokens=self.steps * self.batch * self.length,
            test_bytes=self.test_bytes,
        )

    def arms(self) -> Iterator[Arm]:
        return attention_arms(
            self.model, ("text", "shuffled"), learning_rate=self.learning_rate, learning_rates=LEARNING_RATES
        )

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.data.order import PackedBatches
        from trialist.data.tokenizers import load_tokenizer

        folder = self.text.stage(context, shuffled=arm.setting == "shuffled")
        tokenizer = load_tokenizer(str(folder))
        if self.benchmark and self.model == BUILT_IN:
            self.evaluation.check_fit(
                tokenizer, self.length
            )  # a tokenizer that was trained just now is known only here
        rows = {part: load_rows(folder, part) for part in ("train", "validation", "test")}
        device = resolve_device(self.device)
        model = arm_model(
            arm, context, self.model, device=device, lora=self.lora, vocab_size=len(tokenizer), layers=self.layers,
            width=self.width, heads=self.heads, length=self.length,
        )  # fmt: skip

        def score(trained: Any, part: str) -> float:
            return bits_per_byte(trained, *rows[part], batch=self.batch)

        batches = PackedBatches(rows["train"][0], self.batch, context.stream("data_order"))
        outcome, last = train(
            model,
            lambda step: {name: tensor.to(device) for name, tensor in batches(step).items()},
            context,
            steps=self.steps,
            learning_rate=arm["learning_rate"],
            dtype=self.dtype,
            evaluate=lambda trained: {"bits_per_byte": score(trained, "test")},
            evaluations=5,
            tokenizer=tokenizer,
        )
        if outcome.diverged is not None:
            return outcome
        epochs = self.steps * self.batch / len(rows["train"][0])
        outcome = dataclasses.replace(
            outcome,
            metrics={**last, "validation_bits_per_byte": score(model, "validation")},
            notes=(f"the training text was passed {epochs:.1f} times",) if epochs > 1.05 else (),
        )
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)
