"""`trl.RewardTrainer` with soft labels, ties and each sequence scored once. The one place that knows TRL's private names."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

from datasets import Dataset

from trialist.data.preferences import encode_preferences, notes, read_preferences
from trialist.data.reward_groups import collate_groups, group_rows
from trialist.models.reward_model import padding_token
from trialist.objectives.reward import RewardLoss
from trialist.training.trainer import ObjectiveTrainer

try:
    from trl import RewardConfig, RewardTrainer
except ImportError as error:
    raise ImportError("training a reward model needs TRL: `pip install trialist[trl]`") from error

GROUP_COLUMNS = ("sequences", "pairs", "label_prob")
SHARES = {"accuracy": "correct", "margin": "margin"}
"""Of the pairs that are no tie: what is logged, and the sum that it is made of"""


class _Logged(RewardTrainer):  # type: ignore[misc]
    """Logs what is true of a part of the pairs as a share of that part, under TRL's names."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in [name for name in logs if name.endswith("decided")]:
            prefix, decided = name.removesuffix("decided"), logs.pop(name)
            sums = {shown: logs.pop(prefix + summed) for shown, summed in SHARES.items()}
            distance = logs.pop(f"{prefix}distance")
            if decided > 0:
                logs.update({prefix + shown: value / decided for shown, value in sums.items()})
            if decided < 1:
                logs[f"{prefix}tie_distance"] = distance / (1 - decided)
        super().log(logs, start_time)


class RobustRewardTrainer(ObjectiveTrainer, _Logged):  # type: ignore[misc]
    """`trl.RewardTrainer` for pairs with a probability (`label_prob`, 1/2 for a tie) that scores each sequence once.

    A row of its data, and so of a batch, is an anchor with all its pairs. Everything else is TRL's: `RewardConfig`, models
    from a name or as an object, `peft_config`, `center_rewards_coefficient`, `max_length`, no dropout. The gradient of a step is
    that of the mean over all its pairs, however they fall into anchors, micro-batches and ranks. `accuracy` (ties left out,
    equal rewards count one half), `margin` (by how much the better answer is above), `tie_distance`, `mean_reward` and
    `mean_squared_reward` are logged, and with `eval_` before them.

    train_dataset, eval_dataset: a `Dataset` of preferences, plain or conversational, where `label_prob` (1 without it),
        `margin` (0 without it) and `source_index` (pairs of one index, else of one prompt, are an anchor) may stand beside
        prompt, chosen and rejected: what `augment_preferences` returns; or groups that `group_pairs` made. Answers longer
        than `max_length` lose their end, where TRL leaves the row out; a warning counts these, and rows that are left out.
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
        rows, length, source = read_preferences(list(dataset)), args.max_length or 2**31, f"{dataset_name} data"
        pairs, counts = encode_preferences(rows, processing_class, max_length=length, source=source, whole=True)
        for note in notes(counts, length):
            warnings.warn(f"{source}: {note}", stacklevel=2)
        return Dataset.from_list(group_rows(rows, pairs, share=self.grouping, source=source))

    def _send_telemetry(self) -> None:
        """Nothing is told to anybody."""

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """TRL's card would say that TRL's loss made the model."""
