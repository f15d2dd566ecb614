"""Numbers that took long to compute, kept part by part in the user's cache: an interrupted call goes on with what is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DAYS_KEPT = 30
"""What nothing has read for so long is removed"""


def kept_parts(
    place: Path,
    sizes: Sequence[int],
    compute: Callable[[int], np.ndarray],
    *,
    found: Callable[[int], None] = lambda number: None,
    waits: Callable[[Sequence[int]], None] = lambda numbers: None,
) -> list[np.ndarray]:
    """The values of each part, `(size,)`: from its file in `place`, or computed and put there.

    Processes that make the same call at one time share the parts out; what another one is at comes last.
    place: its name must change with all that decides about the values.   compute: of the number of a part, from 0.
    found: told each part that is there.   waits: told the parts that another process is at.
    """
    place.mkdir(parents=True, exist_ok=True)
    os.utime(place)
    values: dict[int, np.ndarray] = {}
    for patience in (0, -1):
        missing = [number for number in range(len(sizes)) if number not in values]
        if patience and missing:
            waits(missing)
        for number in missing:
            file = place / f"{number:05}.safetensors"
            flat, lock = _read(file, sizes[number]), Path(f"{file}.lock")
            if flat is None:
                try:
                    with FileLock(lock).acquire(timeout=patience):
                        flat = _read(file, sizes[number])
                        if flat is None:
                            flat = compute(number)
                            save_file({"values": flat}, temporary := file.with_suffix(".tmp"))
                            os.replace(temporary, file)
                except Timeout:
                    continue
                lock.unlink(missing_ok=True)  # whoever still waits for it finds the file
            values[number] = flat
            found(number)
    return [values[number] for number in range(len(sizes))]


def remove_unused(folder: Path) -> None:
    """Removes what is in `folder` and nothing has read for 30 days."""
    for place in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # other processes remove, too
            if place.is_dir() and time.time() - place.stat().st_mtime > DAYS_KEPT * 86_400:
                shutil.rmtree(place, ignore_errors=True)


def _read(file: Path, size: int) -> np.ndarray | None:
    """What is kept there; a damaged file is removed, as it can be made again."""
    try:
        with safe_open(file, "numpy") as opened:
            flat = opened.get_tensor("values")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        flat = np.zeros(0)
    if len(flat) == size:
        return flat
    file.unlink(missing_ok=True)
    return None
