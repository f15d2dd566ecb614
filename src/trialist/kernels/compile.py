"""Compiles a C file of this room with the system's compiler, once per machine, and loads it with ctypes.

Libraries lie in `$TRIALIST_CACHE/kernels` (else `$XDG_CACHE_HOME/trialist`, else `~/.cache/trialist`), under a name that
hashes the source, the flags, the compiler and the processor. Several processes may ask at once: one compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)

COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
OPTIONAL = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())  # the first that compiles is taken


@functools.cache
def load_library(source: str) -> ctypes.CDLL | None:
    """The C file `source` of this folder as a loaded library, or None where it cannot be compiled (the log says why, once)."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), *COMPILERS))), None)
    if compiler is None:
        log.warning(
            "no C compiler found (gcc, cc, clang or $CC): %s is replaced by PyTorch or Python, which is slower", source
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, Path(__file__).with_name(source))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        log.warning(
            "%s could not be compiled (%s) and is replaced by PyTorch or Python, which is slower", source, reason
        )
        return None


def _compiled(compiler: str, source: Path) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = "\0".join((source.read_text(), version, *FLAGS, *map(str, OPTIONAL), _processor()))
    folder = _cache_folder() / "kernels"
    library = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(library) + ".lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if library.exists():
            return library
        built = Path(scratch) / library.name
        for attempt, optional in enumerate(OPTIONAL, 1):
            command = [compiler, *FLAGS, *optional, "-o", str(built), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                break
            if attempt == len(OPTIONAL):
                done.check_returncode()
        os.replace(built, library)
    return library


def _cache_folder() -> Path:
    if "TRIALIST_CACHE" in os.environ:
        return Path(os.environ["TRIALIST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trialist"


def _processor() -> str:
    """What decides which instructions `-march=native` may use."""
    described = [platform.system(), platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        described += re.findall(r"^(?:model name|flags|Features)\s*:.*", cpuinfo.read_text(), re.MULTILINE)[:2]
    return " ".join(described)
