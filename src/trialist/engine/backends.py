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
from dataclasses import replace
from multiprocessing import connection as mp_connection
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Protocol, cast

from trialist.engine.worker import Task, perform, work

Message = tuple[str, tuple]
"""Run id and one of ("progress", done, total, numbers), ("outcome", json, measured, stages), ("failure", error, traceback)"""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Backend(Protocol):
    slots: int

    def start(self, task: Task) -> None: ...
    def poll(self, timeout: float) -> list[Message]: ...
    def stop(self, run: str) -> None: ...
    def close(self) -> None: ...


class LocalProcesses:
    """One process a run, forked from a server that has imported the trial's modules and done nothing with them.

    preload: module names that the server imports. gpus: how many GPUs to deal out, one a run; 0 for none.
    """

    _server_settings: tuple | None = None

    def __init__(self, slots: int, threads: int, preload: Sequence[str] = (), gpus: int = 0) -> None:
        self.slots = min(slots, gpus) if gpus else slots
        self.threads = threads
        self._gpus = [str(gpu) for gpu in range(gpus)]
        self._running: dict[str, tuple[Any, Any, str | None]] = {}
        forked = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            self._prepare_server(tuple(preload))

    def _prepare_server(self, preload: tuple[str, ...]) -> None:
        settings = (preload, self.threads)
        if LocalProcesses._server_settings not in (None, settings):
            forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its environment and imports are fixed at its start
        LocalProcesses._server_settings = settings
        self._context.set_forkserver_preload([*preload, "trialist.engine.worker"])
        with _environment({variable: str(self.threads) for variable in THREAD_VARIABLES}):
            forkserver.ensure_running()

    def start(self, task: Task) -> None:
        ours, theirs = self._context.Pipe(duplex=True)
        gpu = self._gpus.pop(0) if self._gpus else None
        environment = {**task.environment, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": _device_name(gpu)})}
        process = self._context.Process(
            target=work, args=(replace(task, environment=environment), theirs), daemon=True, name=f"trialist {task.run}"
        )
        with _hidden_main(), _environment({variable: str(task.threads) for variable in THREAD_VARIABLES}):
            process.start()
        theirs.close()
        self._running[task.run] = (process, ours, gpu)

    def poll(self, timeout: float) -> list[Message]:
        if not self._running:
            time.sleep(timeout)
            return []
        by_connection: dict[Any, str] = {ours: run for run, (_, ours, _) in self._running.items()}
        messages: list[Message] = []
        for ready in mp_connection.wait(list(by_connection), timeout):
            run = by_connection[ready]
            try:
                message: tuple = cast("Connection", ready).recv()
            except (EOFError, OSError):
                process = self._running[run][0]
                process.join(10)
                message = ("failure", _how_it_ended(process.exitcode), None)
            messages.append((run, message))
            if message[0] in ("outcome", "failure"):
                self._forget(run)
        return messages

    def stop(self, run: str) -> None:
        process = self._running[run][0]
        process.kill()
        self._forget(run)

    def process_id(self, run: str) -> int | None:
        return self._running[run][0].pid if run in self._running else None

    def _forget(self, run: str) -> None:
        process, ours, gpu = self._running.pop(run)
        process.join(10)
        if process.is_alive():  # a thread that a run left behind holds it up
            process.kill()
            process.join()
        ours.close()
        process.close()
        if gpu is not None:
            self._gpus.append(gpu)

    def close(self) -> None:
        for run in list(self._running):
            self.stop(run)


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
        self._ray.cancel(self._running.pop(run), force=True)

    def close(self) -> None:
        for run in list(self._running):
            self.stop(run)


def _perform_remotely(task: Task) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    return perform(task)


def _device_name(gpu: str) -> str:
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return visible[int(gpu)] if visible else gpu


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system does this when memory runs out)" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with code {code} before it handed back an outcome"


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
def _hidden_main() -> Iterator[None]:
    """Workers rebuild everything from names, so they need not import the caller's script (which may lack a main guard)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
