"""Shards of weights and optimizer state on disk, by `torch.distributed.checkpoint`, without pickle.

Its own format keeps the metadata of the shards in a pickle. Its Hugging Face format is taken instead: every rank writes
one safetensors file whose header says where its shards begin. That format holds tensors only, so everything else stands
in the JSON file of the checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trialist.training.parallel import Ranks


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are incomplete or altered."""


def write_shards(folder: Path, shards: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Writes the shards of all ranks into `folder`, anew; returns file name -> sha256. All ranks call this.

    Raises OSError on all ranks when one of them cannot write; then the folder is gone.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    with ranks.together():
        if ranks.first and folder.exists():
            shutil.rmtree(folder)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    held = {name: tensor.detach() for name, tensor in shards.items()}
    try:
        dcp.save(held, storage_writer=writer, process_group=ranks.host)
    except CheckpointException as failure:  # raised on all ranks alike
        rank, (error, _) = next(iter(failure.failures.items()))
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"rank {rank} could not write its shards to {folder}: {error}. Earlier checkpoints are intact; make room or "
            "give another folder, then start again to resume",
        ) from failure
    with ranks.together():
        own = {path.name: digest(path) for path in sorted(folder.iterdir())[ranks.rank :: ranks.size]}
        if ranks.first:
            sync(folder)
    return {name: hashed for part in ranks.gather(own) for name, hashed in part.items()}


def check_shards(folder: Path, digests: Mapping[str, str], ranks: Ranks) -> None:
    """Raises DamagedCheckpoint when a file is missing or altered; of several ranks each looks at its share of them."""
    for name, expected in sorted(digests.items())[ranks.rank :: ranks.size]:
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder.name}/{name} is missing")
        if digest(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder.name}/{name} has another hash than when it was written")


def shards_in(state: Any) -> dict[str, tuple[list[int], torch.dtype]]:
    """Name -> (shape of the whole, dtype) of the shards that a state refers to, in its form in the JSON file."""
    return {name: (shape, getattr(torch, dtype)) for name, shape, dtype in _references(state)}


def read_shards(
    folder: Path, wanted: Mapping[str, tuple[list[int], torch.dtype]], root: nn.Module | None
) -> dict[str, Tensor]:
    """The tensors `wanted`: this rank's shards, laid out as those of `root`; without it whole, on the CPU."""
    if not wanted:
        return {}
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    tensors: dict[str, Tensor] = {}
    if root is None:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    else:
        from torch.distributed.tensor import Shard, empty

        mesh = next(iter(root.parameters())).device_mesh  # type: ignore[attr-defined]
        for name, (shape, dtype) in wanted.items():
            tensors[name] = empty(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a whole model needs no ranks
        # every rank reads what it needs from files that are known to be whole, so there is nothing to coordinate
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _references(value: Any) -> Iterator[list[Any]]:
    if not isinstance(value, dict):
        return
    ((kind, content),) = value.items()
    if kind == "shard":
        yield content
    elif kind == "dict":
        for _, item in content:
            yield from _references(item)
    elif kind in ("list", "tuple"):
        for item in content:
            yield from _references(item)
