"""Checkpoints that are there whole or not at all: tensors in safetensors, all else in JSON, nothing pickled.

A checkpoint is two files, `step-00000100.safetensors` and `step-00000100.json`. The second is written last, holds the
hash of the first, and makes the checkpoint count. Both come by way of a temporary name, fsync and `os.replace`. Shards of
weights stand beside them in a folder `step-00000100`, with their hashes in the JSON file as well.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trialist.training.parallel import ALONE, Ranks, is_sharded
from trialist.training.shards import DamagedCheckpoint, check_shards, digest, read_shards, shards_in, sync, write_shards

FORMAT = 2
"""1: whole tensors; 2: with shards"""
NAME = re.compile(r"step-(\d{8,})\.json")


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes `state` as the checkpoint of `step` and removes all but the newest `keep`; returns the path of the JSON
    file.

    state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, such as state_dict() returns.
    settings: what made the state, in JSON types; `load_checkpoint` refuses other ones.
    ranks: all of them call this. The first writes what is whole, each its own shards; an error of one is raised on all.
    Raises OSError when the folder cannot be written or the disk is full: then earlier checkpoints are intact and
    nothing half-written remains. Raises ValueError when `state` holds something else than the above.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    shards: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors, shards)
    name = folder / f"step-{step:08d}"
    content = {"format": 2 if shards else 1, "step": step, "settings": settings, "state": tree}
    if shards:
        content["shards"] = write_shards(Path(f"{name}.tmp"), shards, ranks)
    with ranks.together():
        if ranks.first:
            _write(writable_folder(folder), name, content, tensors)
            _prune(folder, step, keep)
    return Path(f"{name}.json")


def _write(folder: Path, name: Path, content: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    stored, aliases = _without_sharing(tensors)
    step = content["step"]
    temporary = [Path(f"{name}.safetensors.tmp"), Path(f"{name}.json.tmp")]
    try:
        save_file(stored, temporary[0])
        content |= {"sha256": digest(temporary[0]), "aliases": aliases}
        with open(temporary[1], "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        sync(temporary[0])
        if name.is_dir():  # shards of a damaged checkpoint of this step, or of one that never came to count
            Path(f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(name)
        if "shards" in content:
            os.replace(f"{name}.tmp", name)
        os.replace(temporary[0], f"{name}.safetensors")
        os.replace(temporary[1], f"{name}.json")
        sync(folder)
    except (OSError, SafetensorError) as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        shutil.rmtree(f"{name}.tmp", ignore_errors=True)
        megabytes = sum(tensor.nbytes for tensor in stored.values()) / 1e6
        raise OSError(
            _error_number(error),
            f"checkpoint of step {step} ({megabytes:.1f} MB) could not be written to {folder}: {error}. Earlier "
            "checkpoints are intact; make room or give another folder, then start again to resume",
        ) from error


def load_checkpoint(
    folder: str | Path, settings: Mapping[str, Any], *, ranks: Ranks = ALONE
) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest intact checkpoint in `folder`, tensors on the CPU; None where there is none.

    A damaged checkpoint is passed over with a warning. `ranks`: all of them call this and come to the same checkpoint;
    shards come back as shards. Raises ValueError when the checkpoint was made with other settings or by a newer
    version, and when the ranks do not see the same folder.
    """
    for path, content, tensors in intact_checkpoints(Path(folder), ranks):
        _compare(path, content["settings"], json.loads(json.dumps(settings)))
        tensors |= read_shards(path.with_suffix(""), shards_in(content["state"]), ranks.root)
        return content["step"], decode(content["state"], tensors)
    return None


def intact_checkpoints(folder: Path, ranks: Ranks = ALONE) -> Iterator[tuple[Path, dict[str, Any], dict[str, Tensor]]]:
    """Path, content and whole tensors of each checkpoint, the newest first; a warning for each that is damaged."""
    own = sorted(_steps(folder), reverse=True)
    steps, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        if other != steps:
            raise ValueError(
                f"checkpoint folder {folder}: rank 0 finds the steps {steps} there, rank {rank} finds {other}; give a "
                "folder that all ranks share"
            )
    for step in steps:
        path = folder / f"step-{step:08d}.json"
        damage: str | None = None
        content: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        try:
            content, tensors = _read(path)
            check_shards(path.with_suffix(""), content.get("shards", {}), ranks)
        except DamagedCheckpoint as error:
            damage = str(error)
        damage = next(filter(None, ranks.gather(damage)), None)
        if damage is None:
            yield path, content, tensors
        elif ranks.first:
            warnings.warn(
                f"checkpoint {path} is damaged ({damage}); going back to the one before it, if any", stacklevel=3
            )


def writable_folder(folder: str | Path) -> Path:
    """The folder, made if need be. Raises OSError with words when it cannot be made or written to."""
    folder = Path(folder)
    probe = folder / f"probe-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoint folder {folder} cannot be written ({error.strerror}); give a folder that can"
        ) from error
    return folder


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors_path = path.with_suffix(".safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path.name} is not complete JSON: {error}") from error
    if version > FORMAT:
        raise ValueError(f"checkpoint {path} has format {version}, this trialist reads up to {FORMAT}; update trialist")
    if not tensors_path.is_file():
        raise DamagedCheckpoint(f"{tensors_path.name} is missing")
    if digest(tensors_path) != content["sha256"]:
        raise DamagedCheckpoint(f"{tensors_path.name} has another hash than when it was written")
    tensors = load_file(tensors_path)
    for alias, original in content["aliases"].items():
        tensors[alias] = tensors[original]
    return content, tensors


def _compare(path: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    differing = [key for key in {**stored, **given} if stored.get(key) != given.get(key)]
    if differing:
        words = "; ".join(f"{key}: {stored.get(key)!r} there, {given.get(key)!r} now" for key in differing)
        raise ValueError(
            f"checkpoint {path} was made with other settings ({words}). Take up the old settings to resume it, or give "
            "another checkpoint folder to start anew"
        )


def _encode(value: Any, path: str, tensors: dict[str, Tensor], shards: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor) and is_sharded(value):
        owner = next((name for name, other in shards.items() if other is value), path)  # tied weights
        shards[owner] = value
        return {"shard": [owner, list(value.shape), str(value.dtype).removeprefix("torch.")]}
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise ValueError(f"checkpoint: the keys at {path!r} must be strings or integers")
        return {"dict": [[key, _encode(item, f"{path}/{key}", tensors, shards)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{index}", tensors, shards) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"checkpoint: {path!r} is a {type(value).__name__}; only tensors, numbers, strings and None are stored"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state of a checkpoint, from its form in the JSON file and its tensors and shards by name."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "shard":
        return tensors[content[0]]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _without_sharing(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """safetensors refuses tensors that share memory (tied weights): each is stored once, the others name it."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[tuple, str] = {}
    storages: set[tuple] = set()
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            stored[name] = tensor.contiguous()
            continue
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        if same in owner:
            aliases[name] = owner[same]
            continue
        stored[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        owner[same] = name
        storages.add(storage)
    return stored, aliases


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]


def _prune(folder: Path, newest: int, keep: int) -> None:
    kept = sorted((step for step in _steps(folder) if step <= newest), reverse=True)[:keep]
    for path in folder.glob("step-*"):
        if path.name.split(".")[0] not in {f"step-{step:08d}" for step in kept} or path.suffix == ".tmp":
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _error_number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)` without its cast of the state to the dtype of the parameters."""
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, stored in state["state"].items():
        own = optimizer.state[parameters[index]]
        for key, value in stored.items():
            if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)
