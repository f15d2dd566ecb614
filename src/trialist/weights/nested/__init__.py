"""Nested weights: one set of codes that is read at several precisions (Any-Precision LLM, arXiv 2402.10517).

Names are imported on first use, so that the options of a transform can be shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.weights.nested.any_precision import import_any_precision
    from trialist.weights.nested.quantize import NestedReport, cluster_rows, quantize_nested
    from trialist.weights.nested.sensitivity import sensitivities

__all__ = ["NestedReport", "cluster_rows", "import_any_precision", "quantize_nested", "sensitivities"]

HOMES = {
    "NestedReport": "quantize",
    "cluster_rows": "quantize",
    "import_any_precision": "any_precision",
    "quantize_nested": "quantize",
    "sensitivities": "sensitivity",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
