"""Analytic FLOPs of a forward pass, from counters that the modules carry or that their kind implies."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from trialist.models.attention_interface import calls_attention_interface


def flops_per_token(model: nn.Module, length: int, *, training: bool = False) -> float:
    """FLOPs of one forward pass per token of a sequence of `length` tokens; training costs three times as much.

    training: a third of what a training pass costs, which is the same unless part of the pass has no gradient.

    Counted are matrix products: two per weight of every linear or recurrent layer (the head included, tied or not) and
    4 * heads * head width * length per attention layer, all columns, as it is computed. Norms, softmax and the prefix
    sums of selective attention are left out. A module with a method `flops_per_token(length)` is counted by it, beside
    the linear layers inside. What is inside a module with `runs_per_pass` counts so many times; in training, with
    `training_runs`, the runs with gradient and a third of those without. Raises ValueError for a weight matrix that no rule
    covers.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")
    total, covered = 0.0, set()
    for module, runs in _with_runs(model, "training_runs" if training else "runs_per_pass"):
        if isinstance(module, nn.Linear | Conv1D):
            total += runs * 2.0 * module.weight.numel()
            covered.add(id(module.weight))
        elif isinstance(module, nn.RNNBase):
            matrices = [weight for weight in module.parameters() if weight.dim() > 1]
            total += runs * 2.0 * sum(weight.numel() for weight in matrices)
            covered.update(map(id, matrices))
        elif isinstance(module, nn.Embedding):
            covered.add(id(module.weight))
        elif hasattr(module, "flops_per_token"):
            total += runs * module.flops_per_token(length)
            own = (module, *(part for part in module.children() if isinstance(part, nn.ParameterList)))
            covered.update(id(parameter) for part in own for parameter in part.parameters(recurse=False))
        elif calls_attention_interface(module):
            config = module.config
            heads = config.num_attention_heads
            width = getattr(module, "head_dim", None) or config.hidden_size // heads
            total += runs * 4.0 * heads * width * length
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in covered:
            raise ValueError(f"cannot count the FLOPs of {name}; give its module a method flops_per_token(length)")
    return total


def _with_runs(module: nn.Module, attribute: str, runs: float = 1.0) -> Iterator[tuple[nn.Module, float]]:
    """Every module inside, once, and how often a pass runs it."""
    seen: set[int] = set()
    open_modules = [(module, runs)]
    while open_modules:
        module, runs = open_modules.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        runs *= getattr(module, attribute, 1)
        yield module, runs
        open_modules += [(child, runs) for child in module.children()]
