"""Decoding on any model: generation options that act through its own `generate`, and the loops behind them.

Names are imported on first use, so that command-line options can be shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.decoding.options import GenerationOption, around_loop, generate, prepare

__all__ = ["GenerationOption", "around_loop", "generate", "prepare"]

HOMES = {
    "GenerationOption": "options",
    "around_loop": "options",
    "generate": "options",
    "prepare": "options",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
