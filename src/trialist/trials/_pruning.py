"""What the trials of context pruning share: which models and evictions are compared, trained models as stages, and readings.

An arm says `attention` ("standard" or "selective") and `price`, with which its model was trained, and `policy`, by which tokens
leave its cache: "penalty" (what selective attention masked most), "recency", "h2o" or "none".
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Cost, Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, LEARNING_RATES_GIVEN_MODEL, save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.engine.tradeoff import Reading


class PruningTrial(Protocol):
    """What a trial brings along."""

    @property
    def model(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def price(self) -> float: ...
    @property
    def sinks(self) -> int: ...
    @property
    def recent_share(self) -> float: ...

    def train_arm(self, arm: Arm, context: Context) -> tuple[PreTrainedModel, Any, Outcome]:
        """The model of an arm, trained, its tokenizer or None, and an outcome with the metric that tunes."""


def first_rate(trial: PruningTrial) -> float:
    """The learning rate where nothing was tuned; a given model is trained more gently."""
    return trial.learning_rate if trial.model == BUILT_IN else LEARNING_RATES_GIVEN_MODEL[1]


def pruning_arms(trial: PruningTrial, settings: tuple[str, str], learning_rates: tuple[float, ...]) -> Iterator[Arm]:
    """Standard and selective attention, each under every eviction, in a setting and in a null setting.

    Three models are trained, and one arm of each tunes the learning rate that the others of that model take over.
    """
    rates = learning_rates if trial.model == BUILT_IN else LEARNING_RATES_GIVEN_MODEL
    standard = {"learning_rate": first_rate(trial), "attention": "standard", "heads": 1, "price": 0.0}
    selective = {**standard, "attention": "selective", "price": trial.price}
    for setting, null in zip(settings, (False, True), strict=True):
        tune = None if null else {"learning_rate": rates}
        yield Arm("recency", "control", setting, null, options={**standard, "policy": "recency"}, tune=tune,
                  about="standard attention; the first and the most recent tokens stay")  # fmt: skip
        yield Arm("heavy-hitters", "control", setting, null, options={**standard, "policy": "h2o"}, tuned_as="recency",
                  about="standard attention; tokens that received most attention and recent ones stay")  # fmt: skip
        yield Arm("selective-recency", "control", setting, null, options={**selective, "policy": "recency"},
                  tuned_as="selective",
                  about="the model of the treatment; the first and the most recent tokens stay")  # fmt: skip
        yield Arm("selective-heavy-hitters", "control", setting, null, options={**selective, "policy": "h2o"},
                  tuned_as="selective",
                  about="the model of the treatment; tokens that received most attention and recent ones stay")  # fmt: skip
        yield Arm("selective", "treatment", setting, null, tune=tune, options={**selective, "policy": "penalty"},
                  about="selective attention trained at a price on its memory; what it masked most goes")  # fmt: skip
        if not null:
            yield Arm("selective-free", "reference", setting, options={**selective, "policy": "penalty", "price": 0.0}, tune=tune,
                      about="the treatment without a price in training")  # fmt: skip
            yield Arm("full-cache", "reference", setting, options={**standard, "policy": "none"}, tuned_as="recency",
                      about="standard attention that keeps everything")  # fmt: skip


def check_pruning(trial: PruningTrial) -> None:
    """Raises ValueError for options that no arm can follow."""
    if not trial.price >= 0:
        raise ValueError(f"--price {trial.price}: at least 0")
    if not 0.0 <= trial.recent_share <= 1.0:
        raise ValueError(f"--recent-share {trial.recent_share}: a share of the budget, in [0, 1]")


def trained_model(
    trial: PruningTrial, arm: Arm, context: Context, inputs: tuple
) -> tuple[PreTrainedModel | None, Outcome]:
    """The trained model of an arm and its outcome, built once; None where training diverged.

    inputs: what the trained model depends on, the arm's model and learning rate aside.
    """
    from trialist.models.loading import load_model

    inputs = (*inputs, arm["attention"], arm["price"], arm["learning_rate"], context.seed)
    folder = context.stage("model", inputs, functools.partial(build_model, trial, arm, context))
    outcome = stored_outcome(folder / "outcome.json")
    if outcome.diverged is not None:
        return None, outcome
    return load_model(str(folder / "model"), device=resolve_device(trial.device)), outcome


def build_model(trial: PruningTrial, arm: Arm, context: Context, folder: Path) -> None:
    """Fills a stage: the trained model in `model`, and its cost, curve and tuning metric in `outcome.json`."""
    own = context.folder / f"{arm['attention']} {arm['price']} {arm['learning_rate']}"
    model, tokenizer, outcome = trial.train_arm(arm, dataclasses.replace(context, keep_model=False, folder=own))
    save(model, tokenizer, folder / "model")
    stored = dataclasses.asdict(outcome)
    (folder / "outcome.json").write_text(
        json.dumps({key: stored[key] for key in ("metrics", "curves", "cost", "diverged", "notes")})
    )


def stored_outcome(file: Path) -> Outcome:
    stored = json.loads(file.read_text())
    curves = {name: tuple((float(x), float(y)) for x, y in points) for name, points in stored["curves"].items()}
    return Outcome(
        metrics=stored["metrics"], curves=curves, cost=Cost(**stored["cost"]), diverged=stored["diverged"],
        notes=tuple(stored["notes"]),
    )  # fmt: skip


def evict_by(model: PreTrainedModel, policy: str, trial: PruningTrial) -> None:
    """Lets tokens leave the model's cache by `policy`, once it has budgets."""
    from trialist.models import enable_eviction

    options: dict[str, dict[str, Any]] = {
        "recency": {"sinks": trial.sinks},
        "h2o": {"recent_share": trial.recent_share},
    }
    if policy in options:
        enable_eviction(model, policy, **options[policy])


def bytes_of_all_tokens(model: PreTrainedModel, input_ids: Any) -> float:
    """Bytes of the keys and values of all tokens of a row, measured from a cache without budgets."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=input_ids, past_key_values=cache)
    return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))


def bytes_of_entry(model: PreTrainedModel, input_ids: Any, budget: int) -> float:
    """Bytes of a token in a layer's cache, with what the policy notes of it, measured under a small `budget`."""
    from trialist.models import get_budgets, kv_bytes, set_budgets

    set_budgets(model, budget)
    return kv_bytes(model, input_ids) / (len(get_budgets(model)) * (budget + 1))  # and the token that it evicts next


def over_shares(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points as a curve of an outcome: values over the share of the bytes of all tokens, whose log2 the points have."""
    return tuple((2**size, value) for size, value in sorted(points))


def times_fewer_bytes(points: Sequence[tuple[float, float]], mark: float) -> Reading:
    """How many times fewer bytes than those of all tokens suffice for a value of `mark` or below.

    points: log2 of the share of all bytes, and the value there; lower values are better. Points that more bytes do not
    improve on are left out. Undefined where `mark` is not reached, and where the fewest bytes reach it already.
    """
    from trialist.engine import tradeoff

    best: list[tuple[float, float]] = []
    for size, value in sorted(points):
        if not best or value < best[-1][1]:
            best.append((size, value))
    if mark < best[-1][1]:
        return tradeoff.Reading(None, f"{mark:.4f} is not reached: the best of the curve is {best[-1][1]:.4f}")
    if mark >= best[0][1]:
        fewer = 2 ** -best[0][0]
        return tradeoff.Reading(
            None, f"the fewest bytes of the curve, {fewer:.1f} times fewer, reach {mark:.4f} already"
        )
    reading = tradeoff.value_at([(value, size) for size, value in best], mark)
    return reading if reading.value is None else tradeoff.Reading(2**-reading.value)
