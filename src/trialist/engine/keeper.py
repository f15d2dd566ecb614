"""A process that outlives the main process just long enough to end the runs that it left behind.

A run watches its main process itself, with a thread; but a run that holds the interpreter's lock (a regular expression
without end, a library that never lets go) gives no thread a turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from trialist.engine.processes import end_tree


class Keeper:
    """Knows the processes of runs, and ends them when the process that made it is gone.

    context: of multiprocessing. start: starts a process of that context.
    """

    def __init__(self, context: Any, start: Callable[[Any], None]) -> None:
        self._context, self._start = context, start
        self._pids: set[int] = set()
        self._process: Any = None
        self._connection: Any = None

    def add(self, pid: int) -> None:
        self._pids.add(pid)
        self._tell()

    def remove(self, pid: int) -> None:
        self._pids.discard(pid)
        self._tell()

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join(10)
            self._process.kill()
            self._process.join()
            self._process = None

    def _tell(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._connection.send(sorted(self._pids))
                return
            self.close()  # it was killed
        if self._pids:
            self._connection, theirs = self._context.Pipe(duplex=True)
            self._process = self._context.Process(target=keep, args=(theirs,), daemon=True, name="trialist keeper")
            self._start(self._process)
            theirs.close()
            self._connection.send(sorted(self._pids))


def keep(connection: Connection) -> None:
    """The keeper's main function."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    alive = forkserver._forkserver._forkserver_alive_fd  # type: ignore[attr-defined]
    if alive is not None:
        os.close(alive)  # the server lives as long as one process holds it
    pids: list[int] = []
    while True:
        try:
            pids = connection.recv()
        except (EOFError, OSError):
            break
    for pid in pids:
        end_tree(pid)
