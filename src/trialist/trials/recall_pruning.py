"""Does a model that evicts what selective attention masked still answer when its cache holds a few tokens only?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Endpoint, Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import model_inputs, save
from trialist.trials._pruning import (
    bytes_of_all_tokens,
    bytes_of_entry,
    check_pruning,
    evict_by,
    over_shares,
    pruning_arms,
    times_fewer_bytes,
    trained_model,
)
from trialist.trials._recall import LEARNING_RATES, RecallTrial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.data.recall import Task

RANGE = (1 / 8, 1 / 2)
"""Range of the endpoint: bytes of the cache as shares of those of the keys and values of all tokens. With the defaults of 4
variables and 51 tokens a pair for each variable is 0.16 of them"""
POINTS = (0.6, 0.42, 0.32, 0.24, 0.18, 0.14, 0.11)
"""Points of the curve, in the same shares; a little beyond the range"""
RIGHT = 0.95
"""Share of answers at which the bytes that suffice are read"""


@dataclass(frozen=True)
class RecallPruningTrial(RecallTrial):
    """Does evicting what selective attention masked keep more answers right than other evictions, at equal bytes?"""

    claim = Claim(
        statement="On variable assignment with overwrites and at equal bytes of cache, a model with selective attention that "
        "evicts what it has masked gives more right answers than standard attention that keeps recent tokens or heavy hitters, "
        "and more than the same model that keeps those.",
        source="arXiv:2410.02703",
        reported="variable assignment is a motivating task of the paper: what was overwritten is masked and can go",
        endpoint=Endpoint("accuracy_of_pruned", unit="share of answers", better="higher", margin=0.05),
        secondary=(
            Endpoint("times_fewer_bytes", unit="times", better="higher", scale="log"),
            Endpoint("accuracy_lost_by_pruning", unit="share of answers", better="lower"),
            Endpoint("accuracy_of_full", unit="share of answers", better="higher"),
        ),
    )
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "gpu": dict(layers=6, width=256, heads=8, batch=256, steps=5_000, fewest=8, most=64, test_items=2048, seeds=6,
                    about="minutes on one GPU"),
    }  # fmt: skip
    usage = (
        "from trialist.models import enable_selective_attention, set_budgets\n"
        "from trialist.objectives import MemoryLoss\n"
        "enable_selective_attention(model)  # then train with MemoryLoss() as the objective\n"
        "set_budgets(model, 12)  # every layer keeps 12 tokens"
    )

    price: float = 0.1
    """Price of remembering everything in the loss of the treatment, in nats an answer (epsilon of the paper)"""
    sinks: int = 1
    """First tokens that the recency policy keeps; every sequence begins with a token that only marks its beginning"""
    recent_share: float = 0.5
    """Share of the budget that the heavy-hitter policy gives to the most recent tokens"""

    def check(self) -> None:
        check_pruning(self)
        smallest = int(POINTS[-1] * self.longest / 1.2) - 1
        if not 0 <= self.sinks < smallest:
            raise ValueError(
                f"--sinks {self.sinks}: the smallest budget is {smallest} of {self.longest} tokens; give fewer sinks, or longer "
                "sequences by --most"
            )
        super().check()

    def arms(self) -> Iterator[Arm]:
        return pruning_arms(self, ("assignment", "chance"), LEARNING_RATES)

    def train_arm(self, arm: Arm, context: Context) -> tuple[PreTrainedModel, Any, Outcome]:
        from trialist.objectives import MemoryLoss

        model, task = self.new_model(arm, context), cast("Task", arm.setting)
        outcome = self.fit_recall(
            model, task, context, learning_rate=arm["learning_rate"], objective=MemoryLoss(epsilon=arm["price"]),
            evaluate=lambda _: {"accuracy": self.score(model, task)},
        )  # fmt: skip
        return model, None, outcome

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        assert self.tuning is not None
        given = model_inputs(self.model, self.device).get("model")
        sizes = (self.layers, self.width, self.heads) if given is None else (given, self.lora)
        inputs = (resolve_device(self.device), self.dtype, *sizes, self.fewest, self.most, self.batch, self.steps,
                  self.test_items, arm.setting)  # fmt: skip
        model, outcome = trained_model(self, arm, context, inputs)
        if model is None or seed in self.tuning.seeds:
            return outcome
        full = self.score(model, cast("Task", arm.setting))
        if arm["policy"] == "none":
            metrics = {"accuracy_of_pruned": full, "accuracy_lost_by_pruning": 0.0, "accuracy_of_full": full}
            outcome = dataclasses.replace(
                outcome, metrics=metrics, undefined={"times_fewer_bytes": "this arm keeps everything"}
            )
        else:
            points = [(0.0, full), *self.curve(arm, model, context)]
            curves = {**outcome.curves, "accuracy_by_share_of_bytes": over_shares(points)}
            outcome = read(dataclasses.replace(outcome, curves=curves), points)
        if context.keep_model:
            save(model, None, context.model_folder)
        return self.with_benchmark_scores(outcome, model, context)

    def curve(self, arm: Arm, model: PreTrainedModel, context: Context) -> list[tuple[float, float]]:
        """Share of right answers over the logarithm of the share of bytes that the cache really holds; every layer has the same
        budget."""
        from trialist.models import get_budgets, kv_bytes, set_budgets

        task = cast("Task", arm.setting)
        row = self.items(model, task)[0]["input_ids"][:1]
        everything = bytes_of_all_tokens(model, row)
        evict_by(model, arm["policy"], self)
        entry = bytes_of_entry(model, row, self.sinks + 2) * len(get_budgets(model))
        points = []
        for index, share in enumerate(POINTS):
            context.progress(index, len(POINTS))
            set_budgets(model, int(share * everything / entry) - 1)  # a layer also holds the token that it evicts next
            points.append((math.log2(kv_bytes(model, row) / everything), self.score(model, task)))
        return points


def read(outcome: Outcome, points: list[tuple[float, float]]) -> Outcome:
    """The outcome with what the curve says; its first point is the full cache."""
    from trialist.engine import tradeoff

    full = points[0][1]
    metrics: dict[str, float] = {}
    undefined: dict[str, str] = {}
    area = tradeoff.area(points[1:], (math.log2(RANGE[0]), math.log2(RANGE[1])))
    if area.value is None:
        undefined["accuracy_of_pruned"] = area.reason or "undefined"
    else:
        metrics |= {
            "accuracy_of_pruned": area.value,
            "accuracy_lost_by_pruning": full - area.value,
            "accuracy_of_full": full,
        }
    fewer = times_fewer_bytes([(size, 1.0 - right) for size, right in points], 1.0 - RIGHT)
    if fewer.value is None:
        undefined["times_fewer_bytes"] = f"{RIGHT:.0%} right answers: as share of errors, {fewer.reason}"
    else:
        metrics["times_fewer_bytes"] = fewer.value
    return dataclasses.replace(outcome, metrics=metrics, undefined=undefined)
