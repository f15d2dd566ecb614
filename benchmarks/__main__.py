"""`python -m benchmarks [NAME ...]`: runs the benchmark files of this folder and writes RESULTS.md beside them.

A file takes part by having a function `rows() -> list[Row]`. With names, only those run and RESULTS.md is not written.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.timer import Row

FOLDER = Path(__file__).parent
COLUMNS = ("what", "work", "measured", "against", "ratio", "limit", "target")
HEADER = """# Benchmarks

Written by `make bench`. Times are medians of at least 20 interleaved rounds in one process, with minimum and distance
between the quartiles (IQR). The ratio is ours / peer (below 1: ours is faster) with its 95 % bootstrap interval over
rounds. The limit is the larger of operations / peak and bytes / bandwidth, both measured on this machine, as a share
of the fastest round: 100 % could not be faster.
"""


def main(names: list[str]) -> int:
    files = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "__main__", "timer"))
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in files}
    known = [name for name in files if hasattr(modules[name], "rows")]
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    sections = {}
    for name in names or known:
        print(f"{name} ...", file=sys.stderr, flush=True)
        sections[name] = modules[name].rows()
    text = render(sections)
    if names:
        print(text)
    else:
        (FOLDER / "RESULTS.md").write_text(text)
        print(FOLDER / "RESULTS.md")
    return 0


def render(sections: Mapping[str, Iterable[Row]]) -> str:
    """RESULTS.md: machine, then a table for each benchmark file, in alphabetical order."""
    parts = [HEADER, machine()]
    for name in sorted(sections):
        lines = [f"## {name.replace('_', ' ').capitalize()}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for row in sections[name]:
            cells = [getattr(row, column) for column in COLUMNS]
            if row.met is not None:
                cells[-1] += ": met" if row.met else ": **missed**"
            lines.append(_line(cells))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    """Processor and versions, nothing that names the computer or its user."""
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _compiler(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return "".join(f"- {name}: {fact}\n" for name, fact in facts.items())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or "unknown"


def _compiler() -> str:
    try:
        return subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
