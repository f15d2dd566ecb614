"""Log-probabilities of answers under a fixed reference, token by token: computed once, for every method and every gamma."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trialist.data.assets import cache_folder
from trialist.data.collation import stack_or_pad
from trialist.data.kept import kept_parts, remove_unused
from trialist.objectives.preference_rows import PROMPT, answer_logprobs

Rows = Sequence[Mapping[str, np.ndarray]]
PART = 128
"""Rows in a file: what an interruption can lose, and what a process takes at a time"""
SAY_EVERY = 15.0
"""Seconds between words on the progress"""


def reference_logprobs(
    model: nn.Module | Callable[[], nn.Module],
    rows: Rows,
    *,
    digest: str | None = None,
    batch: int = 8,
    autocast: torch.dtype | None = None,
    share_prompt: bool = False,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[np.ndarray]:
    """The column `ref_logprobs` for each row: log-probabilities in nats at the places of the answers' tokens, 0 elsewhere,
    float32, as long as the row.

    model: the reference, or what loads it, called only if there is something to compute. It scores in eval mode, on the
        device it is on, in micro-batches of `batch` pairs.
    rows: as `preference_row` makes them.
    digest: of the reference (`model_digest`), and whatever else decides about the bits of what it computes, such as its type
        and device. With it the values are kept in the user's cache (or in `folder`), in files of 128 rows that are read from
        there the next time: an interrupted call goes on with the files that are missing, and processes that make the same
        call at one time share them out. Without it nothing is kept.
    Raises ValueError when a log-probability is not a number, naming the row from 0.
    """
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")  # like lengths together: little padding
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    reference = _Reference(model, rows, batch, autocast, share_prompt, say)
    if digest is None:
        scored = [reference(part) for part in parts]
    else:
        place = reference_folder(rows, digest, batch, autocast, share_prompt, folder)
        scored = kept_parts(
            place,
            [int(reference.ends(part)[-1]) for part in parts],
            lambda number: reference(parts[number]),
            found=lambda number: reference.count(len(parts[number])),
            waits=lambda numbers: reference.wait(sum(len(parts[number]) for number in numbers)),
        )
        if folder is None:
            remove_unused(place.parent)
    found: list[np.ndarray] = [np.zeros(len(row["input_ids"]), np.float32) for row in rows]
    for part, flat in zip(parts, scored, strict=True):
        for index, values in zip(part, np.split(flat, reference.ends(part)[:-1]), strict=True):
            found[index][rows[index]["segments"] > PROMPT] = values
    return found


def reference_folder(
    rows: Rows,
    digest: str,
    batch: int,
    autocast: torch.dtype | None = None,
    share_prompt: bool = False,
    folder: Path | None = None,
) -> Path:
    """Where the values are kept: its name changes with the reference, with how they are computed and with any token of the
    rows, so that what is read has the bits of what would be computed."""
    key = hashlib.sha256(f"{digest} {batch} {autocast} {share_prompt} {len(rows)}".encode())
    for row in rows:
        for name in ("input_ids", "segments"):
            key.update(f"{len(row[name])}".encode())
            key.update(np.ascontiguousarray(row[name], np.int64).tobytes())
    return (folder or cache_folder() / "reference-logprobs") / key.hexdigest()[:32]


def tokenizer_difference(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, texts: Sequence[str]
) -> str | None:
    """In which way two tokenizers differ: a token, or how they cut a text; None where they do not."""
    first, second = ours.get_vocab(), theirs.get_vocab()
    differing = [token for token in {**first, **second} if first.get(token) != second.get(token)]
    if differing:
        token = min(differing, key=lambda name: (first.get(name, len(first)), name))
        return (
            f"{len(differing):,} tokens, the first {token!r}: {first.get(token, 'missing')} here, "
            f"{second.get(token, 'missing')} there"
        )
    for text in texts:
        here, there = (tokenizer(text, verbose=False)["input_ids"] for tokenizer in (ours, theirs))
        if here != there:
            return f"the text {text[:40]!r} has {len(here):,} tokens here, {len(there):,} there, or others"
    return None


@dataclass
class _Reference:
    """Scores rows; loads the model for the first of them."""

    model: Any
    rows: Rows
    batch: int
    autocast: torch.dtype | None
    share_prompt: bool
    say: Callable[[str], None]
    done: int = 0
    """Rows that are scored, here or elsewhere"""
    told: float = field(default_factory=time.monotonic)

    def ends(self, part: np.ndarray) -> np.ndarray:
        """Where each row's values end in those of the part."""
        return np.cumsum([int((self.rows[index]["segments"] > PROMPT).sum()) for index in part])

    def count(self, rows: int) -> None:
        self.done += rows

    def wait(self, rows: int) -> None:
        self.say(f"reference: waiting for another process, which scores {rows:,} of the pairs")

    def __call__(self, part: np.ndarray) -> np.ndarray:
        """The values at the tokens of the answers of these rows, one after the other."""
        if not isinstance(self.model, nn.Module):
            self.model = self.model()
        device, training = next(self.model.parameters()).device, self.model.training
        found: list[np.ndarray] = []
        self.model.eval()
        try:
            for start in range(0, len(part), self.batch):
                rows = [self.rows[index] for index in part[start : start + self.batch]]
                tensors = stack_or_pad([{name: row[name] for name in ("input_ids", "segments")} for row in rows])
                with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                    values = answer_logprobs(
                        self.model,
                        tensors["input_ids"].to(device),
                        tensors["segments"].to(device),
                        share_prompt=self.share_prompt,
                    )
                for row, scores in zip(rows, values.float().cpu().numpy(), strict=True):
                    found.append(scores[: len(row["segments"])][row["segments"] > PROMPT])
                    if not np.isfinite(found[-1]).all():
                        raise ValueError(
                            f"row {part[len(found) - 1]}: the reference's log-probabilities are not numbers; is the model whole?"
                        )
                if time.monotonic() - self.told > SAY_EVERY:
                    self.told = time.monotonic()
                    self.say(f"reference: {self.done + len(found):,} of {len(self.rows):,} pairs scored")
        finally:
            self.model.train(training)
        return np.concatenate(found)
