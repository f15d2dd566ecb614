"""Does minGRU model text as well as attention, with faster training steps at long context?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Endpoint, Outcome, Saving, Tuning
from trialist.trials._equal_parameters import parameters, widened
from trialist.trials._language_model import new_decoder
from trialist.trials._text import bits_per_byte, load_rows
from trialist.trials._text_trial import TextTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LONGER = 4
"""A training step is timed on one sequence so many times as long as in training"""
EXPANSIONS = {"full_attention": 1.0, "gru": 2 / 3, "min_gru": 4 / 3, "min_lstm": 1.0}
"""State over stream width at which a recurrent mixer has the 4 d^2 weights of attention"""


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
    tuning = Tuning(tries=4, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about 15 minutes on 2 cores, one run at a time"),
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
    steps: int = 700

    def arms(self) -> Iterator[Arm]:
        tune = {"learning_rate": LEARNING_RATES}
        for name, role, mixer, about in (
            ("attention", "control", "full_attention", "causal attention with rotary positions"),
            ("gru", "control", "gru", "GRU behind the same convolution"),
            ("min-gru", "treatment", "min_gru", "minGRU behind a causal convolution of 4 taps"),
            ("min-lstm", "reference", "min_lstm", "minLSTM behind the same convolution"),
        ):
            options = {"mixer": mixer, "learning_rate": self.learning_rate}
            yield Arm(name, role, "text", options=options, tune=None if role == "reference" else tune, about=about)  # type: ignore[arg-type]

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        folder, tokenizer = self.prepared(context, shuffled=False)
        model = new_decoder(context, device=self.device, **self.architecture(arm["mixer"], len(tokenizer)))
        outcome, last = self.fit_text(
            model, folder, context, learning_rate=arm["learning_rate"], part="test", evaluations=5, tokenizer=tokenizer
        )
        if outcome.diverged is not None:
            return outcome
        metrics = {
            **last,
            "validation_bits_per_byte": bits_per_byte(model, *load_rows(folder, "validation"), batch=self.batch),
            "long_step_seconds": step_seconds(model, LONGER * self.length, self.dtype),
        }
        outcome = dataclasses.replace(outcome, metrics=metrics)
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)

    def architecture(self, mixer: str, vocabulary: int) -> dict[str, Any]:
        """What `new_decoder` builds for a mixer: no arm has fewer parameters than the treatment."""

        def fields(mixer: str) -> dict[str, Any]:
            return {
                "vocab_size": vocabulary,
                "hidden_size": self.width,
                "intermediate_size": -(-8 * self.width // 3 // 8) * 8,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "layer_types": [mixer] * self.layers,
                "min_rnn": {"expansion": EXPANSIONS[mixer]},
                "max_position_embeddings": LONGER * self.length,
            }

        return widened(fields(mixer), least=parameters(fields("min_gru")))


def step_seconds(model: PreTrainedModel, length: int, dtype: str) -> float:
    """Fastest of three forward and backward passes on one sequence of random tokens, in seconds."""
    import torch

    from trialist.objectives import CrossEntropy

    device = model.device
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    taken = []
    for _ in range(4):  # the first warms up
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with precision:
            loss, _ = CrossEntropy()(model, {"input_ids": ids, "labels": ids})
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return min(taken[1:])
