"""Decoding on any model: generation options that act through its own `generate`, and the loops behind them.

Names are imported on first use, so that command-line options can be shown without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.decoding.budget_forcing.option import BudgetForcing
    from trialist.decoding.budget_forcing.state import Thinking
    from trialist.decoding.compact_cache.options import KeyPruning, TokenEviction, ValueQuantization
    from trialist.decoding.guidance.option import ContrastiveGuidance
    from trialist.decoding.options import GenerationOption, around_loop, generate, prepare
    from trialist.decoding.precision.option import Precision
    from trialist.decoding.precision.progressive import ProgressivePrecision
    from trialist.decoding.precision.schedules import (
        ConfidenceSchedule,
        LearnedSchedule,
        PiecewiseSchedule,
        RandomSchedule,
        ReversedSchedule,
        StaticSchedule,
        load_schedule,
        parse_schedule,
        save_schedule,
    )
    from trialist.decoding.precision.tuning import train_scheduler, tune_static

__all__ = [
    "BudgetForcing",
    "ConfidenceSchedule",
    "ContrastiveGuidance",
    "GenerationOption",
    "KeyPruning",
    "LearnedSchedule",
    "PiecewiseSchedule",
    "Precision",
    "ProgressivePrecision",
    "RandomSchedule",
    "ReversedSchedule",
    "StaticSchedule",
    "Thinking",
    "TokenEviction",
    "ValueQuantization",
    "around_loop",
    "generate",
    "load_schedule",
    "parse_schedule",
    "prepare",
    "save_schedule",
    "train_scheduler",
    "tune_static",
]

HOMES = {
    "ContrastiveGuidance": "guidance.option",
    "BudgetForcing": "budget_forcing.option",
    "GenerationOption": "options",
    "KeyPruning": "compact_cache.options",
    "Precision": "precision.option",
    "ConfidenceSchedule": "precision.schedules",
    "LearnedSchedule": "precision.schedules",
    "PiecewiseSchedule": "precision.schedules",
    "RandomSchedule": "precision.schedules",
    "ReversedSchedule": "precision.schedules",
    "StaticSchedule": "precision.schedules",
    "load_schedule": "precision.schedules",
    "parse_schedule": "precision.schedules",
    "save_schedule": "precision.schedules",
    "ProgressivePrecision": "precision.progressive",
    "train_scheduler": "precision.tuning",
    "tune_static": "precision.tuning",
    "TokenEviction": "compact_cache.options",
    "ValueQuantization": "compact_cache.options",
    "Thinking": "budget_forcing.state",
    "around_loop": "options",
    "generate": "options",
    "prepare": "options",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
