"""Does a model with selective attention keep more quality than others when its context is cut to a few tokens?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Endpoint, Outcome, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import check_positive, model_inputs, save
from trialist.trials._pruning import (
    bytes_of_all_tokens,
    bytes_of_entry,
    check_pruning,
    evict_by,
    first_rate,
    over_shares,
    pruning_arms,
    times_fewer_bytes,
    trained_model,
)
from trialist.trials._text import bits_per_byte, load_rows
from trialist.trials._text_trial import AnyModelTextTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
POINTS = (0.21, 0.12, 0.06, 0.0305)
"""Points of the curve: bytes of the cache as shares of those of the keys and values of all tokens; a little beyond the range"""
RANGE = (1 / 32, 1 / 5)
"""Range of the endpoint, in the same shares: the savings that the paper reports are of 5 to 47 times"""


@dataclass(frozen=True)
class ContextPruningTrial(AnyModelTextTrial):
    """Does selective attention keep more quality than standard attention in a cache of the same few bytes?"""

    claim = Claim(
        statement="At equal training tokens and equal bytes of cache, a model with selective attention that evicts what it "
        "has masked models text better than standard attention that keeps recent tokens or heavy hitters, and better than the "
        "same model that keeps those.",
        source="arXiv:2410.02703",
        reported="at the validation perplexity of a standard transformer, 16, 25 and 47 times less memory for the attention "
        "at contexts of 512, 1024 and 2048 tokens",
        endpoint=Endpoint("bits_per_byte_of_pruned", unit="bits per byte", better="lower", margin=0.02, floor=4.9),
        secondary=(
            Endpoint("times_fewer_bytes", unit="times", better="higher", scale="log"),
            Endpoint("bits_lost_by_pruning", unit="bits per byte", better="lower"),
            Endpoint("bits_per_byte_of_full", unit="bits per byte", better="lower"),
        ),
    )
    tuning = Tuning(tries=3, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "tiny": dict(test_bytes=32_768, calibration_rows=4, seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", length=512, batch=2, steps=150, test_bytes=65_536, calibration_rows=4, step=16,
            sinks=4, seeds=3, about="continued training of a given model, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            test_bytes=500_000, calibration_rows=32, dtype="bfloat16", seeds=3, about="some hours on one GPU",
        ),
        "paper": dict(
            data="allenai/c4:en", tokenizer="bpe-8192", layers=12, width=768, heads=12, length=512, batch=256, steps=524_288,
            test_bytes=10_000_000, calibration_rows=64, dtype="bfloat16", seeds=3, about="the paper's setting, many GPU days",
        ),
    }  # fmt: skip
    usage = (
        "from trialist.models import calibrate_budgets, enable_selective_attention\n"
        "from trialist.objectives import MemoryLoss\n"
        "enable_selective_attention(model)  # then train with MemoryLoss() as the objective\n"
        "calibrate_budgets(model, held_out_rows, total=4 * 64)  # generate() now keeps 64 tokens a layer on average"
    )

    price: float = 0.1
    """Price of remembering everything in the loss of the treatment, in nats a token (epsilon of the paper)"""
    sinks: int = 1
    """First tokens that the recency policy keeps; every text begins with a token that only marks its beginning"""
    recent_share: float = 0.5
    """Share of the budget that the heavy-hitter policy gives to the most recent tokens"""
    calibration_rows: int = 8
    """Sequences of training text, held out from training, on which the budgets of the layers are found"""
    step: int = 4
    """Smallest cut of a layer's budget, in tokens"""

    @property
    def held_out(self) -> int:
        return self.calibration_rows

    def check(self) -> None:
        check_positive(calibration_rows=self.calibration_rows, step=self.step)
        check_pruning(self)
        smallest = int(POINTS[-1] * self.length / 1.2) - 1
        if not 0 <= self.sinks < smallest:
            raise ValueError(
                f"--sinks {self.sinks}: the smallest budget is {smallest} tokens of --length {self.length}; give fewer sinks or "
                "a greater length"
            )
        super().check()

    def arms(self) -> Iterator[Arm]:
        return pruning_arms(self, ("text", "shuffled"), LEARNING_RATES)

    def train_arm(self, arm: Arm, context: Context) -> tuple[PreTrainedModel, Any, Outcome]:
        from trialist.objectives import MemoryLoss

        text, tokenizer = self.prepared(context, shuffled=arm.setting == "shuffled")
        model = self.new_model(arm, context, tokenizer)
        outcome, last = self.fit_text(
            model, text, context, learning_rate=arm["learning_rate"], part="validation", evaluations=2,
            objective=MemoryLoss(epsilon=arm["price"]),
        )  # fmt: skip
        return model, tokenizer, dataclasses.replace(outcome, metrics=last)

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        assert self.tuning is not None
        text, tokenizer = self.prepared(context, shuffled=arm.setting == "shuffled")
        model, outcome = self.trained(arm, context, text)
        if model is None or seed in self.tuning.seeds:
            return outcome
        outcome = dataclasses.replace(outcome, metrics={})
        rows = load_rows(text, "test")
        full = bits_per_byte(model, *rows, batch=self.batch)
        if arm["policy"] == "none":
            metrics = {
                "bits_per_byte_of_pruned": full, "times_fewer_bytes": 1.0, "bits_lost_by_pruning": 0.0,
                "bits_per_byte_of_full": full,
            }  # fmt: skip
            outcome = dataclasses.replace(outcome, metrics=metrics)
        else:
            points, notes = self.curve(arm, model, text, context)
            outcome = self.read(outcome, [(0.0, full), *points])
            curves = {**outcome.curves, "bits_per_byte_by_share_of_bytes": over_shares([(0.0, full), *points])}
            outcome = dataclasses.replace(outcome, curves=curves, notes=(*outcome.notes, *notes))
            if not arm.null:
                outcome = self.compare_bytes(outcome, arm, [(0.0, full), *points], text, context)
        if context.keep_model:
            save(model, tokenizer, context.model_folder)
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)

    def trained(self, arm: Arm, context: Context, text: Path) -> tuple[PreTrainedModel | None, Outcome]:
        given = model_inputs(self.model, self.device).get("model")
        sizes = (self.layers, self.width, self.heads) if given is None else (given, self.lora)
        inputs = (text.name, resolve_device(self.device), self.dtype, *sizes, self.length, self.batch, self.steps,
                  self.calibration_rows)  # fmt: skip
        return trained_model(self, arm, context, inputs)

    def curve(
        self, arm: Arm, model: PreTrainedModel, text: Path, context: Context
    ) -> tuple[list[tuple[float, float]], list[str]]:
        """Bits per byte of test text over the logarithm of the share of bytes that the cache really holds, and the points in
        words. Budgets come from training text that no model was trained on."""
        from trialist.models import calibrate_budgets, get_budgets, kv_bytes

        rows = load_rows(text, "test")
        held_out = load_rows(text, "train")[0].rows(slice(-self.calibration_rows, None))
        held_out = {key: tensor.to(model.device) for key, tensor in held_out.items()}
        row = held_out["input_ids"][:1]
        everything = bytes_of_all_tokens(model, row)
        evict_by(model, arm["policy"], self)
        entry, layers = bytes_of_entry(model, row, self.sinks + 2), len(get_budgets(model))
        budgets: Any = None
        points, notes = [], []
        for index, share in enumerate(POINTS):
            context.progress(index, len(POINTS))
            total = int(share * everything / entry) - layers  # a layer also holds the token that it evicts next
            budgets = calibrate_budgets(
                model,
                held_out,
                total=total,
                step=self.step,
                start=budgets,
                batch_size=self.batch,
                search="greedy",
                progress=False,
            )
            stored = kv_bytes(model, row) / everything
            quality = bits_per_byte(model, *rows, batch=self.batch)
            points.append((math.log2(stored), quality))
            notes.append(f"{stored:.3f} of all bytes: {quality:.4f} bits per byte, budgets {budgets}")
        return points, notes

    def read(self, outcome: Outcome, points: list[tuple[float, float]]) -> Outcome:
        """The outcome with what the curve says; its first point is the full cache."""
        from trialist.engine import tradeoff

        full = points[0][1]
        low, high = (math.log2(share) for share in RANGE)
        reading = tradeoff.area(points[1:], (low, high))
        if reading.value is None:
            return dataclasses.replace(outcome, undefined={"bits_per_byte_of_pruned": reading.reason or "undefined"})
        lost = {"bits_lost_by_pruning": reading.value - full, "bits_per_byte_of_full": full}
        return dataclasses.replace(outcome, metrics={"bits_per_byte_of_pruned": reading.value, **lost})

    def compare_bytes(
        self, outcome: Outcome, arm: Arm, points: list[tuple[float, float]], text: Path, context: Context
    ) -> Outcome:
        """The outcome with how many times fewer bytes give the quality that standard attention has with a full cache.

        The mark is a standard model of the same seed, trained at the learning rate of the trial, on the same test text.
        """
        name = "times_fewer_bytes"
        standard, trained = self.trained(
            arm.with_options(attention="standard", price=0.0, learning_rate=first_rate(self)), context, text
        )
        if standard is None:
            reason = f"the standard model that sets the mark diverged ({trained.diverged})"
            return dataclasses.replace(outcome, undefined={**outcome.undefined, name: reason})
        mark = bits_per_byte(standard, *load_rows(text, "test"), batch=self.batch)
        note = f"standard attention with a full cache: {mark:.4f} bits per byte"
        outcome = dataclasses.replace(outcome, notes=(*outcome.notes, note))
        reading = times_fewer_bytes(points, mark)
        if reading.value is None:
            return dataclasses.replace(outcome, undefined={**outcome.undefined, name: reading.reason or "undefined"})
        return dataclasses.replace(outcome, metrics={**outcome.metrics, name: reading.value})
