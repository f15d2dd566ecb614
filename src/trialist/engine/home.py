"""Where trialist keeps what it stores: ledger, stages, run folders, reports; and writing files so that none is half there."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
from pathlib import Path

from trialist.engine.processes import started


def home_folder() -> Path:
    """`$TRIALIST_HOME`, else `.trialist` below the current folder."""
    return Path(os.environ.get("TRIALIST_HOME") or ".trialist").absolute()


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Writes a whole file or leaves what was there. Raises OSError that names the path; nothing half-written stays.

    What a process that was killed while it wrote this file has left is removed by the next one that writes it. A link is
    followed; a device or a pipe takes the content as it comes.
    """
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if target.exists() and not target.is_file():
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            target.write_bytes(data)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.{os.getpid()}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {target}: {error.strerror}; free space or choose another place"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return target


def _remove_leftovers(target: Path) -> None:
    prefix = f".{target.name}."
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        pid = leftover.name.removeprefix(prefix).partition(".")[0]
        if pid.isdigit() and started(int(pid)) is None:
            leftover.unlink(missing_ok=True)
