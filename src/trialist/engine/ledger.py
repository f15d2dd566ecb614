"""The database of runs, outcomes and verdicts: one SQLite file in WAL mode, written by main processes only.

Two main processes on one ledger share the work: a run is claimed in one transaction, and a claim whose owner died (same
machine) or whose lease was not renewed for a while (another machine) may be taken over. No decision rests on the clock of
the day, which may jump: on one machine the owner's life decides, elsewhere the watcher's own stopwatch.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from trialist.engine import processes
from trialist.engine.contract import Outcome
from trialist.engine.database import Database, LedgerError, refuse_network_file_system, to_stderr
from trialist.engine.records import Configuration, PlannedRun, RunRecord, outcome_from_json, outcome_to_json

SCHEMA = 1
PREFIX = 4
"""Characters of a run's id that a user must give at least"""
LEASE_SECONDS = 60.0
"""A claim of another machine that is not renewed for this long is taken over"""
OPENING_SECONDS = 60.0
"""How long to wait for a ledger that another program holds, when it is opened"""
WORKING_SECONDS = 600.0
"""The same once runs may be going: a night's work is worth more patience"""

_metadata = sa.MetaData()
_meta = sa.Table("meta", _metadata, sa.Column("key", sa.String, primary_key=True), sa.Column("value", sa.String))
_configurations = sa.Table(
    "configurations",
    _metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("trial", sa.String, nullable=False, index=True),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("preset", sa.String, nullable=False),
    sa.Column("inputs", sa.JSON, nullable=False),
    sa.Column("command", sa.String, nullable=False),
    sa.Column("touched", sa.Float, nullable=False),
)
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("identity", sa.String, nullable=False, index=True),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("configuration", sa.String, sa.ForeignKey("configurations.key"), nullable=False, index=True),
    sa.Column("trial", sa.String, nullable=False),
    sa.Column("setting", sa.String, nullable=False),
    sa.Column("arm", sa.String, nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("attempt", sa.Integer, nullable=False, default=1),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("owner", sa.String),
    sa.Column("lease_until", sa.Float),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float),
    sa.Column("measured", sa.JSON),
    sa.Column("stages", sa.JSON),
    sa.Column("error", sa.Text),
    sa.Column("traceback", sa.Text),
)
_outcomes = sa.Table(
    "outcomes",
    _metadata,
    sa.Column("run", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_summaries = sa.Table(
    "summaries",
    _metadata,
    sa.Column("configuration", sa.String, sa.ForeignKey("configurations.key"), primary_key=True),
    sa.Column("word", sa.String, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)


_open: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """Opens (and creates) a ledger file. Raises LedgerError where it cannot be used.

    say: hears that the ledger waits for another program. patience: how long, in seconds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        create: bool = True,
        say: Callable[[str], None] = to_stderr,
        patience: float | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        if not create and not self.path.exists():
            raise LedgerError(f"no ledger at {self.path}: run a trial first, or point --ledger to one")
        if self.path.is_dir():
            raise LedgerError(f"--ledger {path} is a folder; name a file, such as {self.path / 'ledger.db'}")
        if self.path.exists() and not self.path.is_file():
            raise LedgerError(f"--ledger {path} is no regular file; choose another place")
        refuse_network_file_system(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(
                f"cannot create {self.path.parent}: {error.strerror}; choose a writable place with --ledger or TRIALIST_HOME"
            ) from error
        pid = os.getpid()
        self.owner = f"{processes.machine()}:{pid}:{processes.started(pid)}:{uuid.uuid4().hex[:8]}"
        self._elsewhere: dict[str, tuple[str, float | None, float]] = {}
        self._database = Database(self.path, OPENING_SECONDS if patience is None else patience, say)
        self._transaction = self._database.transaction
        self._prepare()
        self._database.patience = WORKING_SECONDS if patience is None else patience
        _open.add(self)

    def _prepare(self) -> None:
        with self._transaction() as connection:
            _metadata.create_all(connection)
            found = connection.execute(sa.select(_meta.c.value).where(_meta.c.key == "schema")).scalar()
            if found is None:
                connection.execute(_meta.insert().values(key="schema", value=str(SCHEMA)))
            elif int(found) > SCHEMA:
                raise LedgerError(
                    f"the ledger {self.path} was written by a newer trialist (schema {found}, this one reads {SCHEMA}): "
                    "update trialist, or choose another --ledger"
                )

    def say_to(self, say: Callable[[str], None]) -> None:
        """Who hears from now on that the ledger waits for another program."""
        self._database.say = say

    def close(self) -> None:
        """Claims of this object that were not released are free for others from now on."""
        _open.discard(self)
        self._database.close()

    # -- configurations and summaries

    def register(self, configuration: Configuration) -> None:
        values = {**configuration.__dict__, "inputs": dict(configuration.inputs), "touched": time.time()}
        with self._transaction() as connection:
            present = connection.execute(
                _configurations.update().where(_configurations.c.key == configuration.key).values(**values)
            ).rowcount
            if not present:
                connection.execute(_configurations.insert().values(**values))

    def configurations(self, trial: str | None = None) -> list[Configuration]:
        """Last used first."""
        query = sa.select(_configurations).order_by(_configurations.c.touched.desc())
        if trial is not None:
            query = query.where(_configurations.c.trial == trial)
        with self._transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return [Configuration(**{key: row[key] for key in Configuration.__dataclass_fields__}) for row in rows]

    def store_summary(self, configuration: str, summary: Mapping[str, Any]) -> None:
        values = {"word": summary["verdict"], "created": time.time(), "body": _squeeze(summary)}
        with self._transaction() as connection:
            query = _summaries.update().where(_summaries.c.configuration == configuration).values(**values)
            if not connection.execute(query).rowcount:
                connection.execute(_summaries.insert().values(configuration=configuration, **values))

    def summary(self, configuration: str) -> dict[str, Any] | None:
        with self._transaction() as connection:
            body = connection.execute(
                sa.select(_summaries.c.body).where(_summaries.c.configuration == configuration)
            ).scalar()
        return None if body is None else json.loads(zlib.decompress(body))

    # -- runs

    def enqueue(self, runs: Sequence[PlannedRun], *, accept_stale: bool = False, retry: bool = False) -> dict[str, str]:
        """Stores the runs that are not there yet; returns planned id -> id of the row that answers for it.

        A finished row of the same identity that ran with another source becomes stale, unless `accept_stale` takes it.
        With `retry`, failed rows are queued again as a further attempt.
        """
        answers: dict[str, str] = {}
        with self._transaction() as connection:
            present: dict[str, list[Any]] = {}
            for chunk in _chunks([run.identity for run in runs]):
                query = sa.select(_runs.c.id, _runs.c.identity, _runs.c.source, _runs.c.status, _runs.c.ended)
                for row in connection.execute(query.where(_runs.c.identity.in_(chunk))):
                    present.setdefault(row.identity, []).append(row)
            stale: list[str] = []
            fresh: list[PlannedRun] = []
            again: list[str] = []
            for run in runs:
                rows = present.get(run.identity, [])
                same = [row for row in rows if row.source == run.source]
                other = [
                    row for row in rows if row.source != run.source and row.status in ("done", "diverged", "stale")
                ]
                if same:
                    answers[run.id] = same[0].id
                    if same[0].status == "failed" and retry:
                        again.append(same[0].id)
                elif accept_stale and other:
                    answers[run.id] = max(other, key=lambda row: row.ended or 0.0).id
                else:
                    answers[run.id] = run.id
                    fresh.append(run)
                if answers[run.id] == run.id or same:
                    stale.extend(row.id for row in other if row.status != "stale")
            for chunk in _chunks(stale):
                connection.execute(_runs.update().where(_runs.c.id.in_(chunk)).values(status="stale"))
            for chunk in _chunks(again):
                connection.execute(
                    _runs.update()
                    .where(_runs.c.id.in_(chunk))
                    .values(status="queued", attempt=_runs.c.attempt + 1, error=None, traceback=None, owner=None)
                )
            now = time.time()
            if fresh:
                connection.execute(
                    _runs.insert(),
                    [
                        {**run.__dict__, "options": dict(run.options), "status": "queued", "attempt": 1, "created": now}
                        for run in fresh
                    ],
                )
        return answers

    def claim(self, run: str) -> bool:
        """Takes a run that is queued, or whose owner is gone. One transaction: two processes never both succeed."""
        with self._transaction() as connection:
            row = connection.execute(
                sa.select(_runs.c.status, _runs.c.owner, _runs.c.lease_until).where(_runs.c.id == run)
            ).one()
            if row.status != "queued" and not (
                row.status == "running" and self._abandoned(run, row.owner, row.lease_until)
            ):
                return False
            connection.execute(
                _runs.update()
                .where(_runs.c.id == run)
                .values(status="running", owner=self.owner, lease_until=_renewed(), started=time.time())
            )
        return True

    def _abandoned(self, run: str, owner: str | None, lease: float | None) -> bool:
        """Whether the process that claimed a run is gone. On this machine its life decides, elsewhere its renewals."""
        if owner is None:
            return True
        machine, pid, started, _ = owner.rsplit(":", 3)
        if machine == processes.machine():
            if int(pid) == os.getpid():
                return not any(ledger.owner == owner for ledger in _open)
            return processes.started(int(pid)) != started
        now = time.monotonic()
        seen = self._elsewhere.get(run)
        if seen is None or seen[:2] != (owner, lease):
            self._elsewhere[run] = (owner, lease, now)
            return False
        return now - seen[2] > LEASE_SECONDS

    def renew(self) -> None:
        """Shows other machines that this process lives."""
        with self._transaction() as connection:
            connection.execute(
                _runs.update()
                .where(_runs.c.owner == self.owner, _runs.c.status == "running")
                .values(lease_until=_renewed())
            )

    def release(self, runs: Iterable[str]) -> None:
        """Puts claimed runs back into the queue (a stop between runs, Ctrl-C)."""
        with self._transaction() as connection:
            connection.execute(
                _runs.update()
                .where(_runs.c.id.in_(list(runs)), _runs.c.owner == self.owner, _runs.c.status == "running")
                .values(status="queued", owner=None, lease_until=None)
            )

    def finish(self, run: str, outcome: Outcome, measured: Mapping[str, float], stages: Sequence[str] = ()) -> bool:
        """Stores outcome and state in one transaction; False, and nothing stored, where another process took the run over."""
        status = "done" if outcome.diverged is None else "diverged"
        body = _squeeze(outcome_to_json(outcome))
        with self._transaction() as connection:
            ours = self._end(
                connection, run, status=status, measured=dict(measured), stages=list(stages), error=None, traceback=None
            )
            if ours:
                connection.execute(_outcomes.delete().where(_outcomes.c.run == run))
                connection.execute(_outcomes.insert().values(run=run, body=body))
        return ours

    def fail(self, run: str, error: str, traceback: str | None, measured: Mapping[str, float]) -> bool:
        """Records an infrastructure failure (crash, time-out, out of memory); `--retry` runs it again. Else as `finish`."""
        with self._transaction() as connection:
            return self._end(
                connection, run, status="failed", measured=dict(measured), error=error, traceback=traceback
            )

    def _end(self, connection: sa.Connection, run: str, **values: Any) -> bool:
        ours = _runs.update().where(_runs.c.id == run, _runs.c.owner == self.owner, _runs.c.status == "running")
        ended = connection.execute(ours.values(ended=time.time(), owner=None, lease_until=None, **values))
        return bool(ended.rowcount)

    def statuses(self, runs: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with self._transaction() as connection:
            for chunk in _chunks(runs):
                query = sa.select(_runs.c.id, _runs.c.status).where(_runs.c.id.in_(chunk))
                found.update({row.id: row.status for row in connection.execute(query)})
        return found

    def rows(self, *, trial: str | None = None, status: str | None = None) -> list[dict[str, Any]]:
        """Light rows for listings, newest first: everything but the outcomes."""
        columns = [column for column in _runs.c if column.name not in ("lease_until", "owner")]
        query = (
            sa.select(*columns, _configurations.c.preset)
            .join(_configurations)
            .order_by(_runs.c.created.desc(), _runs.c.id)
        )
        if trial is not None:
            query = query.where(_runs.c.trial == trial)
        if status is not None:
            query = query.where(_runs.c.status == status)
        with self._transaction() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def row(self, run: str) -> dict[str, Any]:
        """One row by its id or at least 4 characters of its beginning. Raises ValueError where none or several match."""
        query = sa.select(*_runs.c).where(_runs.c.id.startswith(run, autoescape=True)).limit(3)
        with self._transaction() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        if not rows:
            raise ValueError(f"no run {run!r} in {self.path}; `trialist runs` lists them")
        if len(run) < PREFIX and run != rows[0]["id"]:
            raise ValueError(f"run {run!r}: give at least {PREFIX} characters of the id; `trialist runs` lists them")
        if len(rows) > 1:
            raise ValueError(
                f"several runs begin with {run!r}: {', '.join(row['id'] for row in rows)}; give more of the id"
            )
        return rows[0]

    def records(self, runs: Sequence[str] | None = None, *, configuration: str | None = None) -> list[RunRecord]:
        """Runs with their outcomes, by ids (in that order) or by configuration."""
        query = sa.select(_runs, _outcomes.c.body).join(_outcomes, isouter=True)
        found: dict[str, RunRecord] = {}
        with self._transaction() as connection:
            if runs is None:
                rows = connection.execute(query.where(_runs.c.configuration == configuration)).mappings().all()
            else:
                rows = [
                    row
                    for chunk in _chunks(runs)
                    for row in connection.execute(query.where(_runs.c.id.in_(chunk))).mappings()
                ]
        for row in rows:
            body = row["body"]
            found[row["id"]] = RunRecord(
                id=row["id"],
                trial=row["trial"],
                arm=row["arm"],
                setting=row["setting"],
                seed=row["seed"],
                status=row["status"],
                outcome=None if body is None else outcome_from_json(json.loads(zlib.decompress(body))),
                measured=row["measured"] or {},
                options=row["options"],
                purpose=row["purpose"],
                attempt=row["attempt"],
                error=row["error"],
                traceback=row["traceback"],
                stages=tuple(row["stages"] or ()),
            )
        return list(found.values()) if runs is None else [found[run] for run in runs]


def _renewed() -> sa.ColumnElement[float]:
    """Counts renewals: a lease that changes, by whatever amount, has a living owner."""
    return sa.func.coalesce(_runs.c.lease_until, 0.0) + 1.0


def _squeeze(document: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(document, allow_nan=False).encode(), 1)


def _chunks(values: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
