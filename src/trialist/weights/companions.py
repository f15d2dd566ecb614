"""What stands beside the weights: index, config, generation settings, tokenizer, chat template, record of what was done."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trialist.weights.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from trialist.weights.plan import Delta, Plan
from trialist.weights.report import DeltaReport
from trialist.weights.vocabulary import copy_tokenizer, has_tokenizer, keys_of, translated
from trialist.weights.writing import nbytes

RECORD = "param_delta.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    post = deltas[0].post
    source = post if tokenizer == "post" else new
    if source is post and not has_tokenizer(post):
        source = new
    plan.notes += copy_tokenizer(source, post, folder)
    for file in new.folder.glob("*.py"):  # the class of a model that brings its own, which config.json names
        shutil.copyfile(file, folder / file.name)
    _write_index(folder, new, plan)
    _write_config(folder, new, source, plan, dtype)
    _write_generation(folder, new, post, source, plan)
    record = report.record() | {
        "versions": {name: version(name) for name in ("trialist", "torch", "transformers", "safetensors")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / RECORD, record)


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


def _write_generation(folder: Path, new: Checkpoint, post: Checkpoint, source: Checkpoint, plan: Plan) -> None:
    """Where the answer ends is part of post-training, so the settings are post's; without any, the new base's."""
    origin = post if (post.folder / "generation_config.json").is_file() else new
    if not (origin.folder / "generation_config.json").is_file():
        return
    settings = read_json(origin.folder / "generation_config.json", origin.name)
    if plan.keys is not None and origin is not source:
        rows = max(origin.tensors[name].shape[0] for name in plan.by_token if name in origin.tensors)
        theirs = keys_of(origin, rows)
        if theirs is not None:
            settings = translated(settings, theirs, plan.keys, origin.name)
    write_json(folder / "generation_config.json", settings)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
