"""Stages: expensive artefacts that arms share, built once per key, finished by an atomic rename."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trialist.engine.home import write_atomic
from trialist.engine.identity import _code_digest, digest

RECORD = "stage.json"


UNFINISHED = re.compile(r"\..+-[0-9a-f]{24}\.building")
SECONDS_BETWEEN_SIGNS = 30.0


def stage(
    root: Path,
    name: str,
    inputs: tuple,
    build: Callable[[Path], Any],
    *,
    source: str,
    versions: dict[str, str],
    waiting: Callable[[], None] = lambda: None,
    elsewhere: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
) -> Path:
    """The folder of the artefact, built by `build(folder)` under a lock by whoever comes first.

    Its key is the content that went in: name, inputs (scalars, frozen dataclasses), the builder's source and the source of
    the trial it belongs to, versions. A build that fails leaves nothing, one that is killed nothing that could be taken for
    a result. `waiting` is called now and then while somebody else builds; `elsewhere` tells, after the build, which wall
    and CPU seconds to add to what the clock says of it.
    """

    key = digest(
        {"name": name, "inputs": inputs, "builder": _builder_digest(build), "source": source, "versions": versions}, 12
    )
    folder = root / f"{name}-{key}"
    if _record(folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}-{key}.lock", waiting):
        if _record(folder):
            return folder
        unfinished = root / f".{name}-{key}.building"
        _remove(unfinished)
        unfinished.mkdir()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            build(unfinished)
            more = elsewhere()
            record = {
                "name": name,
                "key": key,
                "inputs": [str(value) for value in inputs],
                "wall_seconds": time.perf_counter() - wall + more[0],
                "cpu_seconds": time.process_time() - cpu + more[1],
                "created": time.time(),
            }
            write_atomic(unfinished / RECORD, json.dumps(record))
            _remove(folder)  # one whose record is damaged
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # what failed is worth more than what cannot be removed
            raise
    return folder


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=SECONDS_BETWEEN_SIGNS)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


def _record(folder: Path) -> dict[str, Any] | None:
    """What is stored of a finished stage; None for a folder that is none, or whose record is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and {"name", "key", "wall_seconds", "created"} <= record.keys()
    return record if whole else None


def cost(folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a finished stage and of the stages that it used."""
    record = _record(folder) or {}
    return float(record.get("wall_seconds", 0.0)), float(record.get("cpu_seconds", 0.0))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def list_stages(root: Path) -> list[dict[str, Any]]:
    """Finished stages, newest first: name, key, inputs, cost, bytes, folder."""
    found = []
    for file in root.glob(f"*/{RECORD}"):
        record = None if file.parent.name.startswith(".") else _record(file.parent)
        if record is not None:
            found.append({**record, "bytes": _size(file.parent), "folder": str(file.parent)})
    return sorted(found, key=lambda entry: -entry["created"])


def clean_stages(root: Path) -> int:
    """Removes all stages that nobody is building, and what killed builds left; returns the bytes freed."""
    from filelock import FileLock, Timeout

    freed = 0
    for folder in sorted(root.glob("*")):
        if _record(folder) or UNFINISHED.fullmatch(folder.name):  # whatever else lies there is not ours
            try:
                with FileLock(root / f".{folder.name.removeprefix('.').removesuffix('.building')}.lock", timeout=0):
                    size = _size(folder)
                    shutil.rmtree(folder)
                    freed += size
            except Timeout:
                continue
    return freed


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def clean_folders(ledger_path: Path) -> int:
    """Removes all stages and the folders of runs that are not running (models, checkpoints, logs); returns the bytes."""
    from trialist.engine.ledger import Ledger

    ledger = Ledger(ledger_path, create=False)
    rows = ledger.rows()
    ledger.close()
    home = ledger_path.absolute().parent
    freed = clean_stages(home / "stages")
    for row in rows:  # beside a ledger that was put elsewhere may lie folders `runs` and `stages` of other programs
        folder = home / "runs" / row["id"]
        if row["status"] != "running" and folder.is_dir():
            freed += _size(folder)
            shutil.rmtree(folder)
    return freed


def _builder_digest(build: Callable) -> str:
    function = inspect.unwrap(getattr(build, "func", build))
    return _code_digest(textwrap.dedent(inspect.getsource(function)).encode())
