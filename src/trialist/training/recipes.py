"""Recipes by name, for `trialist train NAME`: `module:Class`, imported on first use."""

from __future__ import annotations

RECIPES = {
    "precision-schedule": "trialist.decoding.precision.training:PrecisionScheduleTraining",
    "preference": "trialist.training.preference:PreferenceTraining",
    "sft": "trialist.training.sft:SupervisedFineTuning",
    "reward": "trialist.training.reward:RewardModelling",
    "rlvr": "trialist.training.rlvr:VerifiableRewards",
    "tulu": "trialist.training.tulu:Tulu",
}
