"""Does a recurrent-depth model answer deeper questions with more steps at test time than a model of fixed depth?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Endpoint, Outcome, Tuning
from trialist.trials._language_model import BUILT_IN, LEARNING_RATES_GIVEN_MODEL, PRELOAD, VERSIONS
from trialist.trials._walk_readings import by_hops, curve_by_hops, flops_per_answer, right, share_right, unlearnt
from trialist.trials._walks import EVALUATION, VALIDATION, Walker, WalkTrial, load_stage

HEALTH_ITEMS = 128
"""Test walks on which the health of the recurrence is measured"""


@dataclass(frozen=True)
class RecurrentDepthTrial(WalkTrial):
    """Does a recurrent-depth model, given twice its training steps, follow twice as many pointers as it was trained on?"""

    claim = Claim(
        statement="Trained on walks of up to h hops, a recurrent-depth model that is given twice its mean training steps answers "
        "walks of h + 1 to 2h hops, where the same layers run once, distinct layers of equal training FLOPs, and the model "
        "itself without the additional steps fail; the additional steps are paid with each answer.",
        source="arXiv:2502.05171",
        reported="3.5B parameters: accuracy rises with steps at test time and saturates (ARC-C 28.0, 35.2, 37.7, 38.2 at 4, 8, "
        "16, 32 steps); at 180B tokens GSM8K 9.0 against 1.8 for the core run once",
        endpoint=Endpoint("accuracy_deeper", unit="share of answers", better="higher", margin=0.05),
        secondary=(
            Endpoint("accuracy_trained", unit="share of answers", better="higher"),
            Endpoint("accuracy_hardest_trained", unit="share of answers", better="higher"),
            Endpoint("flops_per_answer", unit="FLOPs", better="lower", scale="log"),
        ),
        price="flops_per_answer",
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
        "paper": dict(width=1024, heads=16, layers="1,4,1", recurrence=32, backprop=8, nodes=32, letters=16, hops=32, batch=512,
                      steps=50_000, learning_rate=4e-5, test_items=2048, dtype="bfloat16", seeds=3,
                      about="the paper's small model at its mean of 32 steps and its learning rate, GPU days"),
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

    @property
    def numbers_of_steps(self) -> tuple[int, ...]:
        """Numbers of steps of the curves: the mean, twice the mean, and powers of two up to four times the mean."""
        powers = {2**power for power in range((4 * self.recurrence).bit_length())}
        return tuple(sorted(powers | {self.recurrence, 2 * self.recurrence}))

    def remarks(self) -> tuple[str, ...]:
        if self.model == BUILT_IN:
            return ()
        return (
            "the control `stack` is the given model with all its layers, whatever its FLOPs",
            "the reference `deep-stack` is left out: a given model cannot be built deeper",
        )

    def arms(self) -> Iterator[Arm]:
        scratch = self.model == BUILT_IN
        rates = tuple(self.learning_rate * factor for factor in (0.5, 1, 2)) if scratch else LEARNING_RATES_GIVEN_MODEL

        def arm(name: str, role: Any, kind: str, reading: int, about: str, tuned_as: str | None = None) -> Arm:
            options = {"learning_rate": rates[1], "kind": kind, "reading": reading}
            tune = None if tuned_as else {"learning_rate": rates}
            return Arm(name, role, "walks", options=options, tune=tune, tuned_as=tuned_as, about=about)

        mean, twice = self.recurrence, 2 * self.recurrence
        once = arm("once", "control", "once", 1, "the same layers and parameters, the core run once")
        recurrent = arm("recurrent", "treatment", "recurrent", twice,
                        "core run a random number of times, read at twice the mean")  # fmt: skip
        yield once
        yield arm("stack", "control", "stack", 1, "distinct layers, as many as cost the training FLOPs of `recurrent`")
        yield arm("recurrent-mean-steps", "control", "recurrent", mean, "the model of `recurrent`, read at its mean steps",
                  tuned_as="recurrent")  # fmt: skip
        yield recurrent
        if scratch:
            yield arm("deep-stack", "reference", "deep-stack", 1,
                      "distinct layers, as many as cost the FLOPs of an answer of `recurrent`")  # fmt: skip
        for either in (once, recurrent):
            yield dataclasses.replace(either, setting="coins", null=True, tune=None)

    def walker(self, arm: Arm) -> Walker:
        return self.walker_of("walks" if arm.setting == "walks" else "coins", arm["kind"], arm["learning_rate"])

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        walker, recurrent = self.walker(arm), arm["kind"] == "recurrent"
        if recurrent:
            model, outcome = load_stage(walker.stage(context, self.longest), self.device)
        else:
            model, outcome = walker.train(context, self.longest)
        if outcome.diverged is not None:
            return outcome
        assert model is not None
        model.eval()
        if recurrent:
            from trialist.models.recurrent_depth.steps import set_num_steps

            set_num_steps(model, arm["reading"])
            if context.keep_model:
                model.save_pretrained(context.model_folder)
        symbols = walker.symbols(model, context)
        items = walker.items(context, EVALUATION, self.test_items, self.longest)
        correct = right(model, items, symbols)
        metrics = {"flops_per_answer": flops_per_answer(model, items)}
        if arm.setting == "coins":  # every question is one hop
            share = share_right(correct)
            metrics |= {"accuracy_deeper": share, "accuracy_trained": share, "accuracy_hardest_trained": share}
            return dataclasses.replace(outcome, metrics=metrics)
        held_out = walker.items(context, VALIDATION, self.test_items, self.longest)
        # arms that read one model tune it as one: the rate is chosen at both readings, so that it favours neither
        tuned_at = [{"num_steps": steps} for steps in (self.recurrence, 2 * self.recurrence)] if recurrent else [{}]
        found = [share_right(right(model, held_out, symbols, **options)[:, self.hops :]) for options in tuned_at]
        metrics |= {
            "accuracy_trained": share_right(correct[:, : self.hops]),
            "accuracy_hardest_trained": share_right(correct[:, self.hops - 1]),
            "validation_accuracy": sum(found) / len(found),
        }
        undefined: dict[str, str] = {}
        notes: tuple[str, ...] = ()
        curves = {**outcome.curves, "accuracy_by_hops": curve_by_hops(correct)}
        reason = unlearnt(correct) if arm.role == "treatment" else None
        if reason is None:
            metrics["accuracy_deeper"] = share_right(correct[:, self.hops :])
        else:
            undefined["accuracy_deeper"] = reason
        if arm.role == "treatment":
            by_steps = self.curves_by_steps(model, walker, context)
            curves |= by_steps
            flops = dict(by_steps["flops_per_answer_by_steps"])
            more = flops[2 * self.recurrence] / flops[self.recurrence]
            notes = (
                f"an answer of {arm.name} takes {more:.2f} times the FLOPs of one at its mean steps; the FLOPs and times "
                "among the costs are those of training",
            )
        return dataclasses.replace(outcome, metrics=metrics, undefined=undefined, curves=curves, notes=notes)

    def curves_by_steps(
        self, model: Any, walker: Walker, context: Context
    ) -> dict[str, tuple[tuple[float, float], ...]]:
        """Against the number of steps: accuracy in bands of hops, FLOPs, and whether the recurrence is alive.

        The model is left at the last number of steps.
        """
        import torch

        from trialist.models.recurrent_depth.health import recurrence_gain, token_correlation
        from trialist.models.recurrent_depth.steps import set_num_steps

        symbols = walker.symbols(model, context)
        items = walker.items(context, EVALUATION, self.test_items, self.longest)
        width = max(1, self.hops // 2)
        bands = [(low, min(low + width - 1, self.longest)) for low in range(1, self.longest + 1, width)]
        named = {name: part[:HEALTH_ITEMS] for name, part in walker.named(items, symbols).items()}
        values: dict[str, list[tuple[float, float]]] = {}
        for steps in self.numbers_of_steps:
            set_num_steps(model, steps)
            shares = by_hops(right(model, items, symbols), bands)
            found = {f"accuracy_of_{band}_by_steps": share for band, share in shares.items()}
            found["flops_per_answer_by_steps"] = flops_per_answer(model, items)
            found["recurrence_gain_by_steps"] = recurrence_gain(model, named["input_ids"], labels=named["labels"])
            with torch.no_grad():
                output = model(named["input_ids"], output_latent_states=True, use_cache=False)
            found["token_correlation_by_steps"] = token_correlation(output.latent_states[-1])
            for name, value in found.items():
                values.setdefault(name, []).append((float(steps), value))
        return {name: tuple(points) for name, points in values.items()}
