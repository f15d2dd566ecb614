"""The loop that works through planned runs: claim, start, watch, store. Survives crashes of runs and of other processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trialist.engine.backends import Backend
from trialist.engine.ledger import LEASE_SECONDS, Ledger
from trialist.engine.records import outcome_from_json
from trialist.engine.worker import LOG, Task

FINISHED = ("done", "diverged", "failed", "stale")


@dataclass(frozen=True)
class Event:
    """Something happened to a run: started, progress, done, diverged, failed, elsewhere (another process has it), released."""

    kind: str
    run: str
    done: float = 0.0
    total: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""


Listener = Callable[[Event], None]


class Stopped(Exception):
    """A listener or limit asked for a stop; claimed runs are back in the queue."""


def execute(
    ledger: Ledger,
    tasks: Sequence[Task],
    backend: Backend,
    listener: Listener,
    *,
    silence_minutes: float = 60.0,
    keep_folders: bool = False,
    deadline: float | None = None,
) -> bool:
    """Runs what the ledger has not finished yet; returns False when the deadline (monotonic seconds) stopped it between runs.

    Also waits for runs of these tasks that another process has claimed, and takes them over if it dies.
    """
    by_run = {task.run: task for task in tasks}
    statuses = ledger.statuses(list(by_run))
    waiting = [task.run for task in tasks if statuses[task.run] not in FINISHED]
    running: dict[str, list[float]] = {}  # run -> [started, last sign of life]
    renewed = time.monotonic()
    elsewhere: set[str] = set()
    out_of_time = False
    next_look = 0.0
    try:
        while waiting or running:
            now = time.monotonic()
            out_of_time = out_of_time or (deadline is not None and now >= deadline)
            if out_of_time and not running:
                return False
            if waiting and len(running) < backend.slots and not out_of_time and now >= next_look:
                claimed = _claim_next(ledger, waiting, elsewhere, listener)
                if claimed is None:
                    next_look = now + 0.5  # others hold all that is left
                else:
                    backend.start(by_run[claimed])
                    running[claimed] = [now, now]
                    listener(Event("started", claimed))
                    continue
            for run, message in backend.poll(0.25):
                started = running[run]
                started[1] = time.monotonic()
                if message[0] == "progress":
                    _, done, total, numbers = message
                    listener(Event("progress", run, done, total, numbers, started[1] - started[0]))
                else:
                    del running[run]
                    _store(ledger, by_run[run], message, started, listener, keep_folders)
            now = time.monotonic()
            for run, (started_at, seen) in list(running.items()):
                if now - seen > silence_minutes * 60:
                    backend.stop(run)
                    del running[run]
                    error = f"TimeoutError: no progress for {silence_minutes:g} minutes"
                    ledger.fail(run, error, None, {"wall_seconds": now - started_at})
                    listener(Event("failed", run, seconds=now - started_at, message=error))
            if running and now - renewed > LEASE_SECONDS / 4:
                ledger.renew()
                renewed = now
    except BaseException:
        for run in running:
            backend.stop(run)
        ledger.release(running)
        for run in running:
            listener(Event("released", run))
        raise
    return True


def _claim_next(ledger: Ledger, waiting: list[str], elsewhere: set[str], listener: Listener) -> str | None:
    for run in list(waiting):
        if ledger.claim(run):
            waiting.remove(run)
            return run
        status = ledger.statuses([run])[run]
        if status in FINISHED:
            waiting.remove(run)
            listener(Event(status, run))
        elif run not in elsewhere:
            elsewhere.add(run)
            listener(Event("elsewhere", run))
    return None


def _store(
    ledger: Ledger, task: Task, message: tuple, started: list[float], listener: Listener, keep_folders: bool
) -> None:
    seconds = started[1] - started[0]
    if message[0] == "outcome":
        outcome = outcome_from_json(message[1])
        ledger.finish(task.run, outcome, message[2], message[3])
        if not keep_folders:
            shutil.rmtree(task.folder, ignore_errors=True)
        numbers: dict[str, Any] = dict(outcome.metrics)
        kind = "done" if outcome.diverged is None else "diverged"
        listener(Event(kind, task.run, numbers=numbers, seconds=seconds, message=outcome.diverged or ""))
        return
    _, error, trace = message
    ledger.fail(task.run, error, trace or log_tail(Path(task.folder)), {"wall_seconds": seconds})
    listener(Event("failed", task.run, seconds=seconds, message=error))


def log_tail(folder: Path, size: int = 4000) -> str | None:
    """The end of what the run printed, for runs that died without a word."""
    log = folder / LOG
    if not log.is_file():
        return None
    return log.read_bytes()[-size:].decode(errors="replace")
