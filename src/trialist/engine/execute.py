"""The loop that works through planned runs: claim, start, watch, store. Survives crashes of runs and of other processes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trialist.engine.backends import Backend
from trialist.engine.database import LedgerError
from trialist.engine.interrupts import Interrupts
from trialist.engine.ledger import LEASE_SECONDS, Ledger
from trialist.engine.records import outcome_from_json
from trialist.engine.worker import LOG, Task

FINISHED = ("done", "diverged", "failed", "stale")


@dataclass(frozen=True)
class Event:
    """Something happened to a run: started, progress, done, diverged, failed, elsewhere (another process has it), released.

    `alive` comes once a second for every running one, whether or not it does anything.
    """

    kind: str
    run: str
    done: float = 0.0
    total: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""
    silent: float = 0.0
    """Seconds since the run gave a sign of life"""


Listener = Callable[[Event], None]


@dataclass
class Watch:
    """When a running run started and when it gave its last sign of life, in monotonic seconds."""

    started: float
    seen: float

    def late(self, now: float, silence_minutes: float, run_minutes: float) -> str | None:
        """What to record of a run that is to be ended, or None."""
        if now - self.started > run_minutes * 60:
            return f"TimeoutError: not done after {run_minutes:g} minutes, the most that --run-timeout allows"
        if now - self.seen > silence_minutes * 60:
            return f"TimeoutError: no progress for {silence_minutes:g} minutes"
        return None


def execute(
    ledger: Ledger,
    tasks: Sequence[Task],
    backend: Backend,
    listener: Listener,
    *,
    silence_minutes: float = 60.0,
    run_minutes: float = math.inf,
    keep_folders: bool = False,
    deadline: float | None = None,
) -> bool:
    """Runs what the ledger has not finished yet; returns False when the deadline (monotonic seconds) stopped it between runs.

    A run that gives no sign of life for `silence_minutes`, or takes longer than `run_minutes`, is ended and recorded as
    failed. Also waits for runs of these tasks that another process has claimed, and takes them over if it dies.
    Ctrl-C and whatever else ends it puts the running runs back into the queue (a second Ctrl-C at once: then their owner is
    gone, which tells the next process the same).
    """
    with Interrupts() as interrupts:
        return _work_through(
            ledger, tasks, backend, listener, silence_minutes, run_minutes, keep_folders, deadline, interrupts
        )


def _work_through(
    ledger: Ledger,
    tasks: Sequence[Task],
    backend: Backend,
    listener: Listener,
    silence_minutes: float,
    run_minutes: float,
    keep_folders: bool,
    deadline: float | None,
    interrupts: Interrupts,
) -> bool:
    by_run = {task.run: task for task in tasks}
    statuses = ledger.statuses(list(by_run))
    waiting = [task.run for task in tasks if statuses[task.run] not in FINISHED]
    running: dict[str, Watch] = {}
    renewed = told = time.monotonic()
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
                    running[claimed] = Watch(now, now)
                    backend.start(by_run[claimed])
                    listener(Event("started", claimed))
                    if not interrupts.asked:
                        continue
            ended: dict[str, tuple] = {}
            for run, message in backend.poll(0.25):
                watch = running[run]
                watch.seen = time.monotonic()
                if message[0] == "progress":
                    _, done, total, numbers = message
                    listener(Event("progress", run, done, total, numbers, watch.seen - watch.started))
                elif message[0] != "alive":
                    ended[run] = message
            now = time.monotonic()
            for run, watch in running.items():
                if run not in ended and (error := watch.late(now, silence_minutes, run_minutes)):
                    backend.stop(run)
                    ended[run] = ("failure", error, None)
            for run, message in ended.items():
                if message[0] == "failure" and interrupts.asked:
                    continue  # what the signal did to it is no failure: it goes back into the queue
                if not _store(ledger, by_run[run], message, running[run], listener, keep_folders):
                    waiting.append(run)
                del running[run]
            if interrupts.asked:
                raise KeyboardInterrupt
            if now - told > 1.0:
                for run, watch in running.items():
                    listener(Event("alive", run, seconds=now - watch.started, silent=now - watch.seen))
                told = now
            if running and now - renewed > LEASE_SECONDS / 4:
                ledger.renew()
                renewed = now
    except BaseException as stop:
        for run in running:
            backend.stop(run)
        try:
            ledger.release(running)
        except LedgerError as error:  # the next process finds their owner gone
            stop.add_note(f"The running runs could not be put back into the queue: {error}")
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


def _store(ledger: Ledger, task: Task, message: tuple, watch: Watch, listener: Listener, keep_folders: bool) -> bool:
    """Stores how a run ended; False where another process has taken it over meanwhile."""
    seconds = time.monotonic() - watch.started
    if message[0] == "outcome":
        outcome = outcome_from_json(message[1])
        if not ledger.finish(task.run, outcome, message[2], message[3]):
            listener(Event("elsewhere", task.run))
            return False
        if not keep_folders:
            shutil.rmtree(task.folder, ignore_errors=True)
        numbers: dict[str, Any] = dict(outcome.metrics)
        kind = "done" if outcome.diverged is None else "diverged"
        listener(Event(kind, task.run, numbers=numbers, seconds=seconds, message=outcome.diverged or ""))
        return True
    _, error, trace = message
    if not ledger.fail(task.run, error, trace or log_tail(Path(task.folder)), {"wall_seconds": seconds}):
        listener(Event("elsewhere", task.run))
        return False
    listener(Event("failed", task.run, seconds=seconds, message=error))
    return True


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Removes folders of finished runs whose main process was killed before it could; a kept model is not touched."""
    for folder in folders:
        if folder.is_dir() and not (folder / "model").is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def log_tail(folder: Path, size: int = 4000) -> str | None:
    """The end of what the run printed, for runs that died without a word."""
    log = folder / LOG
    if not log.is_file():
        return None
    return log.read_bytes()[-size:].decode(errors="replace")
