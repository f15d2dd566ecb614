"""trialist: techniques from language-model papers as composable parts, and their claims as controlled trials."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

__version__ = version("trialist")


def __getattr__(name: str) -> Any:
    if name == "run":  # lazy: `import trialist` stays free of torch, transformers and sqlalchemy
        from trialist.engine.api import run

        return run
    raise AttributeError(f"module 'trialist' has no attribute {name!r}")
