"""Does selective attention recall the last value of a variable in sequences longer than those it was trained on?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from trialist.data.recall import Task

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Endpoint, Outcome
from trialist.trials._language_model import arm_remarks, attention_arms
from trialist.trials._recall import LEARNING_RATES, RecallTrial


@dataclass(frozen=True)
class SelectiveRecallTrial(RecallTrial):
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
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", batch=8, steps=200, test_items=128, seeds=3,
                     about="continued training of a given model, hours on 2 cores"),
        "gpu": dict(layers=6, width=256, heads=8, batch=256, steps=5_000, fewest=8, most=64, test_items=2048, seeds=6,
                    about="minutes on one GPU"),
    }  # fmt: skip
    times = (1, 2, 4)
    usage = (
        "from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM\n"
        'config = ModularDecoderConfig(num_hidden_layers=3, layer_types=["selective_attention"] * 3)\n'
        "model = ModularDecoderForCausalLM(config)"
    )

    def remarks(self) -> tuple[str, ...]:
        return arm_remarks(self.model)

    def arms(self) -> Iterator[Arm]:
        return attention_arms(
            self.model, ("assignment", "copying"), learning_rate=self.learning_rate, learning_rates=LEARNING_RATES
        )

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        model, task = self.new_model(arm, context), cast("Task", arm.setting)
        outcome = self.fit_recall(
            model, task, context, learning_rate=arm["learning_rate"],
            evaluate=lambda _: {f"accuracy_{times}x": self.score(model, task, times) for times in self.times},
        )  # fmt: skip
        return outcome if outcome.diverged is not None else self.with_benchmark_scores(outcome, model, context)
