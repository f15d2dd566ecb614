"""The models of a world of facts: a base, its post-training, bases that were trained on from it, built once and shared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, given_model, model_inputs, new_decoder, train

if TYPE_CHECKING:
    from trialist.data.fact_world import FactWorld
    from trialist.trials.param_delta import ParamDeltaTrial

WARMUP = 0.05
"""Share of the steps over which the learning rate rises"""
FOREIGN_SEED = 500_000
"""Added to the seed of a lineage that shares nothing but architecture and facts"""


@dataclass(frozen=True)
class FactModels:
    """Folders of trained models (`folder/model`) for one run. Facts depend on the run's seed alone."""

    trial: ParamDeltaTrial
    context: Context

    @functools.cached_property
    def world(self) -> FactWorld:
        from trialist.data.fact_world import FactWorld

        return FactWorld(self.context.stream("facts"), old=self.trial.old, new=self.trial.new, names=self.trial.names)

    @property
    def foreign(self) -> Context:
        return dataclasses.replace(self.context, seed=self.context.seed + FOREIGN_SEED)

    def base(self) -> Path:
        """Has learned the old facts from statements."""
        return self._stage(self.context, "base", functools.partial(build_base, self, self.context, False))

    def post(self) -> Path:
        """The base, taught to answer questions about half of the old entities."""
        build = functools.partial(
            build_answering, self, self.base(), self.trial.sft_steps, self.trial.sft_learning_rate, WARMUP
        )
        return self._stage(self.context, "post", build)

    def new(self, setting: str, times: int) -> Path:
        """The base, or in the foreign setting another one, trained on with statements about old and new entities alike."""
        context, beginning = self.context, self.base
        if setting == "foreign":
            context = self.foreign
            beginning = functools.partial(
                self._stage, context, "base", functools.partial(build_base, self, context, True)
            )
        steps = times * self.trial.continued
        return self._stage(context, f"new-{steps}", functools.partial(build_new, self, context, beginning(), steps))

    def taught(self, start: Path, share: float, rate: float, warmup: float, folder: Path) -> Outcome:
        """A model, taught by the same questions as `post` with a share of its steps; built in `folder`, where an interrupted
        run goes on. Returns what it cost, and whether it diverged."""
        return build_answering(self, start, max(1, round(share * self.trial.sft_steps)), rate, warmup, folder)

    def _stage(self, context: Context, name: str, build: Callable[[Path], Outcome]) -> Path:
        """Keyed by all inputs of the trial but those of arms, its model by content. Raises ValueError where training diverges:
        nothing can be built on that."""

        def lasting(folder: Path) -> None:
            if (words := build(folder).diverged) is not None:
                raise ValueError(
                    f"the {name} that others are built on has diverged ({words}); lower the learning rates"
                )

        of_arms = {"direct_learning_rate", "short_learning_rate"}
        named = {field.name for field in dataclasses.fields(self.trial)} - {"model", "device"} - of_arms
        inputs = (name, context.seed, *model_inputs(self.trial.model, self.trial.device).values())
        return context.stage(
            "param-delta", (*inputs, *(getattr(self.trial, field) for field in sorted(named))), lasting
        )

    def symbols(self, model: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Turns batches into the model's token ids, on its device; those of a given model are spread over its vocabulary."""
        import torch

        from trialist.trials._symbols import symbol_ids

        size = self.world.size
        ids = torch.arange(size) if self.trial.model == BUILT_IN else symbol_ids(model.config.vocab_size, size)

        def named(batch: Mapping[str, Any]) -> dict[str, Any]:
            labels = batch["labels"]
            found = {
                "input_ids": ids[batch["input_ids"]],
                "labels": ids[labels.clamp(min=0)].where(labels >= 0, labels),
            }
            return {name: tensor.to(model.device) for name, tensor in found.items()}

        return named

    def scores(self, place: Path) -> dict[str, float]:
        """On questions whose entities no fine-tuning saw, half of the new ones for tuning alone, and nats per token of
        statements about all of them."""
        import torch

        from trialist.data.fact_world import StatementBatches
        from trialist.models.loading import load_model
        from trialist.objectives.cross_entropy import CrossEntropy

        model = load_model(str(place / "model"), device=resolve_device(self.trial.device))
        symbols = self.symbols(model)
        found: dict[str, float] = {}
        # the share right among sampled answers, without the noise of sampling; the greedy share is often exactly 0
        for name, part in (("new_facts", "new-test"), ("old_facts", "old-test")):
            found[f"{name}_greedy"], found[name] = answers(model, symbols(self.world.questions(part)))
        _, found["validation_new_facts"] = answers(model, symbols(self.world.questions("new-validation")))
        total = weight = 0.0
        statements = StatementBatches(self.world, ("old", "new"), 16, self.trial.length, self.world.seed)
        with torch.no_grad():
            for step in range(4):
                loss, stats = CrossEntropy()(model, symbols(statements(step)))
                total, weight = total + float(loss), weight + float(stats["weight"])
        return {**found, "statement_loss": total / weight}


def build_base(models: FactModels, context: Context, afresh: bool, folder: Path) -> Outcome:
    """afresh: the weights of a given model are drawn anew first."""
    from trialist.data.fact_world import StatementBatches
    from trialist.models.initialization import initialize_

    trial = models.trial
    if trial.model == BUILT_IN:
        model = new_decoder(
            context, device=trial.device, hidden_size=trial.width, vocab_size=models.world.size,
            num_hidden_layers=trial.layers, num_attention_heads=trial.heads, head_dim=trial.width // trial.heads,
            layer_types=["full_attention"] * trial.layers, max_position_embeddings=trial.length,
        )  # fmt: skip
    else:
        model = given_model(context, trial.model, device=trial.device, lora=0)
        if afresh:
            initialize_(model.cpu(), context.stream("init"))
            model = model.to(resolve_device(trial.device))
    batches = StatementBatches(models.world, ("old",), trial.batch, trial.length, context.stream("statements"))
    return _train(models, context, model, batches, folder, trial.steps, trial.learning_rate)


def build_new(models: FactModels, context: Context, base: Path, steps: int, folder: Path) -> Outcome:
    from trialist.data.fact_world import StatementBatches
    from trialist.models.loading import load_model

    trial = models.trial
    seed = context.stream("more statements")
    batches = StatementBatches(models.world, ("old", "new"), trial.batch, trial.length, seed)
    model = load_model(str(base / "model"), device=resolve_device(trial.device))
    return _train(models, context, model, batches, folder, steps, trial.learning_rate)


def build_answering(models: FactModels, start: Path, steps: int, rate: float, warmup: float, folder: Path) -> Outcome:
    """Any model, taught by the same questions in the same order. warmup: share of the steps."""
    from trialist.data.fact_world import QuestionBatches
    from trialist.models.loading import load_model

    trial = models.trial
    batches = QuestionBatches(models.world, "taught", 2 * trial.batch, models.context.stream("questions"))
    model = load_model(str(start / "model"), device=resolve_device(trial.device))
    return _train(models, models.context, model, batches, folder, steps, rate, warmup)


def _train(
    models: FactModels, context: Context, model: Any, batches: Any, folder: Path, steps: int, rate: float, warmup: float = WARMUP,
) -> Outcome:  # fmt: skip
    """Fills `folder`; the outcome has the cost and no metrics."""
    from trialist.training import Schedule

    symbols = models.symbols(model)
    outcome, _ = train(
        model.train(), lambda step: symbols(batches(step)), dataclasses.replace(context, folder=folder, keep_model=True),
        steps=steps, learning_rate=rate, dtype=models.trial.dtype, evaluate=lambda _: {}, evaluations=1,
        schedule=Schedule("cosine", warmup=max(1, round(warmup * steps))),
    )  # fmt: skip
    return outcome


def lineage_cosine(base: Path, new: Path) -> float:
    """What the lineage check looks at."""
    from trialist.weights.checkpoint import open_checkpoint
    from trialist.weights.lineage import likeness

    with open_checkpoint(str(base / "model")) as first, open_checkpoint(str(new / "model")) as second:
        found = likeness(first, second).cosine
    assert found is not None, "the models of this trial have matrices"
    return found


def answers(model: Any, questions: Mapping[str, Any]) -> tuple[float, float]:
    """Share of questions whose value and end of answer are the most probable tokens, and the mean probability of both."""
    import torch

    labels = questions["labels"][:, -2:]
    with torch.no_grad():
        logits = model(input_ids=questions["input_ids"], logits_to_keep=3, use_cache=False).logits[:, :-1]  # (B, 2, V)
    right = (logits.argmax(-1) == labels).all(1)
    chances = logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).sum(1).exp()
    return float(right.float().mean()), float(chances.mean())
