"""Running a stored run again: to verify its numbers, or to get at its model."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trialist.engine.backends import LocalProcesses
from trialist.engine.hardware import accelerators, resolve_device
from trialist.engine.identity import inputs_by_content, run_identity, source_digest
from trialist.engine.ledger import Ledger
from trialist.engine.plan import rebuild
from trialist.engine.records import Configuration, outcome_to_json
from trialist.engine.worker import Task, find_arm


def verify(ledger_path: Path, run: str, tolerance: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs `run` again in a fresh folder and compares outcome and cost number by number.

    Raises ValueError where the run has no outcome, or where the content of its inputs is not what it was.
    """
    ledger = Ledger(ledger_path, create=False)
    row = ledger.row(run)
    if row["status"] not in ("done", "diverged", "stale"):
        raise ValueError(f"run {row['id']} is {row['status']}: there is no outcome to compare with")
    stored = ledger.records([row["id"]])[0].outcome
    configuration = _configuration(ledger, row)
    ledger.close()
    with tempfile.TemporaryDirectory(prefix="trialist-verify-") as folder:
        now = _again(configuration, row, ledger_path.absolute().parent, Path(folder), say)
    assert stored is not None
    before = dict(_numbers("", outcome_to_json(stored)))
    after = dict(_numbers("", now))
    timed = {name for name in before if name in ("cost.seconds",)}
    names = [name for name in sorted({*before, *after}) if name not in timed]
    differences = [
        {"what": name, "stored": before.get(name), "now": after.get(name)}
        for name in names
        if not _equal(before.get(name), after.get(name), tolerance)
    ]
    changed = source_digest(configuration.path, rebuild(configuration, ledger_path).sources()) != row["source"]
    return {"run": row["id"], "compared": len(names), "differences": differences, "source_changed": changed}


def export(ledger_path: Path, run: str, to: str, agree: Callable[[str], bool], say: Callable[[str], None]) -> Path:
    """Copies the model of `run` to the new folder `to`; trains the run again, if it was not kept and `agree` says yes."""
    target = Path(to)
    if target.exists():
        raise ValueError(f"--to {to} exists already; name a folder to create")
    ledger = Ledger(ledger_path, create=False)
    row = ledger.row(run)
    configuration = _configuration(ledger, row)
    ledger.close()
    home = ledger_path.absolute().parent
    kept = home / "runs" / row["id"] / "model"
    if not kept.is_dir():
        seconds = (row["measured"] or {}).get("wall_seconds")
        time = f" (that took {seconds:.0f} s)" if seconds else ""
        if not agree(f"the model of run {row['id']} was not kept; it must be trained again{time}"):
            raise ValueError(
                f"the model of run {row['id']} was not kept; --yes trains it again, `run --keep-models` keeps it"
            )
        _again(configuration, row, home, home / "runs" / row["id"], say)
    if not kept.is_dir():
        raise ValueError(f"trial {row['trial']} trains no model: there is nothing to export")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(kept, unfinished)
    unfinished.rename(target)
    return target


def _configuration(ledger: Ledger, row: dict[str, Any]) -> Configuration:
    return next(c for c in ledger.configurations(row["trial"]) if c.key == row["configuration"])


def _again(
    configuration: Configuration, row: dict[str, Any], home: Path, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    trial = rebuild(configuration, home)
    trial.check()
    arm = find_arm(trial, row["arm"], row["setting"]).with_options(**row["options"])
    identity = run_identity(configuration.trial, trial, inputs_by_content(trial), arm, row["seed"])
    if identity != row["identity"]:
        raise ValueError(
            f"run {row['id']} cannot be repeated: the content of its inputs (files, model), its arm or the versions of "
            f"{', '.join(trial.versions) or 'its packages'} are not what they were"
        )
    threads = int(
        (row["measured"] or {}).get("threads", 1)
    )  # sums split over other numbers of threads differ in the last bits
    gpus = accelerators() if resolve_device(str(getattr(trial, "device", "cpu"))) == "cuda" else 0
    task = Task(
        run=row["id"],
        path=configuration.path,
        inputs=dataclasses.asdict(trial),
        arm=row["arm"],
        setting=row["setting"],
        options=row["options"],
        seed=row["seed"],
        folder=str(folder),
        stages=str(home / "stages"),
        threads=threads,
        source=source_digest(configuration.path, trial.sources()),
        keep_model=True,
    )
    say(f"running {row['setting']} · {row['arm']} · seed {row['seed']} again")
    backend = LocalProcesses(1, threads, (configuration.path.partition(":")[0], *trial.preload), min(gpus, 1))
    try:
        backend.start(task)
        while True:
            for _, message in backend.poll(0.25):
                if message[0] == "outcome":
                    return message[1]
                if message[0] == "failure":
                    raise ValueError(f"run {row['id']} failed when run again: {message[1]}\n{message[2] or ''}")
    finally:
        backend.close()


def _numbers(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _numbers(f"{path}.{key}" if path else key, entry)
    elif isinstance(value, (list, tuple)):
        for at, entry in enumerate(value):
            yield from _numbers(f"{path}[{at}]", entry)
    elif value is not None:
        yield path, value


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if (isinstance(a, float) and isinstance(b, (int, float))) or (isinstance(b, float) and isinstance(a, (int, float))):
        return a == b or (tolerance > 0 and math.isclose(a, b, rel_tol=tolerance))
    return json.dumps(a) == json.dumps(b)
