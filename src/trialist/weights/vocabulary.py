"""Which row of one model's embedding means the same token as which row of another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trialist.data.tokenizers import load_tokenizer
from trialist.weights.checkpoint import Checkpoint

Key = str | int
"""What a row stands for: the token, or the row's own number where the tokenizer gives it to no token"""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
VOCABULARY_FILES = TOKENIZER_FILES[:1] + TOKENIZER_FILES[4:]


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    return any((checkpoint.folder / name).is_file() for name in VOCABULARY_FILES)


def same_tokenizer(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether all have tokenizers whose files are equal byte for byte, which saves loading them."""
    first, *others = ({name: _bytes(c.folder / name) for name in TOKENIZER_FILES} for c in checkpoints)
    return has_tokenizer(checkpoints[0]) and all(other == first for other in others)


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def keys_of(checkpoint: Checkpoint, rows: int) -> list[Key] | None:
    """What each row stands for; None where the model has no tokenizer. Tokens beyond the rows have no weights to add to."""
    if not has_tokenizer(checkpoint):
        return None
    keys: list[Key] = list(range(rows))
    for token, number in load_tokenizer(str(checkpoint.folder)).get_vocab().items():
        if number < rows:
            keys[number] = token
    return keys


def differences(first: Sequence[Key], second: Sequence[Key]) -> list[str]:
    """Rows that stand for different tokens, in words."""
    shared = [
        f"row {row}: {one!r} and {other!r}" for row, (one, other) in enumerate(zip(first, second)) if one != other
    ]
    longer = first if len(first) > len(second) else second
    return shared + [
        f"row {row}: {longer[row]!r} in one of them only" for row in range(min(len(first), len(second)), len(longer))
    ]


@dataclass(frozen=True)
class RowMap:
    """For each of R output rows the row in the new base, and in post and base of each delta; -1 where there is none.

    A row that the new base lacks is copied from the first post-trained model that has it: there is nothing to add to.
    """

    new: Tensor  # (R,)
    deltas: tuple[tuple[Tensor, Tensor], ...]  # (R,) each: post, base; both -1 where one of them lacks the token
    source: Tensor  # (R,) which delta's post the row is copied from, -1 where it is computed
    copied: Tensor  # (R,) the row there

    def __len__(self) -> int:
        return len(self.new)


def map_rows(
    output: Sequence[Key], new: Sequence[Key], deltas: Sequence[tuple[Sequence[Key], Sequence[Key]]]
) -> RowMap:
    """Rows by token. output, new, deltas: what the rows of the output, of the new base, of posts and bases stand for."""
    row_new = _rows(output, new)
    source = torch.full((len(output),), -1)
    copied = torch.full((len(output),), -1)
    pairs = []
    for number, (post, base) in enumerate(deltas):
        row_post, row_base = _rows(output, post), _rows(output, base)
        takes = (row_new < 0) & (source < 0) & (row_post >= 0)
        source[takes], copied[takes] = number, row_post[takes]
        both = (row_new >= 0) & (row_post >= 0) & (row_base >= 0)
        pairs.append((row_post.where(both, -1), row_base.where(both, -1)))
    assert not bool(((row_new < 0) & (source < 0)).any()), "the output's rows come from one of the models"
    return RowMap(row_new, tuple(pairs), source, copied)


def _rows(wanted: Sequence[Key], there: Sequence[Key]) -> Tensor:
    places = {key: row for row, key in enumerate(there)}
    return torch.tensor([places.get(key, -1) for key in wanted])


def copy_tokenizer(source: Checkpoint, template: Checkpoint, folder: Path) -> list[str]:
    """Puts the tokenizer of `source` with the chat template of `template` into `folder`; returns what is worth knowing.

    A template that stands in tokenizer_config.json is taken from there.
    """
    notes = []
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    for name in TEMPLATE_FILES:
        if (place := template.folder / name).is_file():
            shutil.copyfile(place, folder / name)
        elif place.is_dir():
            shutil.copytree(place, folder / name)
    if source is not template:
        inside = _settings(template.folder).get("chat_template")
        settings = _settings(folder)
        settings.pop("chat_template", None)
        if inside is not None:
            settings["chat_template"] = inside
        if settings:
            (folder / "tokenizer_config.json").write_text(
                json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    if not has_tokenizer(source):
        notes.append(f"{source.name} has no tokenizer, so the output has none")
    return notes


def lost_markers(template: Checkpoint, source: Checkpoint) -> list[str]:
    """Tokens that the chat template of one model writes and that the tokenizer of another would take to pieces."""
    if not (has_tokenizer(template) and has_tokenizer(source)):
        return []
    writer = load_tokenizer(str(template.folder))
    found = writer.chat_template or ""
    text = "".join(found.values()) if isinstance(found, dict) else found
    there = load_tokenizer(str(source.folder)).get_vocab()
    return sorted(token for token in writer.get_added_vocab() if token in text and token not in there)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def translated(settings: Mapping[str, Any], theirs: Sequence[Key], ours: Sequence[Key], model: str) -> dict[str, Any]:
    """Generation settings of a model with its token ids turned into those of another vocabulary.

    Raises ValueError that names a token which the other vocabulary lacks.
    """
    places = {key: row for row, key in enumerate(ours)}

    def turn(name: str, number: int) -> int:
        token = theirs[number] if number < len(theirs) else number
        if token not in places:
            raise ValueError(
                f"{name} of {model!r} is {token!r}, which the tokenizer of the output lacks; take --tokenizer post"
            )
        return places[token]

    result = dict(settings)
    for name, value in settings.items():
        if name.endswith("_token_id") and isinstance(value, int):
            result[name] = turn(name, value)
        elif name.endswith("_token_id") and isinstance(value, list):
            result[name] = [turn(name, number) for number in value]
    return result
