"""The whole way from a trial's name to its verdict: settle, tune, run, decide, report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.engine import tuning as tune
from trialist.engine.backends import Backend, LocalProcesses, RayTasks
from trialist.engine.contract import Arm
from trialist.engine.display import Display, duration
from trialist.engine.execute import Event, execute, remove_leftovers
from trialist.engine.hardware import accelerators, cores, describe_hardware, describe_versions
from trialist.engine.ledger import Ledger
from trialist.engine.options import RunOptions
from trialist.engine.plan import Prepared, in_blocks, prepare, preset_fields, presets_of
from trialist.engine.records import PlannedRun, RunRecord, Verdict
from trialist.engine.stages import list_stages

ASK_ABOVE_MINUTES = 30.0
TUNING_FAILED = (
    "{failed} of {tries} tuning runs failed, so the values cannot be chosen fairly: `trialist runs --status failed --errors` "
    "shows why, --retry runs them again"
)
EVIDENCE_FOLDER = Path("evidence")


class NeedsConfirmation(ValueError):
    """The work would take long and nobody agreed to it."""


class Unfinished(RuntimeError):
    """The time limit stopped the trial between runs, or runs of its tuning failed; the same command goes on."""


@dataclass(frozen=True)
class Result:
    verdict: Verdict | None
    """None when the time limit stopped the trial before its verdict, or runs of its tuning failed"""
    summary: Mapping[str, Any] | None
    report: Path | None
    evidence: Path | None
    failed: int
    """Runs that ended in an infrastructure failure"""


def run(name: str, **settings: Any) -> Verdict:
    """Runs a trial and returns its verdict, as `trialist run NAME` does.

    settings: the trial's own inputs (`model`, `data`, `steps`, ...) and the fields of `RunOptions` (`preset`, `seeds`,
    `workers`, ...). Raises ValueError for unknown names and inputs that cannot work, Unfinished at `max_minutes`.
    """
    options, fields = split_settings(settings)
    result = conduct(prepare(name, fields, options, command=_python_call(name, settings)))
    if result.verdict is None and result.failed:
        raise Unfinished(f"{result.failed} tuning runs failed; call trialist.run again with retry=True")
    if result.verdict is None:
        raise Unfinished(f"stopped after {options.max_minutes:g} minutes; call trialist.run again to go on")
    return result.verdict


def split_settings(settings: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    own = {key: value for key, value in settings.items() if key in RunOptions.__dataclass_fields__}
    if isinstance(own.get("arms"), (list, str)):
        own["arms"] = (own["arms"],) if isinstance(own["arms"], str) else tuple(own["arms"])
    return RunOptions(**own), {key: value for key, value in settings.items() if key not in own}


def conduct(
    prepared: Prepared, *, display: Display | None = None, confirm: Callable[[str], bool] | None = None
) -> Result:
    """Executes what the ledger lacks, decides, stores the summary and writes the report.

    confirm: asked once when the work left is above 30 minutes and `yes` is not set; without it NeedsConfirmation is raised.
    """
    options = prepared.options
    check_workers(prepared)
    evidence_name = check_evidence_name(prepared)
    ledger = Ledger(prepared.ledger_path)
    deadline = None if options.max_minutes is None else time.monotonic() + options.max_minutes * 60
    with contextlib.closing(ledger), display or Display() as shown:
        ledger.say_to(shown.say)
        ledger.register(prepared.configuration)
        for remark in prepared.trial.remarks():
            shown.say(remark)
        runner = _Runner(prepared, ledger, shown, confirm, deadline)
        try:
            tuned = tune.shipped(prepared)
            if tuned is None and prepared.trial.tuning is not None and any(arm.tune for arm in prepared.arms):
                tries = tune.tuning_arms(prepared)
                planned = [
                    prepared.planned(arm, seed, "tuning") for seed in prepared.trial.tuning.seeds for arm in tries
                ]
                records = runner.run(planned, "tuning")
                if records is None:
                    return Result(None, None, None, None, 0)
                if failed := sum(record.status == "failed" for record in records):
                    shown.say(TUNING_FAILED.format(failed=failed, tries=len(records)))
                    return Result(None, None, None, None, failed)
                tuned = tune.choose(prepared, records)
                for arm, values in tuned.values.items():
                    shown.say(f"tuned {arm}: {', '.join(f'{knob} {value:g}' for knob, value in values.items())}")
            tuned = tuned or tune.Tuned()
            arms = tuned.apply(prepared.arms)
            verdict, records = _run_to_verdict(prepared, runner, tuned, arms)
            if verdict is None:
                return Result(None, None, None, None, 0)
        finally:
            runner.close()
        summary = _summarize(prepared, arms, records, verdict, tuned)
        ledger.store_summary(prepared.configuration.key, summary)
        report = _write_report(prepared, summary)
        evidence = None
        if evidence_name is not None:
            from trialist.engine.summary import write_evidence

            evidence = write_evidence(summary, EVIDENCE_FOLDER / prepared.name, evidence_name)
            if tuned.origin == "this ledger" and not prepared.changed:
                shown.say(f"tuned values: {tune.ship(prepared, tuned)}")
    failed = sum(record.status == "failed" for record in records)
    return Result(dataclasses.replace(verdict, data=summary), summary, report, evidence, failed)


class _Runner:
    """Holds what all phases of one call share: ledger, worker processes, table, limits."""

    def __init__(
        self,
        prepared: Prepared,
        ledger: Ledger,
        display: Display,
        confirm: Callable[[str], bool] | None,
        deadline: float | None,
    ) -> None:
        self.prepared, self.ledger, self.display, self.confirm, self.deadline = (
            prepared,
            ledger,
            display,
            confirm,
            deadline,
        )
        self.agreed = prepared.options.yes or (
            prepared.options.max_minutes is not None and prepared.options.max_minutes <= ASK_ABOVE_MINUTES
        )
        self.backend: Backend | None = None

    def run(self, planned: Sequence[PlannedRun], phase: str) -> list[RunRecord] | None:
        """Records of the planned runs, in order; None when the time limit came first."""
        options = self.prepared.options
        answers = self.ledger.enqueue(planned, accept_stale=options.accept_stale, retry=options.retry)
        rows = [answers[run.id] for run in planned]
        statuses = self.ledger.statuses(rows)
        if not options.keep_models:
            ended = (row for row, status in statuses.items() if status in ("done", "diverged"))
            remove_leftovers(self.prepared.home / "runs" / row for row in ended)
        unfinished = sum(status in ("queued", "running") for status in statuses.values())
        if unfinished and self.backend is None:
            # by all runs of the trial, not by those left: the threads of a run, which its last bits depend on, must not
            # depend on what was done before an interruption
            self.backend = open_backend(self.prepared, len(self.prepared.arms) * len(self.prepared.seeds))
        slots = self.backend.slots if self.backend else 1
        self.display.add(planned, answers, statuses, slots, phase)
        if unfinished and self.backend is not None:
            threads = threads_per_run(slots)
            tasks = [self.prepared.task(run, answers[run.id], threads) for run in planned]
            finished = execute(
                self.ledger,
                tasks,
                self.backend,
                self._listen,
                silence_minutes=math.inf
                if options.on
                else self.prepared.trial.silence_minutes,  # Ray tells no progress
                run_minutes=math.inf if options.run_timeout is None else options.run_timeout,
                keep_folders=options.keep_models,
                deadline=self.deadline,
            )
            self.display.pause()
            if not finished:
                done = sum(status not in ("queued", "running") for status in self.ledger.statuses(rows).values())
                self.display.say(
                    f"stopped after {options.max_minutes:g} minutes: {done} of {len(rows)} runs finished; "
                    "the same command goes on"
                )
                return None
        self.display.pause()
        return self.ledger.records(rows)

    def _listen(self, event: Event) -> None:
        self.display(event)
        if self.agreed or event.kind != "progress":
            return
        rows = list(self.display.rows.values())
        left = self.display.forecast.seconds_left(rows)
        if left is None or left < ASK_ABOVE_MINUTES * 60:
            return
        self.display.pause()
        question = (
            f"this takes about {duration(left)} ({sum(row.status != 'done' for row in rows)} runs of this phase left)"
        )
        if self.confirm is None or not self.confirm(question):
            raise NeedsConfirmation(f"{question}; add --yes to agree, or --max-minutes to do a part, or fewer --seeds")
        self.agreed = True

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()


def _run_to_verdict(
    prepared: Prepared, runner: _Runner, tuned: tune.Tuned, arms: Sequence[Arm]
) -> tuple[Verdict | None, list[RunRecord]]:
    from trialist.engine.sequential import Look
    from trialist.engine.verdict import decide

    options = prepared.options
    points: Sequence[int] = (len(prepared.seeds),)
    if options.until_decided:
        declared = options.look_points()
        points = tuple(range(4, len(prepared.seeds) + 1)) if declared is None else declared
        if max(points) > len(prepared.seeds):
            raise ValueError(f"--looks {options.looks} needs --seeds {max(points)}, not {len(prepared.seeds)}")
    verdict: Verdict | None = None
    records: list[RunRecord] = []
    for point in points:
        seeds = prepared.seeds[:point]
        found = runner.run(in_blocks(prepared, arms, seeds), f"trial, seeds {seeds[0]} to {seeds[-1]}")
        if found is None:
            return None, []
        records = found
        look = None
        if options.until_decided:
            look = Look(options.look_points())
        verdict = decide(
            prepared.trial,
            list(arms),
            records,
            margin=options.margin,
            endpoint=prepared.endpoint,
            replicate=prepared.trial.replicates_over(),
            look=look,
            tuning_equal=tuned.equal,
            tuning_note="" if tuned.origin in ("none", "this ledger") else tuned.origin,
            substitutes=prepared.trial.remarks(),
            expected=[(arm.name, arm.setting, seed) for arm in arms for seed in seeds],
        )
        if options.until_decided and verdict.word != "inconclusive":
            break
    return verdict, records


def check_workers(prepared: Prepared) -> None:
    if prepared.timed and (prepared.options.workers or 1) > 1:
        raise ValueError(
            f"{prepared.name} decides over a time, and runs side by side would disturb each other: --workers must be 1, "
            f"not {prepared.options.workers}"
        )


def check_evidence_name(prepared: Prepared) -> str | None:
    """The name of the evidence file to write, or None. Raises ValueError for a preset's name over changed inputs."""
    given = prepared.options.save_evidence
    if given is None:
        return None
    if given and not re.fullmatch(r"[\w.-]{1,100}", given):
        raise ValueError(
            f"--save-evidence {given!r}: a name of letters, digits, `.`, `_` and `-` is expected, not a path"
        )
    touched = [*prepared.changed, *(f for f in ("endpoint", "margin", "arms") if getattr(prepared.options, f))]
    if touched and given in ("", *presets_of(type(prepared.trial))):
        raise ValueError(
            f"--save-evidence: {', '.join(touched)} differ from preset {prepared.preset!r}; give the file a name of its own, "
            "--save-evidence NAME"
        )
    if not touched and given not in ("", prepared.preset):
        return given
    return given or prepared.preset


def default_workers(prepared: Prepared, runs: int) -> int:
    if prepared.timed:
        return 1
    return min(prepared.options.workers or min(cores(), 4), max(runs, 1))


def threads_per_run(slots: int) -> int:
    return max(1, cores() // slots)


def open_backend(prepared: Prepared, runs: int) -> Backend:
    device = str(prepared.inputs.get("device", "cpu"))
    gpus = accelerators() if device.startswith("cuda") else 0
    if prepared.options.on is not None:
        return RayTasks(prepared.options.on, 1 if prepared.timed else prepared.options.workers, threads=1, gpus=gpus)
    slots = (
        min(prepared.options.workers or gpus, gpus, max(runs, 1))
        if gpus and not prepared.timed
        else default_workers(prepared, runs)
    )
    modules = (prepared.path.partition(":")[0], *prepared.trial.preload)
    return LocalProcesses(slots, threads_per_run(slots), modules, gpus)


def _summarize(
    prepared: Prepared, arms: Sequence[Arm], records: Sequence[RunRecord], verdict: Verdict, tuned: tune.Tuned
) -> dict[str, Any]:
    from trialist.engine.summary import summarize

    trial = prepared.trial
    return summarize(
        trial,
        prepared.name,
        prepared.preset,
        list(arms),
        list(records),
        verdict,
        inputs=dict(prepared.inputs),
        versions=describe_versions(trial.versions),
        hardware=describe_hardware(),
        command=prepared.command,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        tuning={
            "origin": tuned.origin,
            "equal": tuned.equal,
            "tries": trial.tuning.tries if trial.tuning else 0,
            "seeds": list(trial.tuning.seeds) if trial.tuning else [],
            "metric": trial.tuning.metric.name if trial.tuning else None,
            "values": {arm: dict(values) for arm, values in tuned.values.items()},
            "rows": [dict(row) for row in tuned.rows],
        },
        margin=prepared.options.margin,
        endpoint=prepared.endpoint,
        full_trial_command=full_trial_command(prepared),
        stages=[
            {key: entry[key] for key in ("name", "key", "wall_seconds", "bytes")}
            for entry in sorted(list_stages(prepared.home / "stages"), key=lambda entry: (entry["name"], entry["key"]))
            if f"{entry['name']}-{entry['key']}" in {stage for record in records for stage in record.stages}
        ],
    )


def full_trial_command(prepared: Prepared) -> str | None:
    """After a demo, the command that answers the question for real."""
    if prepared.preset != "demo" or "tiny" not in presets_of(type(prepared.trial)):
        return None
    kept = [f"--{name.replace('_', '-')} {shlex.quote(str(getattr(prepared.trial, name)))}" for name in prepared.changed
            if name not in preset_fields(type(prepared.trial), "demo")]  # fmt: skip
    return " ".join([f"trialist run {prepared.name} --preset tiny --seeds 6", *kept])


def _write_report(prepared: Prepared, summary: Mapping[str, Any]) -> Path:
    from trialist.engine.report import write_report

    target = prepared.options.output or prepared.home / "reports" / f"{prepared.name}-{prepared.preset}.html"
    return write_report(summary, target)


def _python_call(name: str, settings: Mapping[str, Any]) -> str:
    return f"trialist.run({', '.join([repr(name), *(f'{key}={value!r}' for key, value in settings.items())])})"


def command_line() -> str:
    """The command that started this process, with the program's path left out."""
    return shlex.join(["trialist", *sys.argv[1:]])
