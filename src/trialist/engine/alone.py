"""Runs that stand alone: a measurement without a comparison, kept in the ledger like the runs of a trial.

Each has a configuration of its own and one arm. `trialist runs`, `verify` and `compare` treat it as any other run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trialist.engine.backends import LocalProcesses
from trialist.engine.contract import Arm, Trial
from trialist.engine.display import Display
from trialist.engine.execute import execute, remove_leftovers
from trialist.engine.hardware import accelerators, cores, resolve_device
from trialist.engine.identity import digest, inputs_by_content, inputs_of, run_identity, source_digest
from trialist.engine.ledger import Ledger
from trialist.engine.records import Configuration, PlannedRun, RunRecord
from trialist.engine.worker import Task

FINISHED = ("done", "diverged", "stale")


def run_alone(
    name: str,
    path: str,
    trials: Sequence[Trial],
    *,
    seed: int,
    ledger_path: Path,
    command: str,
    again: bool = False,
    display: Display | None = None,
) -> list[RunRecord]:
    """One run of the only arm of each trial, in this order, one at a time; what the ledger holds already is not run twice.

    name: what the runs are listed under. path: `module:Class` of the trials. again: run what is finished once more, as a
    further run. A run that failed before is tried again. Raises ValueError or FileNotFoundError for inputs that cannot
    work, before any run starts.
    """
    ledger = Ledger(ledger_path)
    planned, tasks = [], []
    threads = cores()
    try:
        for trial in trials:
            trial.check()
            inputs = inputs_by_content(trial)
            source = source_digest(path, trial.sources())
            key = digest({"trial": name, "version": trial.version, "inputs": inputs})
            ledger.register(Configuration(key, name, path, "", inputs_of(trial), command))
            (arm,) = trial.arms()
            run = _plan(name, trial, inputs, arm, seed, source, key)
            repetition = 0
            while again and ledger.statuses([run.id]).get(run.id) in FINISHED:
                repetition += 1
                run = _plan(name, trial, inputs, arm.with_options(repetition=repetition), seed, source, key)
            planned.append(run)
        answers = ledger.enqueue(planned, retry=True)
        statuses = ledger.statuses(list(answers.values()))
        remove_leftovers(ledger_path.parent / "runs" / row for row, status in statuses.items() if status in FINISHED)
        with display or Display() as shown:
            shown.add(planned, answers, statuses, 1, name)
            for trial, run in zip(trials, planned):
                row = answers[run.id]
                tasks.append(
                    Task(
                        run=row, path=path, inputs=inputs_of(trial), arm=run.arm, setting=run.setting, options=run.options,
                        seed=seed, folder=str(ledger_path.parent / "runs" / row),
                        stages=str(ledger_path.parent / "stages"), threads=threads, source=run.source,
                    )
                )  # fmt: skip
            if any(status not in FINISHED for status in statuses.values()):
                on_gpu = any(resolve_device(str(getattr(trial, "device", "cpu"))) == "cuda" for trial in trials)
                modules = dict.fromkeys([path.partition(":")[0], *(m for trial in trials for m in trial.preload)])
                backend = LocalProcesses(1, threads, tuple(modules), min(accelerators(), 1) if on_gpu else 0)
                try:
                    execute(ledger, tasks, backend, shown, silence_minutes=max(t.silence_minutes for t in trials))
                finally:
                    backend.close()
            shown.pause()
            return ledger.records([answers[run.id] for run in planned])
    finally:
        ledger.close()


def _plan(name: str, trial: Trial, inputs: dict, arm: Arm, seed: int, source: str, configuration: str) -> PlannedRun:
    identity = run_identity(name, trial, inputs, arm, seed)
    return PlannedRun(
        id=digest({"identity": identity, "source": source}, size=6),
        identity=identity,
        source=source,
        configuration=configuration,
        trial=name,
        setting=arm.setting,
        arm=arm.name,
        seed=seed,
        options=dict(arm.options),
    )
