"""Transforms of a saved model by name, for `trialist apply NAME`: `module:Class`, imported on first use."""

from __future__ import annotations

TRANSFORMS: dict[str, str] = {
    "param-delta": "trialist.weights.param_delta:ParamDelta",
    "extract-delta": "trialist.weights.param_delta:ExtractDelta",
    "selective-attention": "trialist.weights.context_pruning:SelectiveAttentionTransform",
    "prune-context": "trialist.weights.context_pruning:PruneContext",
    "quantize": "trialist.weights.nested.command:Quantize",
}
