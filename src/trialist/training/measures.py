"""What a step costs, and what a checkpoint must agree on with the run that resumes it."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

TRAINING_TO_FORWARD = 3  # the backward pass costs twice the forward pass


def flops_counter(
    model: nn.Module, flops_per_token: float | Callable[[int], float] | None, length: int
) -> Callable[[int], float] | None:
    """A third of the FLOPs of a training pass per input position, which is a forward pass where all of it has a gradient, as a
    function of the length T; None, with a warning, if not countable."""
    if flops_per_token is not None:
        return flops_per_token if callable(flops_per_token) else lambda _: float(flops_per_token)
    from trialist.models.flops import flops_per_token as analytic

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT wrapper
    try:
        known = {length: analytic(inner, length, training=True)}
    except ValueError as error:
        warnings.warn(f"the cost will have no FLOPs: {error}", stacklevel=3)
        return None

    def counted(length: int) -> float:
        if length not in known:
            known[length] = analytic(inner, length, training=True)
        return known[length]

    return counted


def batch_cost(batch: Mapping[str, Tensor], flops: Callable[[int], float] | None) -> dict[str, float]:
    """`tokens`: input positions that are not padding; `flops`: of forward and backward, padding included.

    Padding is what `attention_mask` says; without one, in packed rows, a position 0 that no position 1 follows.
    """
    if "input_ids" not in batch:
        raise ValueError(f"a batch needs 'input_ids' to count its tokens; it has {', '.join(batch) or 'nothing'}")
    input_ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    tokens = input_ids.numel()
    if mask is not None and mask.shape == input_ids.shape:
        tokens = int(mask.sum())
    elif positions is not None and positions.shape == input_ids.shape:
        follows = nn.functional.pad(positions[:, 1:], (0, 1)) == 1
        tokens -= int(((positions == 0) & ~follows).sum())
    cost = {"tokens": float(tokens)}
    if flops is not None:
        cost["flops"] = TRAINING_TO_FORWARD * flops(input_ids.shape[-1]) * input_ids.numel()
    return cost


def describe(part: Any) -> str:
    """Name and parameters of a callable, the same in every process."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return f"{type(part).__module__}.{part!r}"
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}.{named.__qualname__}"


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Class and options per group; of a scheduled learning rate the initial one."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: _plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
        options["lr"] = _plain(group.get("initial_lr", group["lr"]))
        groups.append({**options, "parameters": len(group["params"])})
    return {"class": describe(type(optimizer)), "groups": groups}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, number of parameters and a hash over their names, shapes and dtypes and which of them are trained."""
    lines = [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in sorted(model.named_parameters())]
    hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return {"class": describe(type(model)), "parameters": sum(p.numel() for p in model.parameters()), "shapes": hashed}


def digest_batch(batch: Mapping[str, Tensor]) -> str:
    """Hash of the tensors of a batch, by name."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        tensor = batch[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
