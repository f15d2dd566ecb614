"""The analysis `rewards`: what a reward model says of the answers in preference rows, and how often it agrees with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trialist.data.preferences import PreferencePair

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class RewardsAnalysis:
    """Score both answers of preference rows with a reward model, and see how often it agrees with the rows.

    Writes the rows with the columns chosen_reward and rejected_reward, by which `trialist apply filter-preferences` leaves out
    what the model has right. An answer that many pairs of a prompt share is scored once.
    """

    model: str
    """Reward model (sequence classification with one label): Hub id or local folder"""
    data: str
    """Rows of preferences: Hub id, local .jsonl, .json or .parquet file or folder"""
    output: str | None = None
    """File for the scored rows, .jsonl or .parquet; without it nothing is written"""
    columns: str = ""
    """Columns under other names, ours first: chosen=better,rejected=worse"""
    split: str | None = None
    """Split of the data; without it train, or all there is"""
    max_examples: int | None = None
    """Most rows to read"""
    length: int | None = None
    """Most tokens of a prompt with its answer; longer answers lose their end. Without it 1024, or the model's context"""
    batch: int = 16
    """Sequences in a forward pass"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the model computes in"""
    device: Literal["auto", "cpu"] = "auto"
    """The accelerator if there is one, or the CPU"""

    def __call__(self, say: Callable[[str], None] = print) -> Mapping[str, Any]:
        """Scores, writes, and returns accuracy, by kind of pair where the rows say it, and sizes."""
        import torch

        from trialist.data.filter_preferences import CHOSEN_REWARD, REJECTED_REWARD
        from trialist.data.preference_files import check_rows_output, write_rows
        from trialist.data.preferences import encode_preferences, notes, read_preferences
        from trialist.data.tokenizers import load_tokenizer
        from trialist.models.loading import model_context
        from trialist.models.reward_model import load_reward_model, padding_token

        output = None if self.output is None else check_rows_output(self.output)
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, not {self.batch}")
        rows = read_preferences(self.data, columns=self.columns, split=self.split, max_examples=self.max_examples)
        tokenizer = load_tokenizer(self.model)
        padding = padding_token(tokenizer)
        context = model_context(self.model)
        length = self.length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        if context is not None and length > context:
            raise ValueError(f"--length {length} is longer than {self.model} takes, {context} tokens")
        pairs, counts = encode_preferences(rows, tokenizer, max_length=length, context=context, source=self.data)
        for note in notes(counts, length):
            say(f"note: {note}")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if self.device == "cpu" or accelerator is None else str(accelerator)
        model, new = load_reward_model(self.model, dtype=self.dtype, device=device, pad_token_id=padding)
        if new:
            raise ValueError(
                f"model {self.model!r} is no reward model: it has no head for a reward; make one with `trialist train reward`"
            )
        rewards, scored = pair_rewards(model, pairs, pad_token_id=padding, batch=self.batch, say=say)
        found = [
            {**rows[pair.row], CHOSEN_REWARD: chosen, REJECTED_REWARD: rejected}
            for pair, (chosen, rejected) in zip(pairs, rewards, strict=True)
        ]
        if output is not None:
            write_rows(found, output)
        return {
            **agreement(found),
            "pairs": f"{len(pairs):,} of {len(rows):,} rows",
            "sequences scored": f"{scored:,} ({2 * len(pairs):,} pair by pair)",
            **({} if output is None else {"data": str(output)}),
        }


def pair_rewards(
    model: Any,
    pairs: Sequence[PreferencePair],
    *,
    pad_token_id: int,
    batch: int = 16,
    say: Callable[[str], None] | None = None,
) -> tuple[list[tuple[float, float]], int]:
    """The rewards of chosen and rejected of each pair, and how many sequences were scored: each distinct one once."""
    from trialist.models.reward_model import sequence_rewards

    sequences = [(*pair.prompt, *answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    tenths = [0]

    def progress(done: int, total: int) -> None:
        if say is not None and 10 * done // total > tenths[0]:
            tenths[0] = 10 * done // total
            say(f"scored {done:,} of {total:,} sequences")

    rewards = sequence_rewards(model, sequences, pad_token_id=pad_token_id, batch=batch, progress=progress).tolist()
    return list(zip(rewards[::2], rewards[1::2])), len(set(sequences))


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How often the rewards are in the order of the labels, ties left out, by kind of pair; and of ties the mean distance."""
    from trialist.data.filter_preferences import CHOSEN_REWARD, REJECTED_REWARD

    shown = {}
    kinds = [str(row.get("pair_type") or "original") for row in rows]
    for kind in dict.fromkeys(kinds):
        gaps = [
            (
                row[CHOSEN_REWARD] - row[REJECTED_REWARD],
                1.0 if row.get("label_prob") is None else float(row["label_prob"]),
            )
            for row, own in zip(rows, kinds)
            if own == kind
        ]
        decided = [gap if label > 0.5 else -gap for gap, label in gaps if label != 0.5]
        ties = [abs(gap) for gap, label in gaps if label == 0.5]
        name = kind.replace("_", "-")
        if decided:
            right = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in decided)
            shown[f"accuracy, {name}"] = f"{right / len(decided):.4f} of {len(decided):,}"
        if ties:
            shown[f"distance, {name}"] = f"{sum(ties) / len(ties):.4f} on average over {len(ties):,} ties"
    return shown
