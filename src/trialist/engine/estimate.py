"""What a trial will take, before it runs: runs, minutes after timing a few steps, memory, disk, detectable effect."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trialist.engine import tuning as tune
from trialist.engine.api import check_workers, open_backend, threads_per_run
from trialist.engine.contract import Arm
from trialist.engine.ledger import Ledger
from trialist.engine.plan import Prepared, in_blocks
from trialist.engine.records import primary_setting
from trialist.engine.stages import list_stages
from trialist.engine.worker import Task

PROBE_SECONDS = 10.0
GIVE_UP_SECONDS = 180.0


@dataclass(frozen=True)
class Probe:
    """What timing the first steps of an arm told."""

    arm: str
    setting: str
    seconds: float | None
    """Projected seconds of a whole run; None when it reported no progress in time"""
    peak_bytes: int
    error: str | None = None


def estimate(prepared: Prepared, say: Callable[[str], None], *, probe: bool = True) -> dict[str, Any]:
    """The plan of a trial as one JSON document; with `probe`, every arm runs for a few seconds and is stopped."""
    check_workers(prepared)
    tuned = tune.shipped(prepared)
    tuning_runs = 0
    if tuned is None and prepared.trial.tuning is not None:
        tuning_runs = len(tune.tuning_arms(prepared)) * len(prepared.trial.tuning.seeds)
    arms = (tuned or tune.Tuned()).apply(prepared.arms)
    planned = in_blocks(prepared, arms, prepared.seeds)
    statuses: dict[str, str] = {}
    if prepared.ledger_path.exists():
        ledger = Ledger(prepared.ledger_path)
        statuses = ledger.statuses([run.id for run in planned])
        ledger.close()
    finished = sum(statuses.get(run.id) in ("done", "diverged") for run in planned)
    backend = open_backend(prepared, len(planned))
    slots = backend.slots
    probes: list[Probe] = []
    try:
        if probe:
            probes = _probe(prepared, arms, backend, say)
    finally:
        backend.close()
    seconds = {(entry.arm, entry.setting): entry.seconds for entry in probes}
    known = [value for value in seconds.values() if value is not None]
    minutes = tuning_minutes = None
    if known:
        mean = sum(known) / len(known)
        todo = [run for run in planned if statuses.get(run.id) not in ("done", "diverged")]
        minutes = sum(seconds.get((run.arm, run.setting)) or mean for run in todo) / slots / 60
        tuning_minutes = tuning_runs * mean / slots / 60
    endpoint = prepared.endpoint or prepared.trial.claim.endpoint
    return {
        "trial": prepared.name,
        "preset": prepared.preset,
        "inputs": {field.name: getattr(prepared.trial, field.name) for field in dataclasses.fields(prepared.trial)},
        "replicate": prepared.trial.replicates_over(),
        "arms": [{"arm": arm.name, "setting": arm.setting, "role": arm.role, "null": arm.null} for arm in arms],
        "seeds": list(prepared.seeds),
        "runs": len(planned),
        "runs_finished": finished,
        "tuning_runs": tuning_runs,
        "workers": slots,
        "threads_per_run": threads_per_run(slots),
        "minutes": minutes,
        "tuning_minutes": tuning_minutes,
        "probes": [dataclasses.asdict(entry) for entry in probes],
        "peak_memory_gib": slots * max((entry.peak_bytes for entry in probes), default=0) / 2**30 or None,
        "stages": [entry["name"] for entry in list_stages(prepared.home / "stages")],
        "disk_free_gib": shutil.disk_usage(_existing(prepared.home)).free / 2**30,
        "endpoint": endpoint.name,
        "margin": prepared.options.margin or endpoint.margin,
        **_detectable(prepared, endpoint.name),
        "remarks": list(prepared.trial.remarks()),
    }


def _detectable(prepared: Prepared, endpoint: str) -> dict[str, Any]:
    """The effect that this number of seeds would show in four trials of five, from earlier runs where there are any."""
    from trialist.engine.power import detectable_effect

    n = len(prepared.seeds)
    in_sd = detectable_effect(n) if n >= 3 else None
    spread = _earlier_spread(prepared, endpoint)
    return {
        "detectable_in_sd": in_sd,
        "sd_of_difference": spread,
        "detectable_effect": None if in_sd is None or spread is None else in_sd * spread,
    }


def _earlier_spread(prepared: Prepared, endpoint: str) -> float | None:
    """Largest standard deviation over seeds of treatment minus control in earlier runs of this trial, on the raw scale."""
    import statistics

    if not prepared.ledger_path.exists():
        return None
    ledger = Ledger(prepared.ledger_path)
    setting = primary_setting(list(prepared.arms))
    roles = {arm.name: arm.role for arm in prepared.arms if arm.setting == setting}
    spreads = []
    for configuration in ledger.configurations(prepared.name):
        values: dict[str, dict[int, float]] = {}
        for record in ledger.records(configuration=configuration.key):
            metrics = record.outcome.metrics if record.status == "done" and record.outcome else {}
            if record.purpose == "trial" and record.setting == setting and endpoint in metrics:
                values.setdefault(record.arm, {})[record.seed] = metrics[endpoint]
        treatment = next((values[arm] for arm, role in roles.items() if role == "treatment" and arm in values), {})
        for arm, role in roles.items():
            shared = sorted(set(treatment) & set(values.get(arm, {})))
            if role == "control" and len(shared) >= 3:
                spreads.append(statistics.stdev(treatment[seed] - values[arm][seed] for seed in shared))
        if spreads:
            break
    ledger.close()
    return max(spreads, default=None)


def _probe(prepared: Prepared, arms: Sequence[Arm], backend: Any, say: Callable[[str], None]) -> list[Probe]:
    """Runs each arm until its progress tells the pace, then stops it. Nothing is stored but stages, which serve later."""
    folder = Path(tempfile.mkdtemp(prefix="trialist-plan-"))
    threads = threads_per_run(backend.slots)
    waiting = list(arms)
    running: dict[str, dict[str, Any]] = {}
    found: list[Probe] = []
    try:
        while waiting or running:
            while waiting and len(running) < backend.slots:
                arm = waiting.pop(0)
                run = prepared.planned(arm, prepared.seeds[0])
                task: Task = dataclasses.replace(prepared.task(run, run.id, threads), folder=str(folder / run.id))
                backend.start(task)
                running[run.id] = {"arm": arm, "start": time.monotonic(), "first": None, "last": None, "peak": 0}
            for run_id, message in backend.poll(0.25):
                state = running[run_id]
                now = time.monotonic()
                if message[0] == "progress":
                    state["first"] = state["first"] or (now, message[1])
                    state["last"] = (now, message[1], message[2])
                    state["peak"] = max(state["peak"], backend.resident_bytes(run_id))
                elif message[0] != "alive":
                    del running[run_id]
                    error = message[1] if message[0] == "failure" else None
                    measured = message[2] if message[0] == "outcome" else {}
                    seconds = measured.get("clock_seconds", measured.get("wall_seconds"))
                    peak = int(measured.get("peak_bytes", 0))
                    found.append(Probe(state["arm"].name, state["arm"].setting, seconds, peak, error))
                    say(f"{state['arm'].setting} · {state['arm'].name}: {error or f'{seconds:.1f} s a run'}")
            for run_id, state in list(running.items()):
                now = time.monotonic()
                first, last = state["first"], state["last"]
                enough = first is not None and now - first[0] >= PROBE_SECONDS and last[1] > first[1]
                if enough or now - state["start"] > GIVE_UP_SECONDS:
                    backend.stop(run_id)
                    del running[run_id]
                    seconds = None
                    if enough:
                        pace = (last[0] - first[0]) / (last[1] - first[1])
                        seconds = (first[0] - state["start"]) + pace * (last[2] - first[1])
                    found.append(Probe(state["arm"].name, state["arm"].setting, seconds, state["peak"]))
                    pace_text = f"about {seconds:.0f} s a run" if seconds else "no progress reported in time"
                    say(f"{state['arm'].setting} · {state['arm'].name}: {pace_text}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
