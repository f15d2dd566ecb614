"""Opening the ledger's SQLite file: where it may lie, how to wait for a lock, and what to say when it cannot be used."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

QUIET_SECONDS = 2.0
"""Waiting for a lock is worth a message after this long"""
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smbfs", "smb3", "afs", "ceph", "lustre", "gpfs", "glusterfs", "beegfs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone",
}  # fmt: skip


class LedgerError(RuntimeError):
    """The ledger cannot be used; the message says why and what to do."""

    exit_code = 2


class LedgerUnavailable(LedgerError):
    """The ledger is right, but cannot be used now: locked by another program, or the disk is full."""

    exit_code = 1


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Database:
    """A SQLite file in WAL mode whose transactions take the write lock at their beginning.

    patience: seconds to wait for a lock that another program holds; changes take effect at the next transaction.
    say: hears that it waits.
    """

    def __init__(self, path: Path, patience: float, say: Callable[[str], None] = to_stderr) -> None:
        self.path, self.patience, self.say = path, patience, say
        self.engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0.5})
        sa.event.listen(self.engine, "connect", self._configure)
        sa.event.listen(self.engine, "begin", self._begin)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Raises LedgerError where the file cannot be used, LedgerUnavailable where it cannot be used now."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            kind, way_out = _way_out(str(error.orig))
            raise kind(f"the ledger {self.path} cannot be used: {error.orig}. {way_out}") from error

    def close(self) -> None:
        self.engine.dispose()

    def _configure(self, connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, as BEGIN IMMEDIATE
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
            self._patiently(functools.partial(connection.execute, f"PRAGMA {pragma}"))

    def _begin(self, connection: sa.Connection) -> None:
        self._patiently(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    def _patiently(self, attempt: Callable[[], Any]) -> None:
        """SQLite's own waiting is silent, and absent where two processes create one file: so it is done here."""
        start, said = time.monotonic(), False
        while True:
            try:
                attempt()
                return
            except (sqlite3.OperationalError, sa.exc.OperationalError) as error:
                code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0) & 0xFF
                waited = time.monotonic() - start
                if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or waited >= self.patience:
                    raise
                if waited >= QUIET_SECONDS and not said:
                    said = True
                    self.say(
                        f"waiting for the ledger {self.path}: another program holds it (at most {self.patience:g} s)"
                    )
                time.sleep(0.05)


def refuse_network_file_system(path: Path) -> None:
    """SQLite's locks do not hold over network file systems: two processes would corrupt the ledger."""
    if not Path("/proc/mounts").exists():
        return
    existing = path
    while not existing.exists():
        existing = existing.parent
    resolved = str(existing.resolve())
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text(errors="replace").splitlines():
        fields = line.split(" ")
        mount = fields[1].replace("\\040", " ")
        if (resolved == mount or resolved.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, fields[2]
    if kind in NETWORK_FILE_SYSTEMS:
        raise LedgerError(
            f"{path} lies on a network file system ({kind} at {best}), where SQLite's locks do not hold and a ledger can be "
            "corrupted: choose a local place with --ledger or TRIALIST_HOME"
        )


def _way_out(message: str) -> tuple[type[LedgerError], str]:
    if "locked" in message:
        return (
            LedgerUnavailable,
            "Another program holds it; end that program or wait, then give the same command again.",
        )
    if "full" in message or "disk I/O" in message:
        return (
            LedgerUnavailable,
            "Free disk space, then give the same command again, or choose another place with --ledger.",
        )
    if "readonly" in message or "unable to open" in message:
        return LedgerError, "Choose a writable place with --ledger or TRIALIST_HOME."
    if "not a database" in message or "malformed" in message:
        return LedgerError, "The file is damaged or no ledger; choose another --ledger."
    return LedgerError, "Choose another place with --ledger."
