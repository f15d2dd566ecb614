"""What the trial engine adds to a run, and how long a large ledger takes to list and report.

There is no peer that does the same work; the targets are absolute: 50 ms a run and 2 % of its time once the worker server is
warm, 2 s for the listing and the report of 10,000 runs.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trialist.engine.backends import LocalProcesses
from trialist.engine.context import Context
from trialist.engine.contract import Arm, Budget, Claim, Cost, Endpoint, Outcome, Trial
from trialist.engine.execute import execute
from trialist.engine.ledger import Ledger
from trialist.engine.records import Configuration, PlannedRun
from trialist.engine.worker import Task

RUNS, LONG_RUNS, LONG_SECONDS = 60, 4, 5.0
MANY = 10_000


@dataclass(frozen=True)
class Sleeping(Trial):
    """Does a longer sleep take longer?"""

    claim = Claim("It does.", "arXiv:0000.00000", "", Endpoint("seconds", better="lower", margin=0.1))
    budget = Budget("steps")

    seconds: float = 0.0
    """Seconds that a run sleeps"""

    def arms(self) -> Iterator[Arm]:
        yield Arm("short", "control")
        yield Arm("long", "treatment")

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        time.sleep(self.seconds)
        return Outcome(metrics={"seconds": self.seconds + seed * 1e-6 * (arm.name == "long")}, cost=Cost(steps=1))


def planned(count: int) -> list[PlannedRun]:
    return [
        PlannedRun(f"{arm}-{seed}", f"{arm}-{seed}", "s", "c", "sleeping", "main", arm, seed, {})
        for seed in range(count // 2)
        for arm in ("short", "long")
    ]


def seconds_per_run(count: int, seconds: float) -> list[float]:
    """Wall time between the ends of neighbouring runs, one worker, with the server warm."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.db")
        ledger.register(Configuration("c", "sleeping", "benchmarks.engine:Sleeping", "tiny", {}, ""))
        runs = planned(count + 2)
        ledger.enqueue(runs)
        tasks = [
            Task(
                run.id, "benchmarks.engine:Sleeping", {"seconds": seconds}, run.arm, "main", {}, run.seed,
                str(Path(folder) / run.id), folder, 1, "s",
            )
            for run in runs
        ]  # fmt: skip
        ends: list[float] = []
        backend = LocalProcesses(1, 1, ("benchmarks.engine",))
        execute(
            ledger, tasks, backend, lambda event: ends.append(time.perf_counter()) if event.kind == "done" else None
        )
        backend.close()
        ledger.close()
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return gaps[1:]  # the server is warm from the second run on


def command_seconds(home: Path, *arguments: str) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-m", "trialist", *arguments, "--ledger", str(home / "ledger.db")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def fill(home: Path) -> None:
    """A ledger with many finished runs of one trial and the summary that a report is rendered from."""
    from trialist.engine.summary import summarize
    from trialist.engine.verdict import decide

    ledger = Ledger(home / "ledger.db")
    ledger.register(Configuration("c", "sleeping", "benchmarks.engine:Sleeping", "tiny", {}, ""))
    runs = planned(MANY)
    ledger.enqueue(runs)
    with ledger._transaction() as connection:  # one transaction: storing is not what is measured
        from trialist.engine import ledger as tables
        from trialist.engine.records import outcome_to_json

        outcome = [outcome_to_json(Outcome({"seconds": 1 + run.seed % 97 / 97}, cost=Cost(steps=1))) for run in runs]
        rows = [{"run": run.id, "body": tables._squeeze(body)} for run, body in zip(runs, outcome)]
        connection.execute(tables._outcomes.insert(), rows)
        connection.execute(tables._runs.update().values(status="done", measured={"wall_seconds": 1.0}))
    records = ledger.records(configuration="c")
    trial = Sleeping()
    arms = list(trial.arms())
    summary = summarize(
        trial, "sleeping", "tiny", arms, records, decide(trial, arms, records), inputs={}, versions={}, hardware={},
        command="", date="2026-01-01", tuning={}, margin=None, endpoint=None, full_trial_command=None, stages=[],
    )  # fmt: skip
    ledger.store_summary("c", summary)
    ledger.close()


def rows() -> list:
    import numpy as np

    from benchmarks.timer import Row

    short = np.array(seconds_per_run(RUNS, 0.0))
    long = np.array(seconds_per_run(LONG_RUNS, LONG_SECONDS)) - LONG_SECONDS
    overhead, share = float(np.median(short)), float(np.median(long)) / LONG_SECONDS
    found = [
        Row("engine, per run", f"{RUNS} runs that do nothing, one worker", describe(short), target="at most 50 ms",
            met=overhead <= 0.05),
        Row("engine, share of a run", f"{LONG_RUNS} runs of {LONG_SECONDS:.0f} s, one worker", f"{share:.2%} of the run's time",
            target="at most 2 %", met=share <= 0.02),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        for name, arguments in (("list", ("runs", "--limit", "0")), ("report", ("report", "sleeping"))):
            times = np.array([command_seconds(Path(folder), *arguments) for _ in range(5)])
            found.append(
                Row(f"ledger, {name}", f"{MANY:,} runs, the whole command", describe(times), target="under 2 s",
                    met=float(np.median(times)) < 2.0)
            )  # fmt: skip
    return found


def describe(seconds: object) -> str:
    import numpy as np

    values = np.asarray(seconds) * 1000
    low, high = np.quantile(values, [0.25, 0.75])
    return f"median {np.median(values):.1f} ms, min {values.min():.1f}, IQR {high - low:.1f}"
