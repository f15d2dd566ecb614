"""Does a model with selective attention keep more quality than others when its context is cut to a few tokens?"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Cost, Endpoint, Outcome, Tuning
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import (
    BUILT_IN,
    LEARNING_RATES_GIVEN_MODEL,
    check_positive,
    model_inputs,
    save,
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
        "has masked models text better than standard attention that keeps recent tokens or heavy hitters.",
        source="arXiv:2410.02703",
        reported="at the validation perplexity of a standard transformer, 16, 25 and 47 times less memory for the attention "
        "at contexts of 512, 1024 and 2048 tokens",
        endpoint=Endpoint("bits_per_byte_of_pruned", unit="bits per byte", better="lower", margin=0.02, floor=4.9),
        secondary=(
            Endpoint("bits_lost_by_pruning", unit="bits per byte", better="lower"),
            Endpoint("bits_per_byte_of_full", unit="bits per byte", better="lower"),
        ),
    )
    tuning = Tuning(tries=3, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
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
        if not self.price >= 0:
            raise ValueError(f"--price {self.price}: at least 0")
        if not 0.0 <= self.recent_share <= 1.0:
            raise ValueError(f"--recent-share {self.recent_share}: a share of the budget, in [0, 1]")
        smallest = int(POINTS[-1] * self.length / 1.2) - 1
        if not 0 <= self.sinks < smallest:
            raise ValueError(
                f"--sinks {self.sinks}: the smallest budget is {smallest} tokens of --length {self.length}; give fewer sinks or "
                "a greater length"
            )
        super().check()

    def arms(self) -> Iterator[Arm]:
        scratch = self.model == BUILT_IN
        rate = self.learning_rate if scratch else LEARNING_RATES_GIVEN_MODEL[1]
        for setting, null in (("text", False), ("shuffled", True)):
            tune = None if null else {"learning_rate": LEARNING_RATES if scratch else LEARNING_RATES_GIVEN_MODEL}
            standard = {"learning_rate": rate, "attention": "standard", "heads": 1, "price": 0.0}
            selective = {**standard, "attention": "selective"}
            yield Arm("recency", "control", setting, null, options={**standard, "policy": "recency"}, tune=tune,
                      about="standard attention; the first and the most recent tokens stay")  # fmt: skip
            yield Arm("heavy-hitters", "control", setting, null, options={**standard, "policy": "h2o"}, tune=tune,
                      about="standard attention; tokens that received most attention and recent ones stay")  # fmt: skip
            yield Arm("selective", "treatment", setting, null, tune=tune,
                      options={**selective, "policy": "penalty", "price": self.price},
                      about="selective attention trained at a price on its memory; what it masked most goes")  # fmt: skip
            if not null:
                yield Arm("selective-free", "reference", setting, options={**selective, "policy": "penalty"}, tune=tune,
                          about="the same without a price in training")  # fmt: skip
                yield Arm("full-cache", "reference", setting, options={**standard, "policy": "none"}, tune=tune,
                          about="standard attention that keeps everything")  # fmt: skip

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        from trialist.models.loading import load_model

        text, tokenizer = self.prepared(context, shuffled=arm.setting == "shuffled")
        given = model_inputs(self.model, self.device).get("model")
        sizes = (self.layers, self.width, self.heads) if given is None else (given, self.lora)
        inputs = (text.name, resolve_device(self.device), self.dtype, *sizes, self.length, self.batch, self.steps,
                  self.calibration_rows, arm["attention"], arm["price"], arm["learning_rate"], seed)  # fmt: skip
        trained = context.stage("model", inputs, functools.partial(train_model, self, arm, context, text))
        outcome = stored_outcome(trained / "outcome.json")
        if outcome.diverged is not None:
            return outcome
        model = load_model(str(trained / "model"), device=resolve_device(self.device))
        outcome = self.measure(arm, seed, model, text, context, outcome)
        if context.keep_model:
            save(model, tokenizer, context.model_folder)
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)

    def measure(
        self, arm: Arm, seed: int, model: PreTrainedModel, text: Path, context: Context, outcome: Outcome
    ) -> Outcome:
        """The curve of quality against bytes, and what it says. Budgets come from training text; runs that tune read
        validation text, the others test text."""
        from trialist.engine import tradeoff
        from trialist.models import calibrate_budgets, enable_eviction, get_budgets, kv_bytes, set_budgets

        assert self.tuning is not None
        tuning = seed in self.tuning.seeds
        rows = load_rows(text, "validation" if tuning else "test")
        full = bits_per_byte(model, *rows, batch=self.batch)
        name = "validation_bits_per_byte" if tuning else "bits_per_byte_of_pruned"
        if arm["policy"] == "none":
            metrics = {name: full, "bits_lost_by_pruning": 0.0, "bits_per_byte_of_full": full}
            return dataclasses.replace(outcome, metrics=metrics)
        held_out = load_rows(text, "train")[0].rows(slice(-self.calibration_rows, None))  # no model is trained on them
        held_out = {key: tensor.to(model.device) for key, tensor in held_out.items()}
        row = held_out["input_ids"][:1]
        everything = bytes_of_all_tokens(model, row)
        options: dict[str, dict[str, Any]] = {
            "recency": {"sinks": self.sinks},
            "h2o": {"recent_share": self.recent_share},
        }
        if arm["policy"] in options:
            enable_eviction(model, arm["policy"], **options[arm["policy"]])
        layers = len(get_budgets(model))
        set_budgets(model, self.sinks + 2)
        entry = kv_bytes(model, row) / (
            layers * (self.sinks + 3)
        )  # of a token in a layer, with what the policy notes of it
        budgets: Any = None
        points, notes = [], []
        for index, share in enumerate(POINTS):
            context.progress(index, len(POINTS))
            total = int(share * everything / entry) - layers  # a layer also holds the token that it evicts next
            budgets = calibrate_budgets(
                model, held_out, total=total, step=self.step, start=budgets, batch_size=self.batch, progress=False
            )
            stored = kv_bytes(model, row) / everything
            quality = bits_per_byte(model, *rows, batch=self.batch)
            points.append((math.log2(stored), quality))
            notes.append(f"{stored:.3f} of all bytes: {quality:.4f} bits per byte, budgets {budgets}")
        low, high = (math.log2(share) for share in RANGE)
        reading = tradeoff.area(points, (low, high))
        metrics, undefined = {}, {}
        if reading.value is None:
            undefined[name] = reading.reason or "undefined"
        else:
            metrics[name] = reading.value
            if not tuning:
                metrics |= {"bits_lost_by_pruning": reading.value - full, "bits_per_byte_of_full": full}
        return dataclasses.replace(outcome, metrics=metrics, undefined=undefined, notes=(*outcome.notes, *notes))


def bytes_of_all_tokens(model: PreTrainedModel, input_ids: Any) -> float:
    """Bytes of the keys and values of all tokens of a row, measured from a cache without budgets."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=input_ids, past_key_values=cache)
    return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))


def train_model(trial: ContextPruningTrial, arm: Arm, context: Context, text: Path, folder: Path) -> None:
    """Fills a stage: the trained model in `model`, and its cost and curve in `outcome.json`."""
    from trialist.data.tokenizers import load_tokenizer
    from trialist.objectives import CrossEntropy, MemoryLoss

    tokenizer = load_tokenizer(str(text))
    model = trial.new_model(arm, context, tokenizer)
    outcome, _ = trial.fit_text(
        model, text, dataclasses.replace(context, keep_model=False), learning_rate=arm["learning_rate"], part="validation",
        evaluations=2, objective=MemoryLoss(epsilon=arm["price"]) if arm["price"] > 0 else CrossEntropy(),
    )  # fmt: skip
    save(model, tokenizer, folder / "model")
    stored = dataclasses.asdict(outcome)
    (folder / "outcome.json").write_text(
        json.dumps({key: stored[key] for key in ("curves", "cost", "diverged", "notes")})
    )


def stored_outcome(file: Path) -> Outcome:
    """The outcome of a stage's training, without metrics."""
    stored = json.loads(file.read_text())
    curves = {name: tuple((float(x), float(y)) for x, y in points) for name, points in stored["curves"].items()}
    cost = Cost(**stored["cost"])
    return Outcome(curves=curves, cost=cost, diverged=stored["diverged"], notes=tuple(stored["notes"]))
