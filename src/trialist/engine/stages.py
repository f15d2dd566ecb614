"""Stages: expensive artefacts that arms share, built once per key, finished by an atomic rename."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trialist.engine.identity import _code_digest, digest

RECORD = "stage.json"


def stage(
    root: Path, name: str, inputs: tuple, build: Callable[[Path], Any], *, source: str, versions: dict[str, str]
) -> Path:
    """The folder of the artefact, built by `build(folder)` under a lock by whoever comes first.

    Its key is the content that went in: name, inputs (scalars, frozen dataclasses), the builder's source and the source of
    the trial it belongs to, versions. A build that fails or is killed leaves nothing that could be taken for a result.
    """
    from filelock import FileLock

    key = digest(
        {"name": name, "inputs": inputs, "builder": _builder_digest(build), "source": source, "versions": versions}, 12
    )
    folder = root / f"{name}-{key}"
    if (folder / RECORD).is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}-{key}.lock"):
        if (folder / RECORD).is_file():
            return folder
        unfinished = root / f".{name}-{key}.building"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        wall, cpu = time.perf_counter(), time.process_time()
        build(unfinished)
        record = {
            "name": name,
            "key": key,
            "inputs": [str(value) for value in inputs],
            "wall_seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "created": time.time(),
        }
        (unfinished / RECORD).write_text(json.dumps(record))
        os.replace(unfinished, folder)
    return folder


def list_stages(root: Path) -> list[dict[str, Any]]:
    """Finished stages, newest first: name, key, inputs, cost, bytes, folder."""
    found = []
    for record in root.glob(f"*/{RECORD}"):
        if record.parent.name.startswith("."):
            continue
        size = sum(file.stat().st_size for file in record.parent.rglob("*") if file.is_file())
        found.append({**json.loads(record.read_text()), "bytes": size, "folder": str(record.parent)})
    return sorted(found, key=lambda entry: -entry["created"])


def clean_stages(root: Path) -> int:
    """Removes all stages that nobody is building; returns the bytes freed."""
    from filelock import FileLock, Timeout

    freed = 0
    for entry in list_stages(root):
        folder = Path(entry["folder"])
        try:
            with FileLock(root / f".{folder.name}.lock", timeout=0):
                shutil.rmtree(folder)
                freed += entry["bytes"]
        except Timeout:
            continue
    return freed


def clean_folders(ledger_path: Path) -> int:
    """Removes all stages and the folders of runs that are not running (models, checkpoints, logs); returns the bytes."""
    from trialist.engine.ledger import Ledger

    home = ledger_path.absolute().parent
    freed = clean_stages(home / "stages")
    busy: set[str] = set()
    if ledger_path.exists():
        ledger = Ledger(ledger_path)
        busy = {row["id"] for row in ledger.rows(status="running")}
        ledger.close()
    for folder in (home / "runs").glob("*"):
        if folder.name not in busy:
            freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            shutil.rmtree(folder)
    return freed


def _builder_digest(build: Callable) -> str:
    function = inspect.unwrap(getattr(build, "func", build))
    return _code_digest(textwrap.dedent(inspect.getsource(function)).encode())
