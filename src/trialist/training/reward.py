"""The recipe `reward`: a reward model from preferences, with ties and soft labels, and with counterfactual pairs on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trialist.data.augment_preferences import KINDS, Kind
from trialist.training.recipe import Recipe, Work

if TYPE_CHECKING:
    from trialist.data.preferences import PreferencePair
    from trialist.data.reward_groups import Group

Rows = list[dict[str, Any]]
Pairs = list["PreferencePair"]


@dataclass(frozen=True)
class RewardModelling(Recipe):
    """Reward model: a number for each answer, higher for those that your rows prefer.

    Rows hold `prompt`, `chosen`, `rejected` (strings, or lists of messages), and optionally `label_prob`, the probability that
    chosen is the better one (0.5 is a tie), and `margin`, by how much its reward is to be higher. With --donors 2 each row is
    also compared with the answers of two other rows (robust reward model), and with --filter-model only where an earlier reward
    model is wrong or unsure. The sequences of a prompt are scored once however many pairs they are in. The same command goes on
    after an interruption, to the bit on the CPU. The result is a sequence-classification model with one label.
    """

    model: str
    """Hub id, local folder or asset of a language model, or of a reward model to go on with"""
    columns: str = ""
    """Columns under other names, ours first: prompt=question,chosen=better,rejected=worse"""
    validation: float = 0.05
    """Share of the rows held out, by prompt; 0 for none; unused where you name validation data"""
    batch: int = 4
    """Prompts with all their pairs in a micro-batch, per device; each of them is 2 sequences, with --donors up to 6, and a
    prompt of many rows counts once for every 16"""
    accumulate: int = 4
    """Micro-batches in a step; every pair of a step weighs the same"""
    learning_rate: float | None = None
    """Peak learning rate; without it 1e-5, with LoRA 1e-4"""
    seed: int = 0
    """Of the new head, donors, the order of the data and adapters; there is no dropout"""
    donors: int = 0
    """Other rows (1 or 2) whose answers become losers and ties for each prompt; 0 trains on the rows alone"""
    sample_fraction: float = 0.5
    """With --donors: share of the added pairs that is kept, drawn at random"""
    include: tuple[Kind, ...] = KINDS
    """With --donors: kinds of pairs to train on; without neutral there are no ties"""
    avoid_similar: bool = False
    """With --donors: prompts that are nearly the same text do not donate to each other"""
    filter_model: str | None = None
    """With --donors: an earlier reward model; added pairs that it has right are left out"""
    min_gap: float = 0.2
    """With --filter-model: least distance between its probability and the label's of added pairs that stay, 0 to 1"""
    drop_long: bool = False
    """Leave rows out whose prompt is longer than the model's context, instead of an error"""
    center: float = 0.0
    """Weight of a penalty that holds rewards near 0 (0.01 is usual); 0 is none"""
    grouping: bool = True
    """Whether a sequence is scored once, or once for each pair that it is in: the same training, only slower"""

    RATES: ClassVar = (1e-5, 1e-4)
    SHOWN: ClassVar = {"accuracy": "accuracy", "eval_accuracy": "validation accuracy"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("center")
        if self.donors not in (0, 1, 2):
            raise ValueError(f"--donors must be 0, 1 or 2, not {self.donors}")
        if not 0 < self.sample_fraction <= 1:
            raise ValueError(f"--sample-fraction must be above 0 and at most 1, not {self.sample_fraction}")
        if not 0 <= self.min_gap <= 1:
            raise ValueError(f"--min-gap must be from 0 to 1, not {self.min_gap}")
        if not self.include:
            raise ValueError(f"--include names no kind of pair; choose from {', '.join(KINDS)}")
        given = {"--include": set(self.include) != set(KINDS), "--avoid-similar": self.avoid_similar,
                 "--filter-model": self.filter_model is not None}  # fmt: skip
        if not self.donors and any(given.values()):
            name = next(name for name, there in given.items() if there)
            raise ValueError(f"{name} is about pairs that --donors adds; pass --donors 2")

    def train(self, work: Work) -> Mapping[str, Any]:
        from datasets import Dataset

        from trialist.models.reward_model import load_reward_model, padding_token
        from trialist.training.reward_trainer import RewardConfig, RobustRewardTrainer

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
        arguments = self.arguments(
            work,
            self.total_steps(len(groups)),
            bool(validation),
            RewardConfig,
            center_rewards_coefficient=self.center or None,
            gradient_checkpointing=False,  # the model has it on already where it was asked for
        )
        trainer = RobustRewardTrainer(
            trained,
            arguments,
            train_dataset=Dataset.from_list(groups),
            eval_dataset=Dataset.from_list(validation) if validation else None,
            processing_class=work.tokenizer,
            optimizers=self.optimizers(trained),
        )
        sizes = {"pairs": pairs, "prompts": len(groups), "sequences": sequences}
        validated = {"eval_loss": "loss"}
        if any(label != 0.5 for group in validation for label in group["label_prob"]):
            validated["eval_accuracy"] = "accuracy"
        return self.run(work, trainer, sizes, validated)

    def contents(self) -> dict[str, str]:
        from trialist.models.loading import model_digest

        more = {} if self.filter_model is None else {"filter model content": model_digest(self.filter_model)}
        return {**super().contents(), **more}

    def with_adapters(self, model: Any) -> Any:
        from trialist.models.reward_model import reward_adapters

        return reward_adapters(model, self.lora)

    def _examples(self, work: Work) -> tuple[list[Group], list[Group]]:
        """What is trained on, with the pairs of donors, and what is held out of the original rows."""
        from trialist.data.augment_preferences import augment_preferences, prompt_text
        from trialist.data.reward_groups import group_rows

        rows, pairs = self._encoded(work, self.data, self.split)
        held_rows, held_pairs = rows, pairs[:0]
        if self.validation_data is not None:
            held_rows, held_pairs = self._encoded(work, self.validation_data, None)
        elif self.validation:
            kept, held = self.hold_out([prompt_text(rows[pair.row]) for pair in pairs])
            pairs, held_pairs = [pairs[i] for i in kept], [pairs[i] for i in held]
            pairs = _without_answers_of(rows, pairs, held_pairs, work)
        held_out = bool(held_pairs)
        held_pairs = [pair for pair in held_pairs if held_rows[pair.row].get("pair_type") in (None, "original")]
        if held_out and not held_pairs:
            raise ValueError(
                f"{self.validation_data or 'the rows held out'}: all are added pairs (by pair_type), and validation is on "
                "original ones; give --validation-data with such rows, or pass --validation 0"
            )
        if self.donors:
            own = [pair.row for pair in pairs]
            rows = augment_preferences(
                rows, num_donors=self.donors, include=self.include, sample_fraction=self.sample_fraction, seed=self.seed,
                avoid_similar=self.avoid_similar, among=own, say=work.say,
            )  # fmt: skip
            work.say(f"{len(rows):,} pairs of {len(own):,} rows with the answers of {self.donors} other rows each")
            if self.filter_model is not None:
                rows = self._unlearnt(work, rows, self.filter_model)
            pairs = self._pairs(work, rows, f"{self.data} with answers of other rows")
        held_source = self.validation_data or self.data
        return (
            group_rows(rows, pairs, share=self.grouping, source=self.data),
            group_rows(held_rows, held_pairs, source=held_source),
        )

    def _unlearnt(self, work: Work, rows: Rows, name: str) -> Rows:
        """Original rows, and the added pairs that an earlier reward model has wrong or is unsure about."""
        from trialist.data.filter_preferences import filter_by_reward_model
        from trialist.models.reward_scoring import RewardScorer

        original = [row for row in rows if row["pair_type"] == "original"]
        added = [row for row in rows if row["pair_type"] != "original"]
        scorer = RewardScorer.load(name, dtype=self.dtype, device=str(self.compute_device))
        pairs = scorer.encode(added, source=f"added pairs for {name}", drop_long=True, say=work.say)
        rewards, scored = scorer.of_pairs(pairs, work.say)
        kept = filter_by_reward_model([added[pair.row] for pair in pairs], lambda _: rewards, min_gap=self.min_gap)
        work.say(f"{name} scored {scored:,} sequences; of {len(added):,} added pairs {len(kept):,} stay")
        if not original and not kept:
            raise ValueError(f"no pair is left with a gap of {self.min_gap}; lower --min-gap")
        return [*original, *kept]

    def _encoded(self, work: Work, data: str, split: str | None) -> tuple[Rows, Pairs]:
        from trialist.data.preferences import read_preferences
        from trialist.data.reward_groups import label_of, margin_of

        rows = read_preferences(data, columns=self.columns, split=split, max_examples=self.max_examples, chat=self.chat)
        for number, row in enumerate(rows, start=1):
            label_of(row, f"{data} row {number}")
            margin_of(row, f"{data} row {number}")
        return rows, self._pairs(work, rows, data)

    def _pairs(self, work: Work, rows: Rows, source: str) -> Pairs:
        from trialist.data.preferences import encode_preferences, notes

        pairs, counts = encode_preferences(
            rows, work.tokenizer, max_length=work.length, context=None if self.drop_long else work.context, source=source,
            whole=True,
        )  # fmt: skip
        for note in notes(counts, work.length):
            work.say(f"note: {source}: {note}")
        return pairs


def _without_answers_of(rows: Rows, pairs: Pairs, held: Sequence[PreferencePair], work: Work) -> Pairs:
    """The pairs that compare no answer of a row held out, as augmented rows may."""
    sources = {rows[pair.row].get("source_index") for pair in held} - {None}
    kept = [
        pair
        for pair in pairs
        if not sources & {rows[pair.row].get("chosen_index"), rows[pair.row].get("rejected_index")}
    ]
    if len(kept) < len(pairs):
        work.say(f"{len(pairs) - len(kept):,} of {len(pairs):,} pairs have an answer of a row held out: left out")
    return kept


def _count(groups: list[Group], column: str) -> int:
    return sum(len(group[column]) for group in groups)
