"""Recipes by name, for `trialist train NAME`: `module:Class`, imported on first use."""

from __future__ import annotations

RECIPES = {
    "sft": "trialist.training.sft:SupervisedFineTuning",
}
