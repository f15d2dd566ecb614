"""The models of a world of facts: a base, its post-training, bases that were trained on from it, built once and shared."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, given_model, model_inputs, new_decoder, train

if TYPE_CHECKING:
    from trialist.data.fact_world import FactWorld
    from trialist.trials.param_delta import ParamDeltaTrial

FOREIGN_SEED = 500_000
"""Added to the seed of a lineage that shares nothing but architecture and facts"""


@dataclass(frozen=True)
class FactModels:
    """Folders of trained models (`folder/model`, `folder/cost.json`) for one run. Facts depend on the run's seed alone."""

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
        return self._stage(
            self.context, "post", functools.partial(build_answering, self, self.base(), *self.full_tuning)
        )

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

    def direct(self, setting: str, times: int) -> Path:
        """The new base, taught by the same questions as `post`."""
        build = functools.partial(build_answering, self, self.new(setting, times), *self.full_tuning)
        return self._stage(self.context, f"direct-{setting}", build)

    def short(self, start: Path, share: float, folder: Path) -> Path:
        """A model, taught with a share of the steps; built in `folder`."""
        steps = max(1, round(share * self.trial.sft_steps))
        build_answering(self, start, steps, self.trial.short_learning_rate, folder)
        return folder

    @property
    def full_tuning(self) -> tuple[int, float]:
        return self.trial.sft_steps, self.trial.sft_learning_rate

    def _stage(self, context: Context, name: str, build: Callable[[Path], Any]) -> Path:
        """Keyed by all inputs of the trial, its model by content."""
        named = {field.name for field in dataclasses.fields(self.trial)} - {"model", "device"}
        inputs = (name, context.seed, *model_inputs(self.trial.model, self.trial.device).values())
        return context.stage("param-delta", (*inputs, *(getattr(self.trial, field) for field in sorted(named))), build)

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
        """On questions whose entities no fine-tuning saw, and nats per token of statements about all of them."""
        import torch

        from trialist.data.fact_world import StatementBatches
        from trialist.models.loading import load_model
        from trialist.objectives.cross_entropy import CrossEntropy

        model = load_model(str(place / "model"), device=resolve_device(self.trial.device))
        symbols = self.symbols(model)
        found: dict[str, float] = {}
        for name, part in (("new_facts", "new-test"), ("old_facts", "old-test")):
            right, probability = answers(model, symbols(self.world.questions(part)))
            # the share right among sampled answers, without the noise of sampling; the greedy share is often exactly 0
            found |= {name: probability, f"{name}_greedy": right}
        total = weight = 0.0
        statements = StatementBatches(self.world, ("old", "new"), 16, self.trial.length, self.world.seed)
        with torch.no_grad():
            for step in range(4):
                loss, stats = CrossEntropy()(model, symbols(statements(step)))
                total, weight = total + float(loss), weight + float(stats["weight"])
        return {**found, "statement_loss": total / weight}


def build_base(models: FactModels, context: Context, afresh: bool, folder: Path) -> None:
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
    _train(models, context, model, batches, folder, trial.steps, trial.learning_rate)


def build_new(models: FactModels, context: Context, base: Path, steps: int, folder: Path) -> None:
    from trialist.data.fact_world import StatementBatches
    from trialist.models.loading import load_model

    trial = models.trial
    seed = context.stream("more statements")
    batches = StatementBatches(models.world, ("old", "new"), trial.batch, trial.length, seed)
    model = load_model(str(base / "model"), device=resolve_device(trial.device))
    _train(models, context, model, batches, folder, steps, trial.learning_rate)


def build_answering(models: FactModels, start: Path, steps: int, rate: float, folder: Path) -> None:
    """Any model, taught by the same questions in the same order."""
    from trialist.data.fact_world import QuestionBatches
    from trialist.models.loading import load_model

    trial = models.trial
    batches = QuestionBatches(models.world, "taught", 2 * trial.batch, models.context.stream("questions"))
    model = load_model(str(start / "model"), device=resolve_device(trial.device))
    _train(models, models.context, model, batches, folder, steps, rate)


def _train(
    models: FactModels, context: Context, model: Any, batches: Any, folder: Path, steps: int, rate: float
) -> None:
    """Raises ValueError where training diverges: nothing can be built on that."""
    symbols = models.symbols(model)
    outcome, _ = train(
        model.train(), lambda step: symbols(batches(step)), dataclasses.replace(context, folder=folder, keep_model=True),
        steps=steps, learning_rate=rate, dtype=models.trial.dtype, evaluate=lambda _: {}, evaluations=1,
    )  # fmt: skip
    if outcome.diverged is not None:
        raise ValueError(
            f"a model that others are built on has diverged ({outcome.diverged}); lower the learning rates"
        )
    (folder / "cost.json").write_text(json.dumps(outcome.cost.as_dict()))


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
