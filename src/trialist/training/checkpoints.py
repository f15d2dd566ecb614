"""Checkpoints that are there whole or not at all: tensors in safetensors, all else in JSON, nothing pickled.

A checkpoint is two files, `step-00000100.safetensors` and `step-00000100.json`. The second is written last, holds the
hash of the first, and makes the checkpoint count. Both come by way of a temporary name, fsync and `os.replace`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
NAME = re.compile(r"step-(\d{8,})\.json")


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are incomplete or altered."""


def save_checkpoint(
    folder: str | Path, step: int, state: Mapping[str, Any], settings: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes `state` as the checkpoint of `step` and removes all but the newest `keep`; returns the path of the JSON
    file.

    state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, such as state_dict() returns.
    settings: what made the state, in JSON types; `load_checkpoint` refuses other ones.
    Raises OSError when the folder cannot be written or the disk is full: then earlier checkpoints are intact and
    nothing half-written remains. Raises ValueError when `state` holds something else than the above.
    """
    folder = writable_folder(folder)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    stored, aliases = _without_sharing(tensors)
    name = folder / f"step-{step:08d}"
    temporary = [Path(f"{name}.safetensors.tmp"), Path(f"{name}.json.tmp")]
    try:
        save_file(stored, temporary[0])
        digest = _digest(temporary[0])
        content = {"format": FORMAT, "step": step, "settings": settings, "sha256": digest}
        content |= {"aliases": aliases, "state": tree}
        with open(temporary[1], "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(temporary[0])
        os.replace(temporary[0], f"{name}.safetensors")
        os.replace(temporary[1], f"{name}.json")
        _sync(folder)
    except (OSError, SafetensorError) as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        megabytes = sum(tensor.nbytes for tensor in stored.values()) / 1e6
        raise OSError(
            _error_number(error),
            f"checkpoint of step {step} ({megabytes:.1f} MB) could not be written to {folder}: {error}. Earlier "
            "checkpoints are intact; make room or give another folder, then start again to resume",
        ) from error
    _prune(folder, step, keep)
    return Path(f"{name}.json")


def load_checkpoint(folder: str | Path, settings: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest intact checkpoint in `folder`, tensors on the CPU; None where there is none.

    A damaged checkpoint is passed over with a warning. Raises ValueError when the checkpoint was made with other
    settings or by a newer version.
    """
    for step in sorted(_steps(Path(folder)), reverse=True):
        path = Path(folder) / f"step-{step:08d}.json"
        try:
            content, tensors = _read(path)
        except DamagedCheckpoint as error:
            warnings.warn(
                f"checkpoint {path} is damaged ({error}); going back to the one before it, if any", stacklevel=2
            )
            continue
        _compare(path, content["settings"], json.loads(json.dumps(settings)))
        return step, _decode(content["state"], tensors)
    return None


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
    if _digest(tensors_path) != content["sha256"]:
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


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise ValueError(f"checkpoint: the keys at {path!r} must be strings or integers")
        return {"dict": [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"checkpoint: {path!r} is a {type(value).__name__}; only tensors, numbers, strings and None are stored"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
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
            path.unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
