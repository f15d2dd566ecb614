"""Does minGRU model text as well as attention, with faster training steps at long context?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Saving, Tuning
from trialist.trials._equal_parameters import parameters, widened
from trialist.trials._language_model import new_decoder
from trialist.trials._text import bits_per_byte, load_rows
from trialist.trials._text_trial import TextTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LONGER = 4
"""A training step is timed on one sequence so many times as long as in training"""
EXPANSIONS = {"gru": 2 / 3, "min_gru": 4 / 3, "min_lstm": 1.0}
"""State over stream width at which a recurrent mixer has the 4 d^2 weights of attention"""
TAPS = 4
"""Of the convolution"""
EQUAL_SECONDS = "equal-seconds"
MOST = 2
"""In that setting an arm trains at most so many times the steps of attention, and the text is so much longer"""


@dataclass(frozen=True)
class MinRNNTrial(TextTrial):
    """Does minGRU model text as well as attention and GRU of equal parameters, with faster steps at long context?"""

    claim = Claim(
        statement="At equal parameters and training tokens, minGRU models text as well as attention and as GRU, and a training "
        "step takes less time at long context.",
        source="arXiv:2410.01201",
        reported="test loss 1.548 (minGRU) against 1.547 (Transformer) nats a character on Shakespeare; a training step 175 "
        "times faster than that of a GRU stepping in Python, at 512 tokens on a T4",
        endpoint=Endpoint("bits_per_byte", unit="bits per byte", better="lower", margin=0.05, floor=4.5),
        secondary=(Endpoint("long_step_seconds", unit="s", better="lower"),),  # its unit makes runs go one at a time
        kind="non-inferiority",
        saving=Saving("long_step_seconds", least=0.4),
    )
    budget = Budget(
        "tokens", tolerance=0.1, reason="in equal-seconds the steps that fit are counted beforehand, from the time of one",
        settings={EQUAL_SECONDS: "seconds"},
    )  # fmt: skip
    tuning = Tuning(tries=4, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores, one run at a time"),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            test_bytes=1_000_000, dtype="bfloat16", seeds=3, about="an hour on one GPU",
        ),
        "paper": dict(
            data="enwik8", layers=6, width=384, heads=6, length=256, batch=64, steps=5_000, test_bytes=1_000_000, seeds=3,
            about="the size of the paper's character model, on other text",
        ),
    }  # fmt: skip
    usage = (
        "from trialist.models import MinGRU, ModularDecoderConfig, ModularDecoderForCausalLM\n"
        "output, state = MinGRU(256)(x)  # x: (B, T, 256); pass `state` to go on\n"
        'config = ModularDecoderConfig(num_hidden_layers=4, layer_types=["min_gru"] * 4)\n'
        "model = ModularDecoderForCausalLM(config)"
    )

    layers: int = 2
    length: int = 512
    batch: int = 2
    steps: int = 400

    def arms(self) -> Iterator[Arm]:
        for setting in ("text", EQUAL_SECONDS):
            for name, role, mixer, taps, about in (
                ("attention", "control", "full_attention", None, "causal attention with rotary positions"),
                ("attention-conv", "control", "conv_attention", TAPS, "attention behind the same convolution"),
                ("gru", "control", "gru", TAPS, "GRU behind the same convolution"),
                ("min-gru", "treatment", "min_gru", TAPS, f"minGRU behind a causal convolution of {TAPS} taps"),
                ("min-gru-no-conv", "reference", "min_gru", None, "minGRU without the convolution"),
                ("min-lstm", "reference", "min_lstm", TAPS, "minLSTM behind the same convolution"),
            ):
                if setting == "text" or role != "reference":
                    options = {"mixer": mixer, "taps": taps, "learning_rate": self.learning_rate}
                    tune = {"learning_rate": LEARNING_RATES} if setting == "text" else None
                    yield Arm(name, role, setting, options=options, tune=tune, about=about)  # type: ignore[arg-type]

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        timed = arm.setting == EQUAL_SECONDS
        text = dataclasses.replace(self, steps=MOST * self.steps) if timed else self
        folder, tokenizer = text.prepared(context, shuffled=False)
        model = self.new_model(arm["mixer"], arm["taps"], context, len(tokenizer))
        trained = dataclasses.replace(self, steps=self.affordable_steps(model, arm, context)) if timed else self
        outcome, last = trained.fit_text(
            model,
            folder,
            context,
            learning_rate=arm["learning_rate"],
            part="test",
            evaluations=5,
            tokenizer=tokenizer,
            over="seconds" if timed else "tokens",
        )
        if outcome.diverged is not None:
            return outcome
        metrics = {
            **last,
            "validation_bits_per_byte": bits_per_byte(model, *load_rows(folder, "validation"), batch=self.batch),
            "long_step_seconds": step_seconds([model], 1, LONGER * self.length, self.dtype)[0],
        }
        outcome = dataclasses.replace(outcome, metrics=metrics)
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)

    def affordable_steps(self, model: PreTrainedModel, arm: Arm, context: Context) -> int:
        """Training steps in the time of `steps` steps of attention: both are timed in turn, once, before the training."""
        if arm["mixer"] == "full_attention":
            return self.steps
        counted = context.folder / "steps"  # kept for a run that is interrupted and goes on
        if not counted.exists():
            attention = self.new_model("full_attention", None, context, model.config.vocab_size)
            theirs, ours = step_seconds([attention, model], self.batch, self.length, self.dtype)
            counted.parent.mkdir(parents=True, exist_ok=True)
            counted.write_text(str(max(1, min(MOST * self.steps, round(self.steps * theirs / ours)))))
        return int(counted.read_text())

    def new_model(self, mixer: str, taps: int | None, context: Context, vocabulary: int) -> PreTrainedModel:
        return new_decoder(context, device=self.device, **self.architecture(mixer, taps, vocabulary))

    def architecture(self, mixer: str, taps: int | None, vocabulary: int) -> dict[str, Any]:
        """What `new_decoder` builds for a mixer: no arm has fewer parameters than the treatment."""

        def fields(name: str, taken: int | None) -> dict[str, Any]:
            expansion = {"expansion": EXPANSIONS[name]} if name in EXPANSIONS else {}
            return {
                "vocab_size": vocabulary,
                "hidden_size": self.width,
                "intermediate_size": -(-8 * self.width // 3 // 8) * 8,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "layer_types": [name] * self.layers,
                "min_rnn": None if name == "full_attention" else {**expansion, "conv_kernel": taken},
                "max_position_embeddings": LONGER * self.length,
            }

        return widened(fields(mixer, taps), least=parameters(fields("min_gru", TAPS)))


def step_seconds(models: Sequence[PreTrainedModel], batch: int, length: int, dtype: str) -> list[float]:
    """Fastest of three forward and backward passes of each model on random tokens `(batch, length)`, in turn, in seconds."""
    import torch

    from trialist.objectives import CrossEntropy

    device = models[0].device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(models[0].config.vocab_size, (batch, length), generator=generator).to(device)
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(4):  # the first warms up
        for model, seconds in zip(models, taken, strict=True):
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            with precision:
                loss, _ = CrossEntropy()(model, {"input_ids": ids, "labels": ids})
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    return [min(seconds[1:]) for seconds in taken]
