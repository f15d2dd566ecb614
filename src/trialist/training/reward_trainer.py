"""`trl.RewardTrainer` with soft labels, ties and each sequence scored once. The one place that knows TRL's private names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from trialist.data.preferences import encode_preferences, read_preferences
from trialist.data.reward_groups import collate_groups, group_pairs
from trialist.models.reward_model import padding_token
from trialist.objectives.reward import RewardLoss
from trialist.training.trainer import ObjectiveTrainer

try:
    from trl import RewardConfig, RewardTrainer
except ImportError as error:
    raise ImportError("training a reward model needs TRL: `pip install trialist[trl]`") from error

GROUP_COLUMNS = ("sequences", "pairs", "label_prob")


class RobustRewardTrainer(ObjectiveTrainer, RewardTrainer):  # type: ignore[misc]
    """`trl.RewardTrainer` for pairs with a probability (`label_prob`, 1/2 for a tie) that scores each sequence once.

    A row of its data, and so of a batch, is an anchor with all its pairs. Everything else is TRL's: `RewardConfig`, models
    from a name or as an object, `peft_config`, `center_rewards_coefficient`, `max_length`, no dropout. The gradient of a step is
    that of the mean over all its pairs, however they fall into anchors, micro-batches and ranks; `correct` and
    `eval_correct` are logged as shares.

    train_dataset, eval_dataset: a `Dataset` of preferences, plain or conversational, where `label_prob` (1 without it) and
        `source_index` (pairs of one index, else of one prompt, are an anchor) may stand beside prompt, chosen and rejected:
        what `augment_preferences` returns; or groups that `group_pairs` made. Answers longer than `max_length` lose their end.
    grouping: False scores both sequences of every pair: the same losses for up to five times the work.

    Columns are never removed as unused, so no label is lost on the way; a batch without one raises ValueError.
    """

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Any = None,
        processing_class: Any = None,
        grouping: bool = True,
        **options: Any,
    ) -> None:
        if args is None:
            raise ValueError("args: give a trl.RewardConfig, at least with its output_dir")
        arguments = copy.copy(args)
        if processing_class is None:
            from transformers import AutoTokenizer

            processing_class = AutoTokenizer.from_pretrained(
                model if isinstance(model, str) else model.config._name_or_path
            )
        self.grouping = grouping
        padding = padding_token(processing_class)
        options.setdefault("data_collator", partial(collate_groups, pad_token_id=padding))
        super().__init__(
            model,
            arguments,
            objective=RewardLoss(center=arguments.center_rewards_coefficient or 0.0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RewardConfig, dataset_name: str) -> Dataset:
        if set(GROUP_COLUMNS) <= set(dataset.column_names):
            return dataset
        rows = read_preferences(list(dataset))
        pairs, _ = encode_preferences(
            rows, processing_class, max_length=args.max_length or 2**31, source=f"{dataset_name} data"
        )
        return Dataset.from_list(grouped(rows, pairs, grouping=self.grouping))

    def _send_telemetry(self) -> None:
        """Nothing is told to anybody."""

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """TRL's card would say that TRL's loss made the model."""


def reward_config(arguments: TrainingArguments, *, center: float = 0.0) -> RewardConfig:
    """TRL's configuration with everything that `arguments` say, and none of TRL's own defaults for it."""
    with warnings.catch_warnings():  # TRL names an option as transformers no longer does
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        config = RewardConfig(arguments.output_dir, use_cpu=True, bf16=False, gradient_checkpointing=False)
    config.__dict__.update(arguments.__dict__)
    config.center_rewards_coefficient = center or None
    return config


def grouped(rows: list[dict[str, Any]], pairs: Any, *, grouping: bool = True) -> list[dict[str, list]]:
    """Groups of encoded pairs; labels and anchors are those of their rows."""
    labels = [_label(rows[pair.row]) for pair in pairs]
    anchors = [rows[pair.row].get("source_index") for pair in pairs]
    keys = [tuple(pair.prompt) if anchor is None else anchor for pair, anchor in zip(pairs, anchors)]
    return group_pairs(pairs, labels, anchors=keys, share=grouping)


def _label(row: Mapping[str, Any]) -> float:
    label = row.get("label_prob")
    return 1.0 if label is None else float(label)
