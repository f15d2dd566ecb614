"""Checkpoint arithmetic: the weight delta of post-training on another base, and a delta as a LoRA adapter.

Names are imported on first use, so that the options of a transform can be shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.weights.arithmetic import apply_param_delta, delta_diagnostics
    from trialist.weights.low_rank import extract_delta
    from trialist.weights.report import DeltaReport

__all__ = ["DeltaReport", "apply_param_delta", "delta_diagnostics", "extract_delta"]

HOMES = {
    "DeltaReport": "report",
    "apply_param_delta": "arithmetic",
    "delta_diagnostics": "arithmetic",
    "extract_delta": "low_rank",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
