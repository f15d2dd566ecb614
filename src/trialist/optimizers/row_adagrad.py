"""Adagrad with one accumulator a row, for large tables of which a step touches few rows.

It keeps 1 number for each row of d, where Adam keeps 2 d, and a step with sparse gradients costs what the touched rows
cost. It is what embedding tables of recommender systems are trained with (Mudigere et al., arXiv 2104.05158).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdagrad(torch.optim.Optimizer):
    """s[r] += mean(g[r]^2);  w[r] -= lr g[r] / (sqrt(s[r]) + eps), for the rows r that the gradient holds.

    params: matrices (rows, d), or dicts of groups as torch takes them. Gradients may be dense or sparse COO of rows; rows
    that get no gradient, or one of zeros, stay as they are. The accumulators are float32. Raises ValueError for parameters
    that are no matrices, for shards of parameters (FSDP2) and for numbers out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: float = 1e-8) -> None:
        if not lr > 0 or not eps > 0:
            raise ValueError(f"lr and eps must be > 0, not {lr} and {eps}")
        super().__init__(params, {"lr": lr, "eps": eps})
        if any(hasattr(p, "device_mesh") for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "RowAdagrad takes whole tables, not shards of them; keep the tables whole on every rank (parallel='ddp'), or "
                "train them with AdamW"
            )
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        if shapes:
            raise ValueError(
                f"RowAdagrad takes tables of rows, not parameters of shape {shapes[0]}; give those to AdamW"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class does, which casts state to the dtype of its parameter: the accumulators stay float32."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            if index in state_dict["state"]:
                total = state_dict["state"][index]["sum"]
                self.state[parameter]["sum"] = total.to(parameter.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["eps"])
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, eps: float) -> None:
        state = self.state[parameter]
        if not state:
            state["sum"] = torch.zeros(parameter.shape[0], dtype=torch.float32, device=parameter.device)
        if not gradient.is_sparse:
            state["sum"] += gradient.float().square().mean(1)
            parameter.addcdiv_(gradient, (state["sum"].sqrt() + eps)[:, None].to(gradient.dtype), value=-lr)
            return
        rows, values = gradient._indices()[0], gradient._values()  # (K,), (K, d)
        if not bool(
            (rows[1:] > rows[:-1]).all()
        ):  # autograd forgets that rows come once, and coalescing copies them all
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
        state["sum"].index_add_(0, rows, torch.linalg.vector_norm(values.float(), dim=1).square() / values.shape[1])
        scale = -lr / (state["sum"][rows].sqrt() + eps)
        parameter.index_add_(0, rows, values * scale[:, None].to(values.dtype))
