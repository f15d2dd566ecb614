"""Where runs are executed: processes of this machine, or a Ray cluster. Both hand back the same messages."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection as mp_connection
from multiprocessing import forkserver, resource_tracker
from typing import Any, Protocol

from trialist.engine import memory
from trialist.engine.keeper import Keeper
from trialist.engine.processes import end_tree
from trialist.engine.worker import Task, perform, work

Message = tuple[str, tuple]
"""Run id and one of ("progress", done, total, numbers), ("alive",), ("outcome", json, measured, stages),
("failure", error, traceback)"""

SECONDS_BETWEEN_LOOKS = 1.0
"""Between two looks at the memory of runs; a look takes some milliseconds"""
START_SECONDS = 10.0
LOST = 255
"""Exit code that multiprocessing gives a process whose server is gone"""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Backend(Protocol):
    slots: int

    def start(self, task: Task) -> None: ...
    def poll(self, timeout: float) -> list[Message]: ...
    def stop(self, run: str) -> None: ...
    def resident_bytes(self, run: str) -> int: ...
    def close(self) -> None: ...


@dataclass
class _Process:
    """The process of one run. Its id outlives the handle, which knows nothing more once its server is gone."""

    handle: Any
    connection: Any
    gpu: str | None
    pid: int
    resident: int = 0
    """Memory when it was last looked at, in bytes"""


class LocalProcesses:
    """One process a run, forked from a server that has imported the trial's modules and done nothing with them.

    preload: module names that the server imports. gpus: how many GPUs to deal out, one a run; 0 for none.
    memory_limit: bytes that runs may use together; above it the largest is ended. None is a share of what there is.
    """

    _server_settings: tuple | None = None

    def __init__(
        self, slots: int, threads: int, preload: Sequence[str] = (), gpus: int = 0, memory_limit: int | None = None
    ) -> None:
        self.slots = min(slots, gpus) if gpus else slots
        self.threads = threads
        self.memory_limit = int(memory.SHARE * memory.total_bytes()) if memory_limit is None else memory_limit
        self._looked = time.monotonic()
        self._gpus = [str(gpu) for gpu in range(gpus)]
        self._running: dict[str, _Process] = {}
        self._forked = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if self._forked else "spawn")
        self._keeper = Keeper(self._context, self._start_process)
        if self._forked:
            self._prepare_server(tuple(preload))

    def _prepare_server(self, preload: tuple[str, ...]) -> None:
        settings = (preload, self.threads)
        if LocalProcesses._server_settings not in (None, settings):
            forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its environment and imports are fixed at its start
        LocalProcesses._server_settings = settings
        self._context.set_forkserver_preload([*preload, "trialist.engine.worker"])
        self._start_server()

    def _start_server(self) -> None:
        variables = {variable: str(self.threads) for variable in THREAD_VARIABLES}
        resource_tracker.ensure_running()  # it unblocks what the next line blocks
        with _environment(variables), _deaf_to_interrupts():
            forkserver.ensure_running()

    def start(self, task: Task) -> None:
        ours, theirs = self._context.Pipe(duplex=True)
        gpu = self._gpus.pop(0) if self._gpus else None
        environment = {**task.environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": _device_name(gpu)})}
        process = self._context.Process(
            target=work, args=(replace(task, environment=environment), theirs), daemon=True, name=f"trialist {task.run}"
        )
        with _environment({variable: str(task.threads) for variable in THREAD_VARIABLES}):
            self._start_process(process)
        theirs.close()
        self._running[task.run] = _Process(process, ours, gpu, process.pid)
        self._keeper.add(process.pid)

    def _start_process(self, process: Any) -> None:
        """Starts a process, again where its server is killed meanwhile. Raises OSError where that does not help."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._forked:
                self._start_server()  # nothing where it is there
            try:
                with _hidden_main():
                    process.start()
                return
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise OSError(
                        f"no process could be started for a run ({error}); free memory or processes, then try again"
                    ) from error
                time.sleep(0.1)  # a server that was killed takes a moment to be gone, longer on a busy machine

    def poll(self, timeout: float) -> list[Message]:
        if not self._running:
            time.sleep(timeout)
            return []
        # a child that the run left behind may hold its end of the pipe, so its own end is waited for as well
        waited_for = {handle: run for run, process in self._running.items()
                      for handle in (process.connection, process.handle.sentinel)}  # fmt: skip
        ready = dict.fromkeys(waited_for[handle] for handle in mp_connection.wait(list(waited_for), timeout))
        messages = [(run, self._receive(run)) for run in ready]
        for run, message in messages:
            if message[0] in ("outcome", "failure"):
                self._forget(run)
        return messages + self._watch_memory()

    def _receive(self, run: str) -> tuple:
        process = self._running[run]
        try:
            if process.connection.poll():
                return process.connection.recv()
        except (EOFError, OSError):
            pass  # it ended, which the exit code tells more of
        process.handle.join(10)
        return ("failure", self._how_it_ended(process), None)

    def _how_it_ended(self, process: _Process) -> str:
        code = process.handle.exitcode
        if code is not None and code < 0:
            used = f"; it was last seen using {memory.gib(process.resident)}" if process.resident else ""
            hint = f" (the system does this when memory runs out{used})" if -code == signal.SIGKILL else ""
            return f"the process was killed by {signal.Signals(-code).name}{hint}"
        if code == LOST:
            return "the server that starts the processes of runs was killed, and this run with it"
        return f"the process ended with code {code} before it handed back an outcome"

    def _watch_memory(self) -> list[Message]:
        """Once a second: ends the largest run where runs together use more than they may."""
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS or not self._running:
            return []
        self._looked = now
        for process in self._running.values():
            process.resident = memory.resident_bytes(process.pid)
        resident = {run: process.resident for run, process in self._running.items()}
        pids = {run: process.pid for run, process in self._running.items()}
        found = memory.too_large(resident, pids, self.memory_limit)
        if found is None:
            return []
        run, used = found
        together = f" together ({len(resident)} run now)" if len(resident) > 1 else ""
        advice = "take a smaller model or batch" + (", or fewer --workers" if len(resident) > 1 else "")
        self.stop(run)
        words = (
            f"out of memory: used {memory.gib(used)} of the {memory.gib(self.memory_limit)} that runs may use{together}; "
            f"{advice}"
        )
        return [(run, ("failure", words, None))]

    def stop(self, run: str) -> None:
        """Ends a run and all that it started; nothing happens where it has ended already."""
        if run in self._running:
            end_tree(self._running[run].pid)
            self._running[run].handle.kill()  # it may lead no group yet
            self._forget(run)

    def resident_bytes(self, run: str) -> int:
        """Memory that a run uses now; 0 where it has ended."""
        return memory.resident_bytes(self._running[run].pid) if run in self._running else 0

    def _forget(self, run: str) -> None:
        process = self._running.pop(run)
        process.handle.join(10)  # longer only where a thread that a run left behind holds it up
        end_tree(process.pid)
        process.handle.join()
        self._keeper.remove(process.pid)
        process.connection.close()
        process.handle.close()
        if process.gpu is not None:
            self._gpus.append(process.gpu)

    def close(self) -> None:
        for run in list(self._running):
            self.stop(run)
        self._keeper.close()


class RayTasks:
    """Runs as Ray tasks on a cluster (`ray://head:10001`, or `local`); only this process writes the ledger.

    Stages are built once on every node. Needs `pip install trialist[ray]`.
    """

    def __init__(self, address: str, slots: int | None, threads: int, gpus: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--on needs Ray: pip install 'trialist[ray]'") from error
        self._ray = ray
        if not ray.is_initialized():
            if address == "local":  # a cluster of this machine, on the loopback interface
                ray.init(_node_ip_address="127.0.0.1", log_to_driver=False, include_dashboard=False)
            else:
                ray.init(address=address, log_to_driver=False)
        total = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
        self.slots = min(slots, total) if slots else total
        self._remote = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=0)(_perform_remotely)
        self._running: dict[str, Any] = {}

    def start(self, task: Task) -> None:
        self._running[task.run] = self._remote.remote(task)

    def poll(self, timeout: float) -> list[Message]:
        if not self._running:
            time.sleep(timeout)
            return []
        by_reference = {reference: run for run, reference in self._running.items()}
        ready, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=timeout)
        messages: list[Message] = []
        for reference in ready:
            run = by_reference[reference]
            del self._running[run]
            try:
                messages.append((run, ("outcome", *self._ray.get(reference))))
            except self._ray.exceptions.RayTaskError as error:
                messages.append((run, ("failure", f"{type(error.cause).__name__}: {error.cause}", str(error))))
            except self._ray.exceptions.RayError as error:
                messages.append((run, ("failure", f"{type(error).__name__}: {error}", None)))
        return messages

    def stop(self, run: str) -> None:
        if run in self._running:
            self._ray.cancel(self._running.pop(run), force=True)

    def resident_bytes(self, run: str) -> int:
        return 0  # it runs elsewhere, and Ray watches its nodes' memory itself

    def close(self) -> None:
        for run in list(self._running):
            self.stop(run)


def _perform_remotely(task: Task) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    return perform(task)


def _device_name(gpu: str) -> str:
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[int(gpu)] if visible else gpu


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started inside has SIGINT blocked, also while it still imports; one that arrives reaches us afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Workers rebuild everything from names, so they need not import the caller's script (which may lack a main guard)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
