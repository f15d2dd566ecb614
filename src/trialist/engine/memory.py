"""How much memory runs use and may use: the machine's or the container's, whichever is less."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

SHARE = 0.9
"""Of the memory that there is, what all runs together may use"""


@functools.lru_cache(maxsize=1)
def total_bytes() -> int:
    """Memory of this machine, or of the control group that this process is in (a container, a job of a scheduler)."""
    return min([psutil.virtual_memory().total, *_group_limits(Path("/"))])


def resident_bytes(pid: int, *, fairly: bool = False) -> int:
    """Memory of a process and its descendants that only their end gives back: pages of files do not count.

    fairly: pages shared between processes are divided among them; slower, and only where the kernel tells.
    """
    try:
        process = psutil.Process(pid)
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_of_one(member.pid, fairly) for member in members)


def too_large(resident: Mapping[str, int], pids: Mapping[str, int], limit: int) -> tuple[str, int] | None:
    """The largest run and its bytes, where runs together are above `limit`; None where they are not.

    resident: bytes a run, with shared pages counted for everyone who shares them, so that their sum is the most it can be.
    """
    if sum(resident.values()) <= limit:
        return None
    fair = {run: resident_bytes(pids[run], fairly=True) for run in resident}
    if sum(fair.values()) <= limit:
        return None
    largest = max(fair, key=lambda run: fair[run])
    return largest, fair[largest]


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def _of_one(pid: int, fairly: bool) -> int:
    names = ("Pss_Anon:", "Pss_Shmem:") if fairly else ("RssAnon:", "RssShmem:")
    try:
        found = list(_kilobytes(Path(f"/proc/{pid}/{'smaps_rollup' if fairly else 'status'}"), names))
        if fairly and not found:
            return _of_one(pid, fairly=False)
        return sum(found) * 1024 if found else psutil.Process(pid).memory_info().rss
    except (OSError, psutil.NoSuchProcess):  # it has just ended
        return 0


def _kilobytes(file: Path, names: tuple[str, ...]) -> Iterator[int]:
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith(names):
                yield int(line.split()[1])


def _group_limits(root: Path) -> Iterator[int]:
    """Memory limits of the control groups above this process, versions 1 and 2."""
    own = root / "proc/self/cgroup"
    if not own.is_file():
        return
    for line in own.read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folders = [mount / place.lstrip("/"), *(mount / parent for parent in Path(place.lstrip("/")).parents)]
        for folder in folders:  # in a container the group may be shown as the root
            file = folder / name
            text = file.read_text().strip() if file.is_file() else ""
            if text.isdigit():
                yield int(text)
