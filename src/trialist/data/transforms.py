"""Transforms of data by name, for `trialist apply NAME`: `module:Class`, imported on first use."""

from __future__ import annotations

TRANSFORMS: dict[str, str] = {
    "decontaminate": "trialist.data.decontaminate:Decontaminate",
    "augment-preferences": "trialist.data.augment_preferences:AugmentPreferences",
    "filter-preferences": "trialist.data.filter_preferences:FilterPreferences",
    "select-s1k": "trialist.data.select_s1k:SelectS1K",
}
