"""A model folder that appears whole or not at all, and safetensors files written from beginning to end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from trialist.weights.checkpoint import CODES

SYNC_BYTES = 64 << 20
"""Written bytes after which a file is brought to the disk"""

Layout = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor of a file, in the order of their bytes"""


def output_folder(output: str | Path) -> Path:
    """Raises ValueError for an empty name, which would be the current folder."""
    if not str(output).strip():
        raise ValueError("--output is empty; name a new folder")
    return Path(output)


@contextlib.contextmanager
def folder_written_whole(target: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error.

    An error, Ctrl-C or SIGTERM removes it; what a killed process left is removed by the next one with the same target.
    size: bytes that are going to be written. Raises ValueError for a target that is not empty, OSError where the disk
    is too small.
    """
    target = Path(os.path.abspath(target.expanduser()))
    if target.is_dir() and not any(target.iterdir()):
        pass
    elif target.exists() or target.is_symlink():
        kind = "is not empty" if target.is_dir() else "is a file"
        raise ValueError(f"--output {target} {kind}; give a new folder, so that nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise OSError(
            errno.ENOSPC,
            f"{target.parent} has {free / 1e9:.1f} GB free and the model takes {size / 1e9:.1f} GB; free space or choose "
            "another --output",
        )
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    descriptor = os.open(temporary, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for as long as this process lives
    try:
        with _sigterm_raises():
            yield temporary
        os.chmod(temporary, 0o755)
        os.fsync(descriptor)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        with contextlib.suppress(OSError):  # whoever holds the lock is still writing
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM ends the process by an exception, so that what it began is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class TensorFile:
    """A safetensors file whose tensors are handed over as flat pieces, in the order of the layout."""

    def __init__(self, path: Path, layout: Layout) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, dtype, shape in layout:
            end = place + nbytes(dtype, shape)
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the first tensor to 8 bytes
        self.path, self.missing, self.unsynced = path, place, 0
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `close` or `abandon`
        self.file.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, piece: Tensor) -> None:
        view = memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy())
        self.missing -= len(view)
        self.unsynced += len(view)
        while view:
            view = view[self.file.write(view) :]
        if self.unsynced > SYNC_BYTES:  # while the next stretches are computed, not all at the end
            os.fdatasync(self.file.fileno())
            self.unsynced = 0

    def close(self) -> None:
        """Brings the file to the disk. Raises RuntimeError when it got more or fewer bytes than its layout says."""
        if self.missing:
            raise RuntimeError(f"{self.path.name}: {self.missing} bytes of its tensors were not written")
        os.fsync(self.file.fileno())
        self.file.close()

    def abandon(self) -> None:
        self.file.close()


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def ordered(layout: Layout) -> Layout:
    """Wide numbers first, so that every tensor lies aligned; otherwise the order stays."""
    return sorted(layout, key=lambda entry: -entry[1].itemsize)
