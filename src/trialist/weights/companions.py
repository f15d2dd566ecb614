"""What stands beside the weights: index, config, generation settings, tokenizer, chat template, record of what was done."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trialist.weights.checkpoint import INDEX, SINGLE, Checkpoint, listed, read_json
from trialist.weights.plan import Delta, Plan
from trialist.weights.report import DeltaReport
from trialist.weights.vocabulary import copy_tokenizer, has_tokenizer, keys_of, lost_markers, translated
from trialist.weights.writing import nbytes

RECORD = "param_delta.json"
GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_companions(new: Checkpoint, deltas: Sequence[Delta], plan: Plan, tokenizer: str) -> None:
    """Raises ValueError where chat template or generation settings need tokens that the output's tokenizer lacks."""
    post, source = deltas[0].post, _tokenizer_of(new, deltas, tokenizer)
    if source is post:
        return
    if lost := lost_markers(post, source):
        raise ValueError(
            f"the chat template of {post.name} writes {listed(lost)}, which the tokenizer of {source.name} lacks; take "
            "--tokenizer post, with --on-mismatch by-token where the vocabularies differ"
        )
    _generation_settings(new, post, source, plan)


def write_companions(
    folder: Path,
    new: Checkpoint,
    deltas: Sequence[Delta],
    plan: Plan,
    report: DeltaReport,
    *,
    dtype: str,
    tokenizer: str,
) -> None:
    """Fills `folder` around its weights.

    config.json is the new base's (so are rotary settings and whatever else differs between releases). Chat template and
    generation settings are those of the first post-trained model, its token ids turned into those of the output; tokenizer
    files are its own or the new base's.
    """
    post, source = deltas[0].post, _tokenizer_of(new, deltas, tokenizer)
    plan.notes += copy_tokenizer(source, post, folder)
    for file in new.folder.glob("*.py"):  # the class of a model that brings its own, which config.json names
        shutil.copyfile(file, folder / file.name)
    _write_index(folder, new, plan)
    _write_config(folder, new, source, plan, dtype)
    _write_generation(folder, _generation_settings(new, post, source, plan))
    record = report.record() | {
        "versions": {name: version(name) for name in ("trialist", "torch", "transformers", "safetensors")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / RECORD, record)


def write_adapter_companions(folder: Path, post: Checkpoint, base: Checkpoint, plan: Plan) -> list[str]:
    """Tokenizer, chat template and generation settings of `post` for an adapter of `base`; returns what is worth knowing.

    Where the vocabularies differ ids must be the base's, so that the tokenizer is; a template or settings that name tokens which
    it lacks are left out.
    """
    if not has_tokenizer(post) or not plan.rows_differ:
        notes = copy_tokenizer(post, post, folder)
        _write_generation(folder, _generation_settings(base, post, post, plan))
        return notes
    lost = lost_markers(post, base)
    notes = copy_tokenizer(base, base if lost else post, folder)
    if lost:
        notes.append(
            f"the chat template is the base's: that of {post.name} writes {listed(lost)}, which the base lacks"
        )
    try:
        settings = _generation_settings(base, post, base, plan)
    except ValueError as error:
        notes.append(f"no generation settings: {error}")
        settings = None
    _write_generation(folder, settings)
    return notes


def _tokenizer_of(new: Checkpoint, deltas: Sequence[Delta], tokenizer: str) -> Checkpoint:
    post = deltas[0].post
    return post if tokenizer == "post" and has_tokenizer(post) else new


def _write_index(folder: Path, new: Checkpoint, plan: Plan) -> None:
    if [file.name for file in new.files] == [SINGLE]:
        return
    write_json(
        folder / INDEX,
        {
            "metadata": {"total_size": sum(nbytes(part.dtype, part.shape) for part in plan.parts)},
            "weight_map": {part.name: new.tensors[part.name].file.name for part in plan.parts},
        },
    )


def _write_config(folder: Path, new: Checkpoint, source: Checkpoint, plan: Plan, dtype: str) -> None:
    config: dict[str, Any] = json.loads(json.dumps(new.config))
    if dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if plan.by_token and plan.keys is not None:
        rows = next(part.shape[0] for part in plan.parts if part.name in plan.by_token)
        holder = config if "vocab_size" in config else config.get("text_config", config)
        holder["vocab_size"] = rows
    if source is not new:
        config |= {name: source.config[name] for name in IDS if name in source.config}
    write_json(folder / "config.json", config)


def _generation_settings(new: Checkpoint, post: Checkpoint, source: Checkpoint, plan: Plan) -> dict[str, Any] | None:
    """Where the answer ends is part of post-training, so the settings are post's; without any, the new base's.

    source: whose tokenizer the output has. Raises ValueError for a token that it lacks.
    """
    origin = post if (post.folder / GENERATION).is_file() else new
    if not (origin.folder / GENERATION).is_file():
        return None
    settings = read_json(origin.folder / GENERATION, origin.name)
    if plan.keys is not None and origin is not source:
        rows = max(origin.tensors[name].shape[0] for name in plan.by_token if name in origin.tensors)
        theirs = keys_of(origin, rows)
        if theirs is not None:
            settings = translated(settings, theirs, plan.keys, origin.name)
    return settings


def _write_generation(folder: Path, settings: dict[str, Any] | None) -> None:
    if settings is not None:
        write_json(folder / GENERATION, settings)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
