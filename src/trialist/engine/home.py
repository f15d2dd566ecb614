"""Where trialist keeps what it stores: ledger, stages, run folders, reports; and writing files so that none is half there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def home_folder() -> Path:
    """`$TRIALIST_HOME`, else `.trialist` below the current folder."""
    return Path(os.environ.get("TRIALIST_HOME") or ".trialist").absolute()


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Writes a whole file or leaves what was there. Raises OSError that names the path; nothing half-written stays."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise OSError(
            error.errno, f"cannot write {target}: {error.strerror}; free space or choose another place"
        ) from error
    return target
