"""AdamW with the parameter groups that language models are usually trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def adamw(
    model: nn.Module, learning_rate: float, *, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the trainable parameters: decay on matrices, none on embeddings, norms and biases.

    A head tied to an embedding is an embedding. A module may declare groups of its own: its method `optimizer_groups()`
    returns dicts as torch takes them (`params`, then any option of AdamW), where `learning_rate_scale` multiplies the
    learning rate, `name` names the group and `sparse` says that its gradients are sparse; what such a group does not name
    it takes from the arguments here. The outermost declaration wins.
    One fused kernel does the update where there is one (CPU, CUDA); it is deterministic.
    Raises ValueError when nothing is trainable, or when a declared group holds a parameter of another module, or has
    sparse gradients.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, not {learning_rate}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be >= 0, not {weight_decay}")
    groups, taken = declared_groups(model, learning_rate)
    embeddings = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for weight in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():  # a shared parameter comes once
        if parameter.requires_grad and id(parameter) not in taken:
            is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}, *groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)


def declared_groups(model: nn.Module, learning_rate: float) -> tuple[list[dict[str, Any]], set[int]]:
    """The groups that modules declare through `optimizer_groups()`, for an optimizer of dense gradients, and the ids of the
    parameters in them. Raises ValueError where a group has sparse gradients or holds a parameter of another module."""
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    for name, module in model.named_modules():
        declare = getattr(module, "optimizer_groups", None)
        if declare is None:
            continue
        own = {id(parameter) for parameter in module.parameters()}
        claimed: set[int] = set()
        for declared in declare():
            group = dict(declared)
            group["params"] = [p for p in group["params"] if p.requires_grad and id(p) not in taken]
            if any(id(p) not in own for p in group["params"]):
                raise ValueError(f"optimizer_groups() of module {name or 'model'!r} names a foreign parameter")
            if any(id(p) in claimed for p in group["params"]):
                raise ValueError(f"optimizer_groups() of module {name or 'model'!r} names a parameter twice")
            claimed |= {id(p) for p in group["params"]}
            if group.pop("sparse", False):
                raise ValueError(
                    f"the gradients of group {group.get('name', '')!r} are sparse, which AdamW does not take; give its "
                    "parameters to trialist.optimizers.RowAdagrad or torch.optim.SparseAdam in a loop of your own, or build "
                    "the layer with sparse_grad=False"
                )
            if "learning_rate_scale" in group:
                group["lr"] = learning_rate * group.pop("learning_rate_scale")
            groups.append(group)
        taken |= claimed
    return groups, taken
