from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time

import psutil
import pytest
import sqlalchemy as sa

from trialist.engine import ledger as module
from trialist.engine.contract import Cost, Items, Outcome
from trialist.engine.database import LedgerUnavailable
from trialist.engine.ledger import Ledger, LedgerError, refuse_network_file_system
from trialist.engine.records import Configuration, PlannedRun

CONFIGURATION = Configuration("key", "coins", "m:C", "tiny", {"throws": 3}, "trialist run coins")


def planned(seed: int, source: str = "s1") -> PlannedRun:
    return PlannedRun(f"{source}-{seed}", f"identity-{seed}", source, "key", "coins", "main", "fair", seed, {})


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger.db")
    opened.register(CONFIGURATION)
    yield opened
    opened.close()


def test_an_outcome_comes_back_as_it_was_stored(ledger):
    outcome = Outcome(
        metrics={"heads": 0.1 + 0.2},
        items={"heads": Items(("a", "b"), (1.0, 0.0), ("x", "x"))},
        curves={"heads": ((1.0, 0.5), (2.0, 0.6))},
        cost=Cost(steps=3),
        undefined={"tails": "no tail"},
        notes=("n",),
    )
    ledger.enqueue([planned(0)])
    assert ledger.claim("s1-0")
    ledger.finish("s1-0", outcome, {"wall_seconds": 1.5})
    record = ledger.records(["s1-0"])[0]
    assert record.outcome == outcome
    assert (record.status, record.cost("steps"), record.cost("wall_seconds")) == ("done", 3, 1.5)


def test_a_run_is_claimed_once(ledger):
    ledger.enqueue([planned(0)])
    other = Ledger(ledger.path)
    assert ledger.claim("s1-0")
    assert not other.claim("s1-0")


def test_a_run_whose_owner_died_is_taken_over_at_once(ledger):
    ledger.enqueue([planned(0)])
    ledger.owner = ledger.owner.replace(f":{os.getpid()}:", ":999999999:")
    assert ledger.claim("s1-0")
    assert Ledger(ledger.path).claim("s1-0")


def held_elsewhere(ledger) -> Ledger:
    """A ledger of a process of another machine that has claimed the run `s1-0`."""
    ledger.enqueue([planned(0)])
    other = Ledger(ledger.path)
    other.owner = "elsewhere/0000:1:77:abc"
    assert other.claim("s1-0")
    return other


def stopwatch_by(monkeypatch, seconds: float) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)


def test_a_run_held_on_another_machine_is_taken_over_when_its_lease_is_not_renewed(ledger, monkeypatch):
    held_elsewhere(ledger)
    assert not ledger.claim("s1-0")
    stopwatch_by(monkeypatch, module.LEASE_SECONDS - 1)
    assert not ledger.claim("s1-0")
    stopwatch_by(monkeypatch, 2)
    assert ledger.claim("s1-0")


def test_a_renewed_lease_is_respected_however_long_it_lasts(ledger, monkeypatch):
    other = held_elsewhere(ledger)
    for _ in range(5):
        assert not ledger.claim("s1-0")
        stopwatch_by(monkeypatch, module.LEASE_SECONDS - 1)
        other.renew()


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_jumps_takes_no_run_from_its_owner(ledger, monkeypatch, hours):
    other = held_elsewhere(ledger)
    ledger.enqueue([planned(1)])
    assert ledger.claim("s1-1")
    now, boot = time.time(), psutil.boot_time()
    monkeypatch.setattr(time, "time", lambda: now + hours * 3600)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + hours * 3600)  # the kernel derives it from the clock
    assert not Ledger(ledger.path).claim("s1-0")
    assert not Ledger(ledger.path).claim("s1-1")
    other.renew()
    assert other.finish("s1-0", Outcome(), {})
    assert ledger.finish("s1-1", Outcome(), {})


def test_who_lost_a_run_to_another_process_stores_nothing(ledger):
    other = held_elsewhere(ledger)
    other.release(["s1-0"])
    assert ledger.claim("s1-0")
    assert not other.finish("s1-0", Outcome(metrics={"heads": 0.0}), {})
    assert not other.fail("s1-0", "too late", None, {})
    assert ledger.finish("s1-0", Outcome(metrics={"heads": 1.0}), {})
    assert ledger.records(["s1-0"])[0].outcome.metrics == {"heads": 1.0}
    assert ledger.rows()[0]["error"] is None


def test_claims_of_a_ledger_that_was_closed_are_free_in_the_same_process(ledger):
    ledger.enqueue([planned(0)])
    first, second = Ledger(ledger.path), Ledger(ledger.path)
    assert first.claim("s1-0")
    assert not second.claim("s1-0")
    first.close()
    assert second.claim("s1-0")


def test_a_held_ledger_is_waited_for_with_a_message_and_then_refused_in_words(ledger, monkeypatch):
    monkeypatch.setattr("trialist.engine.database.QUIET_SECONDS", 0.1)
    said: list[str] = []
    other = Ledger(ledger.path, say=said.append, patience=0.7)
    with sqlite3.connect(ledger.path, isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerUnavailable, match=r"database is locked\. Another program holds it"):
            other.enqueue([planned(0)])
        holder.execute("ROLLBACK")
    assert len(said) == 1
    assert "waiting for the ledger" in said[0]
    assert other.enqueue([planned(0)])


def test_a_ledger_that_comes_free_is_used(ledger):
    holder = sqlite3.connect(ledger.path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, lambda: holder.execute("ROLLBACK")).start()
    assert Ledger(ledger.path, patience=5).enqueue([planned(0)])


def test_changed_source_makes_a_new_row_and_keeps_the_old_as_stale(ledger):
    ledger.enqueue([planned(0)])
    ledger.claim("s1-0")
    ledger.finish("s1-0", Outcome(metrics={"heads": 1.0}), {})
    assert ledger.enqueue([planned(0, "s2")]) == {"s2-0": "s2-0"}
    assert {row["id"]: row["status"] for row in ledger.rows()} == {"s1-0": "stale", "s2-0": "queued"}
    assert ledger.records(["s1-0"])[0].outcome.metrics == {"heads": 1.0}


def test_accept_stale_takes_the_old_row_instead(ledger):
    ledger.enqueue([planned(0)])
    ledger.claim("s1-0")
    ledger.finish("s1-0", Outcome(), {})
    assert ledger.enqueue([planned(0, "s2")], accept_stale=True) == {"s2-0": "s1-0"}
    assert len(ledger.rows()) == 1


def test_a_ledger_of_a_newer_version_is_refused(ledger):
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("UPDATE meta SET value = '99'")
    with pytest.raises(LedgerError, match=r"newer trialist \(schema 99, this one reads 1\)"):
        Ledger(ledger.path)


def test_a_file_that_is_no_ledger_is_refused_in_words(tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database at all, but long enough to be looked at" * 40)
    with pytest.raises(LedgerError, match="damaged or no ledger"):
        Ledger(tmp_path / "x.db")


def test_a_missing_ledger_is_not_created_by_readers(tmp_path):
    with pytest.raises(LedgerError, match="run a trial first"):
        Ledger(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()


def test_a_full_disk_is_said_in_words(ledger, monkeypatch):
    def full(*_):
        raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(ledger._database.engine, "begin", full)
    with pytest.raises(LedgerUnavailable, match="Free disk space"):
        ledger.enqueue([planned(0)])


def test_a_read_only_folder_is_said_in_words(tmp_path, monkeypatch):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # root may write anywhere
    with pytest.raises(LedgerError, match="writable place"):
        Ledger(folder / "deeper" / "ledger.db")


def test_a_network_file_system_is_refused_with_its_name(tmp_path, monkeypatch):
    read = module.Path.read_text
    table = f"server:/x {tmp_path} nfs4 rw 0 0\n/dev/a / ext4 rw 0 0\n"
    monkeypatch.setattr(
        module.Path, "read_text", lambda self, **k: table if str(self) == "/proc/mounts" else read(self, **k)
    )
    with pytest.raises(LedgerError, match="nfs4"):
        refuse_network_file_system(tmp_path / "ledger.db")


def test_ids_may_be_shortened_while_they_are_unique(ledger):
    ledger.enqueue([planned(0), planned(10), planned(11)])
    assert ledger.row("s1-0")["seed"] == 0
    with pytest.raises(ValueError, match="several runs"):
        ledger.row("s1-1")
    with pytest.raises(ValueError, match="give at least 4 characters"):
        ledger.row("s1-")
    with pytest.raises(ValueError, match="no run 'zz'"):
        ledger.row("zz")


def test_ten_thousand_rows_list_in_under_a_second(ledger):
    ledger.enqueue([planned(seed) for seed in range(10_000)])
    start = time.perf_counter()
    assert len(ledger.rows()) == 10_000
    assert time.perf_counter() - start < 1.0
