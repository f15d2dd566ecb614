"""Analytic FLOPs of a forward pass, from counters that the modules carry or that their kind implies."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from trialist.models.selective_attention import calls_attention_interface


def flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs of one forward pass per token of a sequence of `length` tokens; training costs three times as much.

    Counted are matrix products: two per weight of every linear layer (the head included, tied or not) and
    4 * heads * head width * length per attention layer, all columns, as it is computed. Norms, softmax and the prefix
    sums of selective attention are left out. A module with a method `flops_per_token(length)` is counted by it, beside
    the linear layers inside. Raises ValueError for a weight matrix that no rule covers.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")
    total, covered = 0.0, set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            total += 2.0 * module.weight.numel()
            covered.add(id(module.weight))
        elif isinstance(module, nn.Embedding):
            covered.add(id(module.weight))
        elif hasattr(module, "flops_per_token"):
            total += module.flops_per_token(length)
            covered.update(id(parameter) for parameter in module.parameters(recurse=False))
        elif calls_attention_interface(module):
            config = module.config
            heads = config.num_attention_heads
            width = getattr(module, "head_dim", None) or config.hidden_size // heads
            total += 4.0 * heads * width * length
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in covered:
            raise ValueError(f"cannot count the FLOPs of {name}; give its module a method flops_per_token(length)")
    return total
