"""The recipe `reward`: a reward model from preferences, with ties and soft labels, and with counterfactual pairs on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.training.recipe import Recipe, Work

if TYPE_CHECKING:
    from trialist.data.preferences import PreferencePair

Rows = list[dict[str, Any]]
Groups = list[dict[str, list]]


@dataclass(frozen=True)
class RewardModelling(Recipe):
    """Reward model: a number for each answer, higher for those that your rows prefer.

    Rows hold `prompt`, `chosen`, `rejected` (strings, or lists of messages), and optionally `label_prob`, the probability that
    chosen is the better one: 0.5 is a tie. With --donors 2 each row is also compared with the answers of two other rows
    (robust reward model). The sequences of a prompt are scored once however many pairs they are in. The same command goes on
    after an interruption, to the bit on the CPU. The result is a sequence-classification model with one label.
    """

    model: str
    """Hub id, local folder or asset of a language model, or of a reward model to go on with"""
    columns: str = ""
    """Columns under other names, ours first: prompt=question,chosen=better,rejected=worse"""
    validation: float = 0.05
    """Share of the rows held out, by prompt; 0 for none; unused where you name validation data"""
    batch: int = 4
    """Prompts, each with all its pairs, in a micro-batch, per device"""
    accumulate: int = 4
    """Micro-batches in a step; every pair of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate; without it 1e-5, with LoRA 1e-4"""
    seed: int = 0
    """Of the new head, donors, the order of the data, adapters and dropout"""
    donors: int = 0
    """Other rows (1 or 2) whose answers become losers and ties for each prompt; 0 trains on the rows alone"""
    sample_fraction: float = 0.5
    """With --donors: share of the added pairs that is kept, drawn at random"""
    center: float = 0.0
    """Weight of a penalty that holds rewards near 0 (0.01 is usual); 0 is none"""
    grouping: bool = True
    """Score each sequence of a prompt once; otherwise once for each pair. The training is the same, only slower"""

    RATES: ClassVar = (1e-5, 1e-4)
    SHOWN: ClassVar = {"correct": "accuracy", "eval_correct": "validation accuracy"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("center")
        if self.donors not in (0, 1, 2):
            raise ValueError(f"--donors must be 0, 1 or 2, not {self.donors}")
        if not 0 < self.sample_fraction <= 1:
            raise ValueError(f"--sample-fraction must be above 0 and at most 1, not {self.sample_fraction}")

    def train(self, work: Work) -> Mapping[str, Any]:
        from datasets import Dataset

        from trialist.models.reward_model import load_reward_model, padding_token
        from trialist.training.reward_trainer import RobustRewardTrainer, reward_config

        groups, validation = self._examples(work)
        pairs, held, sequences = _count(groups, "pairs"), _count(validation, "pairs"), _count(groups, "sequences")
        work.say(
            f"{pairs:,} pairs of {len(groups):,} prompts, {sequences:,} sequences to score ({2 * pairs:,} pair by pair); held "
            f"out: {held:,}"
        )
        padding = padding_token(work.tokenizer)
        model, new = load_reward_model(self.model, dtype=self.weights_dtype, pad_token_id=padding, seed=self.seed)
        work.say(f"{type(model).__name__} with {'a new head' if new else 'the head it had'}")
        self.check_vocabulary(model, max(max(sequence) for group in groups for sequence in group["sequences"]))
        trained = self.prepared(model)
        arguments = self.arguments(work, self.total_steps(len(groups)), bool(validation))
        trainer = RobustRewardTrainer(
            trained,
            reward_config(arguments, center=self.center),
            train_dataset=Dataset.from_list(groups),
            eval_dataset=Dataset.from_list(validation) if validation else None,
            processing_class=work.tokenizer,
            optimizers=self.optimizers(trained),
        )
        sizes = {"pairs": pairs, "prompts": len(groups), "sequences": sequences}
        return self.run(work, trainer, sizes, {"eval_loss": "loss", "eval_correct": "accuracy"})

    def with_adapters(self, model: Any) -> Any:
        from trialist.models.reward_model import reward_adapters

        return reward_adapters(model, self.lora)

    def _examples(self, work: Work) -> tuple[Groups, Groups]:
        """What is trained on, with the pairs of donors, and what is held out of the original rows."""
        from trialist.data.augment_preferences import augment_preferences, prompt_text
        from trialist.training.reward_trainer import grouped

        rows, pairs = self._encoded(work, self.data, self.split)
        held_rows, held_pairs = rows, pairs[:0]
        if self.validation_data is not None:
            held_rows, held_pairs = self._encoded(work, self.validation_data, None)
        elif self.validation:
            kept, held = self.hold_out([prompt_text(rows[pair.row]) for pair in pairs])
            pairs, held_pairs = [pairs[i] for i in kept], [pairs[i] for i in held]
        held_pairs = [pair for pair in held_pairs if held_rows[pair.row].get("pair_type") in (None, "original")]
        if self.donors:
            own = [rows[pair.row] for pair in pairs]
            rows = augment_preferences(
                own, num_donors=self.donors, sample_fraction=self.sample_fraction, seed=self.seed
            )
            work.say(f"{len(rows):,} pairs of {len(own):,} rows with the answers of {self.donors} other rows each")
            pairs = self._pairs(work, rows, f"{self.data} with answers of other rows")
        return grouped(rows, pairs, grouping=self.grouping), grouped(held_rows, held_pairs)

    def _encoded(self, work: Work, data: str, split: str | None) -> tuple[Rows, list[PreferencePair]]:
        from trialist.data.preferences import read_preferences

        rows = read_preferences(data, columns=self.columns, split=split, max_examples=self.max_examples)
        for number, row in enumerate(rows, start=1):
            label = row.get("label_prob")
            if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
                raise ValueError(f"{data} row {number}: label_prob is {label!r}; a probability is from 0 to 1")
        return rows, self._pairs(work, rows, data)

    def _pairs(self, work: Work, rows: Rows, source: str) -> list[PreferencePair]:
        from trialist.data.preferences import encode_preferences, notes

        pairs, counts = encode_preferences(
            rows, work.tokenizer, max_length=work.length, context=work.context, source=source
        )
        for note in notes(counts, work.length):
            work.say(f"note: {source}: {note}")
        return pairs


def _count(groups: Groups, column: str) -> int:
    return sum(len(group[column]) for group in groups)
