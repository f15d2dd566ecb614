"""`python -m benchmarks [NAME ...]`: runs the benchmark files of this folder, all or those named, and writes RESULTS.md.

A file takes part by having a function `rows() -> list[Row]`. Each has a section of its own in RESULTS.md, with the machine it
ran on; the sections of files that were not run stay as they are.
"""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.timer import Row

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
COLUMNS = ("what", "work", "measured", "against", "ratio", "limit", "target")
HEADER = """# Benchmarks

Written by `make bench`. Times are medians of at least 20 interleaved rounds in one process, with minimum and distance
between the quartiles (IQR). The ratio is ours / peer (below 1: ours is faster) with its 95 % bootstrap interval over
rounds. The limit is the larger of operations / peak and bytes / bandwidth, both measured on this machine, as a share
of the fastest round: 100 % could not be faster.
"""


def main(names: list[str]) -> int:
    known = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef rows()" in path.read_text())
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    stored = stored_sections(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = {title(name): stored[title(name)] for name in known if title(name) in stored}
    for name in names or known:
        print(f"{name} ...", file=sys.stderr, flush=True)
        kept[title(name)] = section(name, importlib.import_module(f"benchmarks.{name}").rows())
        RESULTS.write_text("\n".join([HEADER, *(kept[heading] for heading in sorted(kept))]))
        if names:
            print(kept[title(name)])
    print(RESULTS)
    return 0


def title(name: str) -> str:
    return f"## {name.replace('_', ' ').capitalize()}"


def stored_sections(text: str) -> dict[str, str]:
    """Title -> section, of an earlier RESULTS.md."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part.rstrip() + "\n" for part in parts}


def section(name: str, rows: Iterable[Row]) -> str:
    """Title, machine, and a table with a line for each row."""
    lines = [title(name), "", machine(), "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for row in rows:
        cells = [getattr(row, column) for column in COLUMNS]
        if row.met is not None:
            cells[-1] += ": met" if row.met else ": **missed**"
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine() -> str:
    """Processor and versions, nothing that names the computer or its user."""
    facts = [
        datetime.date.today().isoformat(),
        f"{_processor()}, {os.cpu_count()} cores",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"compiler {_compiler()}",
    ]
    if torch.cuda.is_available():
        facts.append(torch.cuda.get_device_name())
    return "; ".join(facts)


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
