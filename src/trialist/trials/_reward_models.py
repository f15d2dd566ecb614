"""Reward models of a trial: fresh ones, their training, and the earlier one that an arm filters by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Outcome
from trialist.engine.hardware import resolve_device
from trialist.trials._language_model import BUILT_IN, train
from trialist.trials._reward_arms import GroupBatches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trialist.data.artefact_task import ArtefactTask
    from trialist.trials._reward_data import RewardData
    from trialist.trials.rrm import RRMTrial


class EarlierDiverged(Exception):
    """The model that an arm filters by has diverged, and with it the arm: an outcome, no failure."""

    def __init__(self, reason: str, spent: float) -> None:
        super().__init__(reason)
        self.spent = spent


def fresh_model(trial: RRMTrial, context: Context) -> PreTrainedModel:
    """A reward model to be trained, the same for all arms of a seed."""
    device, seed = resolve_device(trial.device), context.stream("init")
    if trial.model == BUILT_IN:
        return new_reward_model(seed, trial.task(), layers=trial.layers, width=trial.width).to(device)
    from trialist.data.tokenizers import load_tokenizer
    from trialist.models.reward_model import load_reward_model, padding_token, reward_adapters

    padding = padding_token(load_tokenizer(trial.model))
    model, _ = load_reward_model(trial.model, device=device, pad_token_id=padding, seed=seed)
    if not trial.lora:
        return model
    import torch

    torch.manual_seed(seed)
    return reward_adapters(model, trial.lora)


def new_reward_model(seed: int, task: ArtefactTask, *, layers: int, width: int) -> PreTrainedModel:
    """A small Llama with a reward head; its weights depend on seed and parameter name only."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from trialist.data.artefact_task import PAD
    from trialist.models.initialization import initialize_
    from trialist.models.reward_model import keep_heads_exact

    config = LlamaConfig(
        vocab_size=task.vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=task.longest, num_labels=1, pad_token_id=PAD, use_cache=False,
        initializer_range=width**-0.5,  # such small models learn late, or not at all, from the usual 0.02
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    initialize_(model, seed)
    keep_heads_exact(model)
    return model


def train_rewards(
    trial: RRMTrial,
    arm: Arm,
    context: Context,
    model: PreTrainedModel,
    batches: GroupBatches,
    evaluate: Callable[[Any], Mapping[str, float]],
) -> tuple[Outcome, Mapping[str, float]]:
    """Trains on batches of groups, without dropout as TRL does, and counts the sequence forwards."""
    from trialist.data.reward_groups import collate_groups
    from trialist.models import deterministic_scoring
    from trialist.objectives.reward import RewardLoss

    plan = batches.plan()
    if not plan:
        raise ValueError(f"--forwards {trial.forwards} leaves none to train on; raise it, or lower --pairs")
    device = resolve_device(trial.device)
    padding = model.config.get_text_config().pad_token_id

    def batch(step: int) -> dict[str, Any]:
        chosen = [batches.groups[index] for index in plan[step]]
        return {name: tensor.to(device) for name, tensor in collate_groups(chosen, pad_token_id=padding).items()}

    with deterministic_scoring(model):
        outcome, last = train(
            model, batch, context, steps=len(plan), learning_rate=arm["learning_rate"], dtype=trial.dtype, evaluate=evaluate,
            evaluations=1 if trial.own_rows else 2, objective=RewardLoss(),
        )  # fmt: skip
    cost = dataclasses.replace(outcome.cost, sequence_forwards=float(batches.spent(plan)))
    return dataclasses.replace(outcome, cost=cost), last


def earlier_model(trial: RRMTrial, arm: Arm, context: Context, data: RewardData) -> tuple[PreTrainedModel, int]:
    """The reward model to filter by, after one pass over the annotated pairs; and the sequence forwards it took.

    Raises EarlierDiverged.
    """
    from trialist.data.augment_preferences import augment_preferences
    from trialist.data.reward_groups import group_rows
    from trialist.models.reward_model import load_reward_model

    def build(folder: Path) -> None:
        rows = augment_preferences(data.train, include=("original",))
        groups = group_rows(rows, data.encode(rows))
        batches = GroupBatches(groups, trial.batch, 2 * len(groups), context.stream("data_order"))
        own = dataclasses.replace(context, folder=folder, keep_model=True)
        outcome, _ = train_rewards(trial, arm, own, fresh_model(trial, context), batches, lambda _: {})
        told = {"spent": outcome.cost.sequence_forwards, "diverged": outcome.diverged}
        (folder / "earlier.json").write_text(json.dumps(told))

    left_out = {"device", "model", "data", "forwards", "test_items", "sample_fraction", "min_gap", "learning_rate"}
    inputs = (getattr(trial, name) for name in sorted({field.name for field in dataclasses.fields(trial)} - left_out))
    key = (arm.setting, arm["learning_rate"], context.seed, *inputs, *sorted(trial.digests().items()))
    place = context.stage("rrm-earlier", key, build)
    told = json.loads((place / "earlier.json").read_text())
    if told["diverged"] is not None:
        raise EarlierDiverged(told["diverged"], told["spent"])
    loaded, _ = load_reward_model(str(place / "model"), device=resolve_device(trial.device))
    return loaded, int(told["spent"])
