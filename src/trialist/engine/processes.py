"""Processes of runs and of their owners: who is who, whether it lives, and ending one with all that it started."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import socket
from pathlib import Path

import psutil

MORE_LIKELY = "800"
"""Added to a worker's badness, in thousandths of the memory: when memory runs out the kernel ends runs, not their owner"""


@functools.lru_cache(maxsize=1)
def machine() -> str:
    """Where process ids mean the same: host name, this boot of it, and the container's own count of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [boot.read_text().strip() if boot.is_file() else ""]
    with contextlib.suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return f"{socket.gethostname()}/{hashlib.blake2b(' '.join(parts).encode(), digest_size=4).hexdigest()}"


def started(pid: int) -> str | None:
    """When a process started, as a text that no change of the clock alters; None where there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").is_file():
            fields = stat.read_bytes().rpartition(b")")[2].split()
            return None if fields[0] in (b"Z", b"X") else fields[19].decode()  # ticks from the boot on
        return f"{psutil.Process(pid).create_time():.2f}"
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return None


def end_tree(pid: int) -> None:
    """Kills a process, all that it started and all of its process group (also what outlived it)."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
    for member in family:  # those with a group of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def lead_group() -> None:
    """Makes the calling process the head of a group of its own, and the first that the kernel ends when memory runs out."""
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setpgid(0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(MORE_LIKELY)
