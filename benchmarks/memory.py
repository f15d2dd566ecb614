"""Peak memory of a piece of work in a fresh process: `measured(*arguments)` of a benchmark file prepares it and returns it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path


def peak_memory(module: str, *arguments: str) -> float:
    """Megabytes that the work adds at its peak to what its process held when it was prepared (Linux)."""
    command = [sys.executable, "-m", "benchmarks.memory", module, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def resident(field: str) -> float:
    """Megabytes that this process holds (`VmRSS`) or held at most (`VmHWM`); getrusage would also count its parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


if __name__ == "__main__":
    work = importlib.import_module(sys.argv[1]).measured(*sys.argv[2:])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = resident("VmRSS")
    work()
    print(json.dumps(resident("VmHWM") - before))
