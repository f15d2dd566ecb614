"""Does a recurrent-depth model answer deeper questions with more steps at test time than a model of fixed depth?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Tuning
from trialist.trials._language_model import BUILT_IN, LEARNING_RATES_GIVEN_MODEL, PRELOAD, VERSIONS
from trialist.trials._walks import EVALUATION, VALIDATION, Walker, WalkTrial, by_hops, load_stage, right

LEARNING_RATES = (7.5e-4, 1.5e-3, 3e-3)
READINGS = (1, 2, 4, 8, 16, 32)
"""Numbers of steps at which the recurrent model is read for the table of hops by steps"""


@dataclass(frozen=True)
class RecurrentDepthTrial(WalkTrial):
    """Does a recurrent-depth model, given twice its training steps, follow twice as many pointers as it was trained on?"""

    claim = Claim(
        statement="Trained on walks of up to h hops, a recurrent-depth model that is given twice its mean training steps answers "
        "walks of h + 1 to 2h hops, where the same layers run once, distinct layers of equal training FLOPs, and the model "
        "itself without the additional steps fail.",
        source="arXiv:2502.05171",
        reported="3.5B parameters: accuracy rises with steps at test time and saturates (ARC-C 28.0, 35.2, 37.7, 38.2 at 4, 8, "
        "16, 32 steps); at 180B tokens GSM8K 9.0 against 1.8 for the core run once",
        endpoint=Endpoint("accuracy_deeper", unit="share of answers", better="higher", margin=0.05),
        secondary=(
            Endpoint("accuracy_trained", unit="share of answers", better="higher"),
            Endpoint("accuracy_hardest_trained", unit="share of answers", better="higher"),
        ),
    )
    budget = Budget("tokens")
    tuning = Tuning(
        tries=3, metric=Endpoint("validation_accuracy", unit="share of answers", better="higher"), seeds=(1001, 1002)
    )
    presets = {
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(model="smollm2-135m-instruct", layers="2,4,2", recurrence=4, backprop=4, batch=16, steps=300,
                     test_items=128, seeds=3, about="a given model with a loop among its layers, hours on 2 cores"),
        "gpu": dict(width=256, heads=8, layers="1,2,1", nodes=16, letters=8, hops=16, recurrence=16, batch=256, steps=4_000,
                    test_items=2048, seeds=6, about="minutes on one GPU"),
    }  # fmt: skip
    preload = (*PRELOAD, "trialist.data.walks", "trialist.models.recurrent_depth.loop")
    versions = VERSIONS
    usage = (
        "from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM\n"
        'config = ModularDecoderConfig(num_hidden_layers=8, depth="recurrent", norm_style="sandwich",\n'
        '                              recurrent={"mean_recurrence": 16})\n'
        "model = ModularDecoderForCausalLM(config)  # model(ids, num_steps=32), model.generate(ids, num_steps=32)"
    )

    @property
    def longest(self) -> int:
        return 2 * self.hops

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return ("the control `stack` is the given model with all its layers, whatever its FLOPs",)

    def arms(self) -> Iterator[Arm]:
        scratch = self.model == BUILT_IN
        rates = LEARNING_RATES if scratch else LEARNING_RATES_GIVEN_MODEL
        default = self.learning_rate if scratch else rates[1]

        def arm(name: str, role: Any, kind: str, reading: int, about: str, null: bool = False) -> Arm:
            options = {"learning_rate": default, "kind": kind, "reading": reading}
            tune = None if null else {"learning_rate": rates}
            return Arm(name, role, "coins" if null else "walks", null, options=options, tune=tune, about=about)

        mean, twice = self.recurrence, 2 * self.recurrence
        yield arm("once", "control", "once", 1, "the same layers and parameters, the core run once")
        yield arm("stack", "control", "stack", 1, "distinct layers, as many as cost the training FLOPs of `recurrent`")
        yield arm(
            "recurrent-mean-steps", "control", "recurrent", mean, "the model of `recurrent`, read at its mean steps"
        )
        yield arm(
            "recurrent", "treatment", "recurrent", twice, "core run a random number of times, read at twice the mean"
        )
        yield arm("once", "control", "once", 1, "the same layers and parameters, the core run once", null=True)
        yield arm("recurrent", "treatment", "recurrent", twice, "read at twice the mean steps", null=True)

    def walker(self, arm: Arm) -> Walker:
        return self.walker_of("walks" if arm.setting == "walks" else "coins", arm["kind"], arm["learning_rate"])

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        walker = self.walker(arm)
        if arm["kind"] == "recurrent":
            model, outcome = load_stage(walker.stage(context, self.longest), self.device)
        else:
            model, outcome = walker.train(context, self.longest)
        if outcome.diverged is not None:
            return outcome
        assert model is not None
        if context.keep_model:
            model.save_pretrained(context.model_folder)
        symbols = walker.symbols(model, context)
        options = {} if arm["kind"] == "stack" else {"num_steps": arm["reading"]}
        correct = right(model, walker.items(context, EVALUATION, self.test_items, self.longest), symbols, **options)
        validation = right(model, walker.items(context, VALIDATION, self.test_items, self.longest), symbols, **options)
        if arm.setting == "coins":  # every question is one hop
            share = float(correct.float().mean())
            metrics = {"accuracy_deeper": share, "accuracy_trained": share, "accuracy_hardest_trained": share}
            return dataclasses.replace(
                outcome, metrics={**metrics, "validation_accuracy": float(validation.float().mean())}
            )
        metrics = {
            "accuracy_deeper": float(correct[:, self.hops :].float().mean()),
            "accuracy_trained": float(correct[:, : self.hops].float().mean()),
            "accuracy_hardest_trained": float(correct[:, self.hops - 1].float().mean()),
            "validation_accuracy": float(validation[:, self.hops :].float().mean()),
        }
        if arm.role == "treatment":
            metrics |= self.readings(model, walker, context)
        return dataclasses.replace(outcome, metrics=metrics)

    def readings(self, model: Any, walker: Walker, context: Context) -> dict[str, float]:
        """Accuracy by hops and steps, and whether the recurrence is alive."""
        import torch

        from trialist.models.recurrent_depth.health import recurrence_gain, token_correlation

        symbols = walker.symbols(model, context)
        items = walker.items(context, EVALUATION, self.test_items, self.longest)
        quarter = max(1, self.hops // 2)
        bands = [(low, min(low + quarter - 1, self.longest)) for low in range(1, self.longest + 1, quarter)]
        table = {
            f"{band}_steps_{steps}": value
            for steps in READINGS
            for band, value in by_hops(right(model, items, symbols, num_steps=steps), bands).items()
        }
        named = walker.named(items, symbols)
        with torch.no_grad():
            states = model(
                named["input_ids"], num_steps=2 * self.recurrence, output_latent_states=True, use_cache=False
            ).latent_states
        gain = recurrence_gain(model, named["input_ids"], labels=named["labels"], num_steps=self.recurrence)
        return {**table, "token_correlation": token_correlation(states[-1]), "recurrence_gain": gain}
