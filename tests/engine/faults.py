"""Nights with faults: real `trialist run` processes that are killed at random moments, and what must hold afterwards.

By hand: python -m tests.engine.faults --kills 300 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MARK = "TRIALIST_FAULT_MARK"
TIMES = {
    "wall_seconds", "cpu_seconds", "clock_seconds", "clock_cpu_seconds", "peak_bytes", "created", "started", "ended", "attempt",
    "date", "cost_ratio", "advice", "cost_equivalent", "bytes",
}  # fmt: skip
"""Keys whose values differ between two runs of the same thing"""


@dataclass
class Command:
    """`trialist run` of the dice in a folder of its own, and the processes that come of it."""

    home: Path
    options: tuple[str, ...]
    site: Path | None = None
    """Folder of the test package; None where it is installed"""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> subprocess.Popen:
        environment = {**os.environ, "TRIALIST_HOME": str(self.home), MARK: self.mark, "OMP_NUM_THREADS": "1"}
        if self.site is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(self.site), environment.get("PYTHONPATH", "")])
        log = open(self.home.with_suffix(".log"), "ab")  # noqa: SIM115 - the process writes to it
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "trialist", "run", "dice", "--retry", *self.options],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                preexec_fn=hearing,
            )  # fmt: skip

    def log(self) -> str:
        return self.home.with_suffix(".log").read_text(errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Every living process that carries the mark, whatever session or parent it has."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def others(self, main: int) -> list[psutil.Process]:
        """All but the main process: runs, their server and keeper, the tracker."""
        return [process for process in self.alive() if process.pid != main]

    def wait_until_none_is_alive(self, seconds: float = 20.0, but_children_of: int | None = None) -> None:
        """but_children_of: a process whose server, which it goes on using, is no orphan."""
        deadline = time.monotonic() + seconds
        while left := [
            parts for process in self.alive() if (parts := described(process))[1] not in (but_children_of, None)
        ]:
            if time.monotonic() > deadline:
                raise AssertionError(f"orphans (process, parent, command): {left}")
            time.sleep(0.05)


def described(process: psutil.Process) -> tuple[int, int | None, str]:
    """Process, parent (None where it has just ended) and command."""
    try:
        return process.pid, process.ppid(), " ".join(process.cmdline())[-200:]
    except psutil.Error:
        return process.pid, None, ""


def hearing() -> None:
    """A script's background job has SIGINT ignored, which its children inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def uninterrupted(command: Command) -> dict[str, Any]:
    code = command.start().wait(120)
    assert code == 0, command.log()
    return what_is_stored(command.home)


def nights(command: Command, expected: dict[str, Any], kills: int, seed: int, pause: float) -> Iterator[Counter]:
    """Works through trials, each in a fresh folder, until `kills` processes were killed; yields what was hit in each trial.

    A kill hits the main process or any other process of the trial, at a random moment within twice `pause` seconds of its
    start, of its first other process, or of the kill before.
    Raises AssertionError where a finished trial is not what it would be without faults.
    """
    chance = random.Random(seed)
    left = kills
    while left > 0:
        shutil.rmtree(command.home, ignore_errors=True)
        hit: Counter = Counter()
        code = None
        while code != 0:
            process = command.start()
            if chance.random() < 0.8:  # most kills shall hit the work; a start is mostly imports
                while process.poll() is None and not command.others(process.pid):
                    time.sleep(0.02)
            while process.poll() is None and left > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0.0, 2 * pause))
                    break
                others = command.others(process.pid)
                if others and chance.random() < 0.5:
                    victim = chance.choice(others)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        name = kind(victim)
                        victim.kill()
                        hit[name] += 1
                        left -= 1
                else:
                    process.kill()
                    hit["main"] += 1
                    left -= 1
            code = process.wait(180)
            command.wait_until_none_is_alive()
            assert code in (0, 1, -signal.SIGKILL), f"exit code {code}\n{command.log()}"
            assert "trialist/cli" not in command.log(), command.log()  # a traceback of ours
        found = what_is_stored(command.home)
        assert found == expected, differences(expected, found)
        yield hit


def kind(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return "tracker" if "resource_tracker" in line else "server" if process.children() else "worker"


def what_is_stored(home: Path) -> dict[str, Any]:
    """The ledger without times, after a look at every file. Raises AssertionError for what is half-written or left over."""
    from trialist.engine.ledger import Ledger
    from trialist.engine.records import outcome_to_json

    check_files(home)
    ledger = Ledger(home / "ledger.db", create=False)
    with ledger._transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        orphans = "SELECT count(*) FROM outcomes WHERE run NOT IN (SELECT id FROM runs)"
        assert connection.exec_driver_sql(orphans).scalar() == 0
    rows = ledger.rows()
    stored = {
        "rows": {row["id"]: without_times(row) for row in rows},
        "outcomes": {record.id: outcome_to_json(record.outcome) for record in ledger.records([row["id"] for row in rows])
                     if record.outcome},
        "summaries": [without_times(ledger.summary(entry.key)) for entry in ledger.configurations()],
    }  # fmt: skip
    ledger.close()
    assert len(stored["outcomes"]) == len(rows), {row["id"]: row["status"] for row in rows}
    return json.loads(json.dumps(stored))


def check_files(home: Path) -> None:
    from safetensors import safe_open

    for path in home.rglob("*"):
        assert not path.name.endswith((".tmp", ".building", ".unfinished")), f"left over: {path}"
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as tensors:
                assert list(tensors.keys()), path
    assert not list((home / "runs").glob("*")), "folders of finished runs are left"
    assert "</html>" in next((home / "reports").glob("*.html")).read_text()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES and "second" not in key}
    if isinstance(value, (list, tuple)):
        return [without_times(entry) for entry in value]
    return value


def differences(expected: Any, found: Any, place: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*expected, *found})
        return [line for key in keys for line in differences(expected.get(key), found.get(key), f"{place}.{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [line for at, pair in enumerate(zip(expected, found)) for line in differences(*pair, f"{place}[{at}]")]
    return [] if expected == found else [f"{place}: {expected!r} expected, {found!r} found"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between two kills")
    parser.add_argument("--site", type=Path, default=None, help="folder of the test package, if it is not installed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ("--workers", "2", "--seconds", "0.2", "--building", "0.2")
        expected = uninterrupted(Command(Path(folder, "calm"), options, given.site))
        total: Counter = Counter()
        start = time.monotonic()
        for number, hit in enumerate(nights(Command(Path(folder, "night"), options, given.site), expected, given.kills,
                                            given.seed, given.pause), start=1):  # fmt: skip
            total += hit
            print(
                f"trial {number}: {dict(hit)}, in all {total.total()} kills, {time.monotonic() - start:.0f} s",
                flush=True,
            )
        print(
            f"{total.total()} kills {dict(total)} in {number} trials: every ledger equal, no orphan, no half-written file"
        )


if __name__ == "__main__":
    main()
