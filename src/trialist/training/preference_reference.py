"""Log-probabilities of answers under a fixed reference, token by token: computed once, for every method and every gamma."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from trialist.data.assets import cache_folder
from trialist.data.collation import stack_or_pad
from trialist.objectives.preference_rows import PROMPT, answer_logprobs

Rows = Sequence[Mapping[str, np.ndarray]]
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
    digest: of the reference (`model_digest`). With it the values are kept in a file of the user's cache (or of `folder`),
        named by digest, computation and all tokens, and read from there the next time; without it nothing is kept.
    Raises ValueError when a log-probability is not a number, naming the row from 0.
    """
    if digest is None:
        return _computed(model, rows, batch, autocast, share_prompt, say)
    path = reference_file(rows, digest, autocast, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one rank computes, the others wait and read
        if (kept := _read(path, rows)) is not None:
            return kept
        found = _computed(model, rows, batch, autocast, share_prompt, say)
        answers = [values[row["segments"] > PROMPT] for values, row in zip(found, rows, strict=True)]
        temporary = path.with_suffix(".tmp")
        save_file({"logprobs": np.concatenate(answers)}, temporary, metadata={"model": digest, "rows": str(len(rows))})
        os.replace(temporary, path)
    return found


def reference_file(rows: Rows, digest: str, autocast: torch.dtype | None = None, folder: Path | None = None) -> Path:
    """Where the values are kept: its name changes with the reference, the computation and any token of the rows."""
    key = hashlib.sha256(f"{digest} {autocast} {len(rows)}".encode())
    for row in rows:
        for name in ("input_ids", "segments"):
            key.update(f"{len(row[name])}".encode())
            key.update(np.ascontiguousarray(row[name], np.int64).tobytes())
    return (folder or cache_folder() / "reference-logprobs") / f"{key.hexdigest()[:32]}.safetensors"


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


def _read(path: Path, rows: Rows) -> list[np.ndarray] | None:
    """What an earlier call kept; a damaged file is removed, as it can be made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            flat = file.get_tensor("logprobs")
    except (SafetensorError, OSError):
        path.unlink()
        return None
    found, start = [], 0
    for row in rows:
        answers = row["segments"] > PROMPT
        values = np.zeros(len(answers), np.float32)
        values[answers] = flat[start : start + answers.sum()]
        found.append(values)
        start += int(answers.sum())
    return found


def _computed(
    model: Any, rows: Rows, batch: int, autocast: torch.dtype | None, share_prompt: bool, say: Callable[[str], None]
) -> list[np.ndarray]:
    reference: nn.Module = model if isinstance(model, nn.Module) else model()
    device = next(reference.parameters()).device
    training, found = reference.training, [np.zeros(0, np.float32)] * len(rows)
    order = np.argsort([-len(row["input_ids"]) for row in rows], kind="stable")  # like lengths together: little padding
    told = time.monotonic()
    reference.eval()
    try:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            tensors = stack_or_pad([{name: rows[i][name] for name in ("input_ids", "segments")} for i in part])
            with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                values = answer_logprobs(
                    reference,
                    tensors["input_ids"].to(device),
                    tensors["segments"].to(device),
                    share_prompt=share_prompt,
                )
            for index, scores in zip(part, values.float().cpu().numpy(), strict=True):
                found[index] = scores[: len(rows[index]["input_ids"])]
                if not np.isfinite(found[index]).all():
                    raise ValueError(
                        f"row {index}: the reference's log-probabilities are not numbers; is the model whole?"
                    )
            if time.monotonic() - told > SAY_EVERY:
                told = time.monotonic()
                say(f"reference: {start + len(part):,} of {len(rows):,} pairs scored")
    finally:
        reference.train(training)
    return found
