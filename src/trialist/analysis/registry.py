"""Analyses by name, for `trialist analyze NAME`: `module:Class`, imported on first use."""

from __future__ import annotations

ANALYSES: dict[str, str] = {
    "contamination": "trialist.analysis.contamination:ContaminationAnalysis",
    "context-memory": "trialist.analysis.context_memory:ContextMemoryAnalysis",
    "param-delta": "trialist.analysis.param_delta:ParamDeltaAnalysis",
    "rewards": "trialist.analysis.rewards:RewardsAnalysis",
}
