"""What happens inside the process of one run: rebuild the trial and its arm from names, run it, hand back the outcome."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Outcome, Trial
from trialist.engine.identity import major_versions
from trialist.engine.processes import end_tree, lead_group
from trialist.engine.records import outcome_to_json
from trialist.engine.registry import load_path

LOG = "log.txt"
SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class Task:
    """One run, by names and plain values: nothing of it is a live object."""

    run: str
    path: str
    inputs: Mapping[str, Any]
    arm: str
    setting: str
    options: Mapping[str, Any]
    """Tuned values, laid over the arm's own options"""
    seed: int
    folder: str
    stages: str
    threads: int
    source: str
    keep_model: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set in the process before the run, for example the GPU it may see"""


def find_arm(trial: Trial, name: str, setting: str) -> Arm:
    for arm in trial.arms():
        if arm.name == name and arm.setting == setting:
            return arm
    raise ValueError(f"{type(trial).__name__} has no arm {name!r} in setting {setting!r} for these inputs")


def perform(task: Task, send: Any = None) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """Runs the task in this process; returns the outcome as JSON, the measured cost and the stages it used."""
    trial = load_path(task.path)(**task.inputs)
    arm = find_arm(trial, task.arm, task.setting).with_options(**task.options)
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(
        seed=task.seed,
        folder=folder,
        stages_folder=Path(task.stages),
        threads=task.threads,
        source=task.source,
        versions=major_versions(trial.versions),
        send=send,
        keep_model=task.keep_model,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = trial.run(arm, task.seed, context)
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{type(trial).__name__}.run returned {type(outcome).__name__}; it must return an Outcome")
    clock, clock_cpu = time.perf_counter() - wall, time.process_time() - cpu
    measured = {
        "wall_seconds": clock + context.elsewhere[0],
        "cpu_seconds": clock_cpu + context.elsewhere[1],
        "clock_seconds": clock,
        "clock_cpu_seconds": clock_cpu,
        "peak_bytes": float(peak_bytes()),
        "threads": float(task.threads),
    }
    document = outcome_to_json(outcome)
    check_storable(document)
    return document, measured, context.used_stages


def check_storable(document: Mapping[str, Any], place: str = "outcome") -> None:
    """Raises ValueError that names the first number that is not finite, TypeError for what JSON cannot hold."""
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        _name_the_number(document, place)
        raise


def _name_the_number(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{place} is {value}: a run that measured nothing says so in `undefined`, one that diverged in `diverged`"
        )
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for key, entry in entries:
        _name_the_number(entry, f"{place}.{key}")


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work(task: Task, connection: Connection) -> None:
    """The process's main function: runs the task, sends what came out, and ends."""
    lead_group()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(task.environment)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    folder = Path(task.folder)
    code = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _redirect_output(folder / LOG)
        last = 0.0

        def send(message: tuple) -> None:
            nonlocal last
            now = time.monotonic()
            ends = message[0] == "progress" and message[1] >= message[2]
            if now - last >= SECONDS_BETWEEN_REPORTS or ends:
                last = now
                connection.send(message)

        connection.send(("outcome", *perform(task, send)))
    except BaseException as error:
        code = 1
        with contextlib.suppress(OSError):  # the parent is gone, and the watching thread ends us
            connection.send(("failure", in_words(error), traceback.format_exc()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
    sys.exit(code)


def in_words(error: BaseException) -> str:
    """Type and message; memory and disk that ran out are called so first, whatever library said it."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"disk full: {text}; free space, then give the same command with --retry"
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return f"out of memory: {text}"
    return text


def _redirect_output(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _end_with_parent(connection: Connection) -> None:
    try:
        connection.recv()  # the parent sends nothing: this returns only when it is gone
    except (EOFError, OSError):
        end_tree(os.getpid())
        os._exit(3)
