"""Runs through real worker processes, with the torch-free trial of the test package."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trialist.engine.api import split_settings
from trialist.engine.backends import LocalProcesses
from trialist.engine.execute import Event, execute
from trialist.engine.ledger import Ledger
from trialist.engine.plan import in_blocks, prepare


def start(**settings):
    """Ledger, tasks of a coins trial, and an event list."""
    options, fields = split_settings({"preset": "demo", **settings})
    prepared = prepare("coins", fields, options)
    ledger = Ledger(prepared.ledger_path)
    ledger.register(prepared.configuration)
    planned = in_blocks(prepared, prepared.arms, prepared.seeds)
    answers = ledger.enqueue(planned, retry=options.retry)
    return ledger, [prepared.task(run, answers[run.id], 1) for run in planned]


def work_through(ledger, tasks, *, workers=2, **limits) -> list[Event]:
    events: list[Event] = []
    backend = LocalProcesses(workers, 1, ("trialist_coins",))
    try:
        execute(ledger, tasks, backend, events.append, **limits)
    finally:
        backend.close()
    return events


def outcomes(ledger) -> dict:
    return {(r["arm"], r["setting"], r["seed"]): ledger.records([r["id"]])[0].outcome for r in ledger.rows()}


def test_every_run_is_done_once_with_an_outcome_and_measured_cost(coins):
    ledger, tasks = start()
    events = work_through(ledger, tasks)
    rows = ledger.rows()
    assert [row["status"] for row in rows] == ["done"] * 18
    assert all(row["measured"]["wall_seconds"] > 0 and row["measured"]["peak_bytes"] > 1e6 for row in rows)
    assert sum(event.kind == "started" for event in events) == 18


def test_finished_runs_are_not_run_again(coins):
    ledger, tasks = start()
    work_through(ledger, tasks)
    assert work_through(ledger, tasks) == []


def test_arms_of_one_seed_share_their_random_numbers(coins):
    ledger, tasks = start(hand=0.0)
    work_through(ledger, tasks)
    found = outcomes(ledger)
    assert (
        found["fair", "table", 0].metrics == found["old", "table", 0].metrics == found["weighted", "glued", 0].metrics
    )
    difference = found["weighted", "table", 0].metrics["heads"] - found["fair", "table", 0].metrics["heads"]
    assert difference == pytest.approx(0.2, abs=1e-12)


def test_a_run_that_raises_is_recorded_with_its_traceback_and_the_others_go_on(coins):
    ledger, tasks = start(crash="old")
    work_through(ledger, tasks)
    failed = ledger.rows(status="failed")
    assert {(row["arm"], row["setting"]) for row in failed} == {("old", "table")}
    assert failed[0]["error"] == "RuntimeError: the coin rolled under the sofa"
    assert "in run" in failed[0]["traceback"]
    assert len(ledger.rows(status="done")) == 15


def test_a_run_killed_by_a_signal_is_recorded_as_such(coins):
    ledger, tasks = start(crash="old:kill", seeds=1)
    work_through(ledger, tasks)
    assert "killed by SIGKILL" in ledger.rows(status="failed")[0]["error"]


def test_a_silent_run_is_stopped_and_recorded_as_a_time_out(coins):
    ledger, tasks = start(crash="old:hang", seeds=1)
    work_through(ledger, tasks, silence_minutes=0.5 / 60)
    assert "no progress" in ledger.rows(status="failed")[0]["error"]
    assert not [p for p in psutil.Process().children(recursive=True) if "hang" in " ".join(p.cmdline())]


def test_retry_queues_failed_runs_as_a_further_attempt(coins, tmp_path):
    ledger, tasks = start(crash="old", seeds=1)
    work_through(ledger, tasks)
    ledger, tasks = start(crash="old", seeds=1, retry=True)
    row = ledger.rows(status="queued")[0]
    assert (row["arm"], row["attempt"]) == ("old", 2)


def test_divergence_is_an_outcome_and_not_a_failure(coins):
    ledger, tasks = start(crash="weighted:diverge", seeds=1)
    work_through(ledger, tasks)
    record = ledger.records([ledger.rows(status="diverged")[0]["id"]])[0]
    assert record.outcome.diverged == "no coin left at throw 3"


def test_the_time_limit_stops_between_runs_and_leaves_a_state_to_go_on_from(coins):
    ledger, tasks = start(seconds=0.3)
    work_through(ledger, tasks, deadline=time.monotonic() + 1.5)
    statuses = [row["status"] for row in ledger.rows()]
    assert 0 < statuses.count("done") < 18
    assert statuses.count("queued") == 18 - statuses.count("done")
    work_through(ledger, tasks)
    assert {row["status"] for row in ledger.rows()} == {"done"}


def test_an_interrupt_puts_running_runs_back_into_the_queue(coins):
    ledger, tasks = start(seconds=5, seeds=1)

    def interrupt(event: Event) -> None:
        if event.kind == "progress":
            raise KeyboardInterrupt

    backend = LocalProcesses(2, 1, ("trialist_coins",))
    with pytest.raises(KeyboardInterrupt):
        execute(ledger, tasks, backend, interrupt)
    backend.close()
    assert {row["status"] for row in ledger.rows()} == {"queued"}


def test_two_main_processes_share_the_work_and_no_run_is_done_twice(coins):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_execution import start, work_through\n"
        "print(sum(e.kind == 'started' for e in work_through(*start(seconds=0.1))))\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    started = [int(process.communicate(timeout=60)[0]) for process in both]
    assert sum(started) == 18
    ledger, _ = start(seconds=0.1)
    assert {row["status"] for row in ledger.rows()} == {"done"}
