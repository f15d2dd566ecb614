"""What a night's work brings: kills, memory and disk that run out, runs that hang, a locked ledger, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from tests.engine.faults import MARK, Command, check_files, differences, nights, uninterrupted, what_is_stored
from trialist.cli.main import main
from trialist.engine import memory
from trialist.engine.api import split_settings
from trialist.engine.backends import LocalProcesses
from trialist.engine.execute import Event, execute
from trialist.engine.home import write_atomic
from trialist.engine.ledger import Ledger
from trialist.engine.plan import in_blocks, prepare

OPTIONS = ("--workers", "2", "--seconds", "0.1", "--building", "0.1")


@pytest.fixture(scope="module")
def calm(plugin_path, tmp_path_factory):
    """What the dice leave in the ledger without any fault."""
    return uninterrupted(Command(tmp_path_factory.mktemp("calm") / "home", OPTIONS, plugin_path))


@pytest.fixture
def command(plugin_path, tmp_path):
    def make(*options: str) -> Command:
        return Command(tmp_path / "night", options or OPTIONS, plugin_path)

    return make


@pytest.fixture
def marked(coins, monkeypatch):
    """Processes that come of a test within this process, found by a variable that they inherit."""
    command = Command(coins, (), coins)
    monkeypatch.setenv(MARK, command.mark)
    return command


def run_dice(
    *,
    workers: int = 2,
    memory_limit: int | None = None,
    limits: dict | None = None,
    listener: Callable[[Event], None] = lambda event: None,
    arms: tuple[str, ...] = ("fair", "loaded"),
    **settings,
) -> Ledger:
    options, fields = split_settings(settings)
    prepared = prepare("dice", fields, options)
    ledger = Ledger(prepared.ledger_path)
    ledger.register(prepared.configuration)
    planned = in_blocks(prepared, prepared.arms, prepared.seeds)
    answers = ledger.enqueue(planned, retry=options.retry)
    # modules that nobody else preloads: the server is a new one, with the mark in its environment
    backend = LocalProcesses(workers, 1, ("trialist_dice", f"absent_{os.urandom(4).hex()}"), memory_limit=memory_limit)
    try:
        tasks = [prepared.task(run, answers[run.id], 1) for run in planned if run.arm in arms]
        execute(ledger, tasks, backend, listener, **(limits or {}))
    finally:
        backend.close()
    return ledger


def by_arm(ledger: Ledger) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in ledger.rows():
        found.setdefault(row["arm"], set()).add(row["status"])
    return found


def errors(ledger: Ledger) -> set[str]:
    return {row["error"] for row in ledger.rows(status="failed")}


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def has_running_runs(command: Command) -> bool:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(command.home / "ledger.db")) as ledger:
        return bool(ledger.execute("SELECT count(*) FROM runs WHERE status = 'running'").fetchone()[0])
    return False


@pytest.mark.parametrize(("kills", "seed"), [(3, 11), pytest.param(50, 12, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_leaves_what_an_uninterrupted_trial_leaves(command, calm, kills, seed):
    hit = sum(nights(command(), calm, kills, seed, pause=0.5), Counter())
    assert hit.total() >= kills


def test_a_kill_between_the_end_of_a_run_and_the_removal_of_its_folder_leaves_nothing_for_good(marked, tmp_path):
    assert main(["run", "dice"]) == 0
    home = Path(os.environ["TRIALIST_HOME"])
    with contextlib.closing(Ledger(home / "ledger.db")) as ledger:
        ids = [row["id"] for row in ledger.rows()]
    for run in ids:
        (home / "runs" / run).mkdir()
        (home / "runs" / run / "state.json").write_text("{}")
    (home / "runs" / ids[0] / "model").mkdir()
    assert main(["run", "dice"]) == 0
    assert [folder.name for folder in (home / "runs").iterdir()] == ids[:1], "a kept model stays"


def test_two_commands_at_once_share_the_work_and_end_with_the_same_verdict(command, calm):
    one = command()
    both = [one.start(), one.start()]
    assert [process.wait(120) for process in both] == [0, 0], one.log()
    found = what_is_stored(one.home)
    assert found == calm, differences(calm, found)
    assert one.log().count("SUPPORTED") == 2
    assert not [row for row in found["rows"].values() if row["error"]]


@pytest.mark.parametrize(("signals", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGTERM)],
                         ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM"])  # fmt: skip
def test_an_interrupt_ends_the_runs_and_puts_them_back_into_the_queue(command, signals, number):
    one = command(*OPTIONS[:2], "--seconds", "0.4", *OPTIONS[4:])
    process = one.start()
    wait_for(lambda: has_running_runs(one))
    start = time.monotonic()
    for _ in range(signals):
        os.killpg(process.pid, number)
        time.sleep(0.02)
    assert process.wait(20) == 130, one.log()
    assert time.monotonic() - start < 10
    one.wait_until_none_is_alive()
    assert "interrupted; finished runs are in the ledger" in one.log()
    assert "Traceback" not in one.log()
    with contextlib.closing(Ledger(one.home / "ledger.db")) as ledger:
        statuses = {row["status"] for row in ledger.rows()}
    assert statuses <= ({"queued", "done"} if signals == 1 else {"queued", "done", "running"})


def test_a_run_that_allocates_without_end_is_ended_and_the_others_go_on(marked):
    with contextlib.closing(run_dice(fault="memory", seeds=1, memory_limit=400 << 20)) as ledger:
        assert by_arm(ledger) == {"fair": {"done"}, "loaded": {"failed"}}
        (error,) = errors(ledger)
        assert error.startswith("out of memory: used ")
        assert "of the 0.39 GiB that runs may use" in error
    marked.wait_until_none_is_alive(but_children_of=os.getpid())


def test_a_memory_error_inside_a_run_is_recorded_as_such(marked):
    with contextlib.closing(run_dice(fault="memory-error", seeds=1)) as ledger:
        assert by_arm(ledger) == {"fair": {"done"}, "loaded": {"failed"}}
        assert errors(ledger) == {"out of memory: MemoryError"}


def test_workers_are_what_the_kernel_ends_first(marked):
    if not os.path.exists("/proc/self/oom_score_adj"):
        pytest.skip("this system has no oom_score_adj")
    seen = [0]

    def look(event: Event) -> None:
        for process in psutil.Process().children(recursive=True) if event.kind == "progress" else ():
            with contextlib.suppress(OSError):
                seen.append(int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()))

    run_dice(seeds=1, listener=look).close()
    assert max(seen) == 800


def test_shared_pages_and_pages_of_files_are_not_held_against_a_run():
    ours = {"a": os.getpid()}
    used = memory.resident_bytes(os.getpid())
    assert memory.too_large({"a": used}, ours, used) is None
    found = memory.too_large({"a": used}, ours, 1 << 20)
    assert found is not None
    assert found[0] == "a"
    assert (
        1 << 20
        < found[1]
        <= psutil.Process().memory_info().rss
        + sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))
    )


def test_the_memory_of_a_container_counts_where_it_is_less(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job/7\n2:cpu:/\n0::/slice\n")
    for place, text in (
        ("memory/job/7/memory.limit_in_bytes", "9223372036854771712"),
        ("memory/job/memory.limit_in_bytes", "3000"),
        ("slice/memory.max", "max"),
        ("memory.max", "2000"),
    ):
        file = tmp_path / "sys/fs/cgroup" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert sorted(memory._group_limits(tmp_path)) == [2000, 3000, 9223372036854771712]


def test_a_run_that_takes_too_long_is_ended_with_all_that_it_started(marked):
    with contextlib.closing(
        run_dice(fault="child", seeds=1, arms=("loaded",), limits={"run_minutes": 1.5 / 60})
    ) as ledger:
        assert errors(ledger) == {"TimeoutError: not done after 0.025 minutes, the most that --run-timeout allows"}
    marked.wait_until_none_is_alive(2.0, but_children_of=os.getpid())


def test_what_a_killed_run_had_started_is_ended_as_well(marked):
    with contextlib.closing(run_dice(fault="child-alone", seeds=1, arms=("loaded",))) as ledger:
        assert "killed by SIGKILL" in errors(ledger).pop()
    marked.wait_until_none_is_alive(2.0, but_children_of=os.getpid())


def test_the_time_limit_of_a_run_is_an_option(marked, monkeypatch):
    with pytest.raises(ValueError, match="--run-timeout must be > 0, not -1"):
        split_settings({"run_timeout": -1.0})
    assert main(["run", "dice", "--fault", "silent", "--run-timeout", "0.02"]) == 1
    with contextlib.closing(Ledger(os.path.join(os.environ["TRIALIST_HOME"], "ledger.db"))) as ledger:
        assert "--run-timeout" in next(iter(errors(ledger)))


def test_a_value_that_is_no_number_fails_the_run_that_measured_it_and_no_other(marked):
    with contextlib.closing(run_dice(fault="nan", seeds=1)) as ledger:
        assert by_arm(ledger) == {"fair": {"done"}, "loaded": {"failed"}}
        assert "outcome.metrics.eyes is nan" in errors(ledger).pop()


def test_runs_that_never_let_go_of_the_interpreter_do_not_outlive_a_killed_main_process(command):
    one = command("--fault", "stuck", "--workers", "2")
    process = one.start()

    def stuck() -> bool:
        return any(p.cpu_times().user > 0.3 and p.ppid() != process.pid and p.pid != process.pid for p in one.alive())

    wait_for(lambda: has_running_runs(one) and stuck())
    process.kill()
    process.wait()
    one.wait_until_none_is_alive()


@pytest.mark.parametrize("fault", ["stage-full", pytest.param("folder-full", marks=pytest.mark.slow)])
def test_a_disk_without_space_fails_the_run_in_words_and_retry_goes_on(command, fault, monkeypatch):
    one = command("--fault", fault, "--seeds", "3")
    limited = [512 << 10]

    def start(*more):
        hearing = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limited[0], resource.RLIM_INFINITY))  # noqa: E731
        monkeypatch.setattr("tests.engine.faults.hearing", hearing if limited else lambda: None)
        return one.start()

    process = start()
    assert process.wait(60) == 1, one.log()
    assert "disk full: OSError: [Errno 27]" in one.log()
    assert "free space, then give the same command with --retry" in " ".join(one.log().split())
    leftovers = [path for path in one.home.rglob("*") if path.name.endswith((".tmp", ".building"))]
    assert not leftovers
    limited.clear()
    assert start().wait(60) == 0, one.log()
    check_files(one.home)


def test_a_ledger_without_space_stops_the_trial_in_words_and_it_goes_on_later(coins, capsys, monkeypatch):
    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def finish_without_space(self, *_, **__):
        with self._transaction() as connection:
            connection.execute(sa.text("SELECT 1"))
            raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "finish", finish_without_space)
        assert main(["run", "dice", "--seeds", "3"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "database or disk is full. Free disk space, then give the same command again" in error
    with monkeypatch.context() as patch:
        patch.setattr("trialist.engine.home.os.fsync", no_space)
        assert main(["run", "dice", "--seeds", "3"]) == 1
    assert "No space left on device; free space" in " ".join(capsys.readouterr().err.split())
    assert main(["run", "dice", "--seeds", "3"]) == 0
    assert "SUPPORTED" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    write_atomic(target, "before")

    for name, error in (("fsync", OSError(28, "No space left on device")), ("replace", KeyboardInterrupt())):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises((OSError, KeyboardInterrupt)):
                write_atomic(target, "after")
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
        assert target.read_text() == "before"


def test_what_a_killed_process_left_of_a_file_is_removed_by_the_next_that_writes_it(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".report.html.{gone.pid}.abc.tmp"
    others = tmp_path / f".report.html.{os.getpid()}.abc.tmp"
    for file in (left, others):
        file.write_text("half")
    write_atomic(tmp_path / "report.html", "whole")
    assert not left.exists()
    assert others.exists(), "another thread may be writing it"


@pytest.mark.slow
def test_a_full_file_system_stops_the_trial_in_words_and_it_goes_on_when_there_is_room(command, calm, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        one = command()
        one.home = mount / "home"
        one.home.mkdir()
        ballast = mount / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for _ in range(6):  # a little more room each time: another place is hit
            process = one.start()
            assert process.wait(60) == 1, one.log()
            one.wait_until_none_is_alive()
            with open(ballast, "r+b") as file:
                file.truncate(max(0, ballast.stat().st_size - (40 << 10)))
        ballast.unlink()
        assert one.start().wait(120) == 0, one.log()
        found = what_is_stored(one.home)
        assert found == calm, differences(calm, found)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        shutil.rmtree(mount, ignore_errors=True)
