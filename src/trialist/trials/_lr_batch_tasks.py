"""Tasks of the learning-rate and batch study: generated ones for the built-in decoder, one's own rows for a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trialist.trials._language_model import BUILT_IN, model_context

if TYPE_CHECKING:
    from trialist.data.formats import Row
    from trialist.data.instruction_tasks import Symbols
    from trialist.engine.context import Context
    from trialist.trials.lr_batch_ratio import LearningRateBatchTrial

GENERATED = ("reasoning", "pattern", "format")
UNEQUAL_TWINS = ("long-format", "format")
"""One skill at two lengths: the first is harder"""

Rows = list[dict[str, Any]]
"""`input_ids` and `labels` of each row, (T,) int64; -100 in `labels` at what is no answer"""


def task_names(trial: LearningRateBatchTrial) -> tuple[str, ...]:
    """The tasks that are compared, the one that the claim favours first."""
    return GENERATED if trial.model == BUILT_IN else tuple(Path(name).stem for name in files(trial.data))


def symbols_of(trial: LearningRateBatchTrial, seed: int) -> Symbols:
    from trialist.data.instruction_tasks import Symbols

    return Symbols(seed, digits=trial.digits, letters=trial.letters, hops=trial.hops)


def task_rows(trial: LearningRateBatchTrial, context: Context, task: str, parts: Sequence[str]) -> list[Rows]:
    """The rows of some parts (`train`, `validation`, `test`) of a task."""
    if trial.model == BUILT_IN:
        symbols = symbols_of(trial, context.stream("tasks"))
        drawn = [symbols.rows(task, trial.counts[part], part) for part in parts]  # type: ignore[arg-type]
        return [
            [dict(zip(rows, columns, strict=True)) for columns in zip(*rows.values(), strict=True)] for rows in drawn
        ]
    own = OwnTask.of(trial, task)
    return [own.rows(trial, part) for part in parts]


@dataclass(frozen=True)
class OwnTask:
    """Rows of one kind of the user's own, split by what is asked."""

    source: str
    columns: tuple[str, ...]
    parts: Mapping[str, list[Row]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, trial: LearningRateBatchTrial, task: str) -> OwnTask:
        """Raises the errors of `read_rows` and of `split_documents`."""
        from trialist.data.corpora import Documents, parse_columns
        from trialist.data.formats import lead, read_rows
        from trialist.data.splits import split_documents

        names = files(trial.data)
        number = task_names(trial).index(task)
        mapping = trial.columns.split(";")
        columns, rows = read_rows(
            names[number], columns=parse_columns(mapping[number if len(mapping) > 1 else 0]), split=trial.split,
            max_examples=trial.max_examples,
        )  # fmt: skip
        asked = tuple(lead(row, columns) for row in rows)
        splits = split_documents(Documents(tuple(map(str, range(len(rows)))), asked, names[number]))
        parts = {
            part: [rows[int(index)] for index in getattr(splits, part).ids] for part in ("train", "validation", "test")
        }
        return cls(names[number], columns, parts, splits.notes)

    def rows(self, trial: LearningRateBatchTrial, part: str) -> Rows:
        """As many as the trial takes. Raises ValueError with the number where there are fewer to train on than needed."""
        from trialist.data.conversations import encode_rows
        from trialist.data.tokenizers import load_tokenizer

        wanted, found = trial.counts[part], self.parts[part]
        if part == "train" and len(found) < wanted:
            raise ValueError(
                f"{self.source}: {len(found):,} of its rows are to train on, and the largest cell of the grid needs {wanted:,} "
                "to pass each at most twice; lower --steps or --batch, or bring more rows"
            )
        encoded = encode_rows(
            found[:wanted], self.columns, load_tokenizer(trial.model), length=trial.length, chat=trial.chat,
            source=f"{self.source} ({part})",
        )  # fmt: skip
        return encoded.rows


def files(data: str) -> list[str]:
    return [name.strip() for name in data.split(",") if name.strip()]


def check_data(trial: LearningRateBatchTrial) -> None:
    """Raises ValueError or FileNotFoundError for tasks that cannot be trained on as the grid wants it."""
    names = files(trial.data)
    if trial.model == BUILT_IN:
        if names:
            raise ValueError(
                "--data are for a given model, the built-in decoder learns generated tasks; name a --model"
            )
        from trialist.data.instruction_tasks import PARTS

        symbols = symbols_of(trial, 0)
        for task in dict.fromkeys((*GENERATED, *UNEQUAL_TWINS)):
            for part in dict.fromkeys(PARTS):
                symbols.rows(task, trial.counts[part], part)  # type: ignore[arg-type]
        return
    if not 2 <= len(names) <= 3 or len(set(task_names(trial))) < len(names):
        raise ValueError(
            f"--model {trial.model} needs --data with two or three kinds of rows of different names, the one that a high ratio "
            f"should favour first, such as --data gsm8k.jsonl,chats.jsonl; found {', '.join(names) or 'none'}"
        )
    if len(trial.columns.split(";")) not in (1, len(names)):
        raise ValueError(
            f"--columns {trial.columns!r}: one list for all of --data, or {len(names)} with `;` between them"
        )
    context = model_context(trial.model)
    if context is not None and trial.length > context:
        raise ValueError(f"--length {trial.length} is longer than {trial.model} takes ({context}); lower it")
    for task in task_names(trial):
        own = OwnTask.of(trial, task)
        for name in own.parts:
            own.rows(trial, name)
