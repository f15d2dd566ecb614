"""Equal seconds: how many steps of one model fit into the time of another's, by a pace that is measured once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WARM_UP, ROUNDS = 2, 10


def step_seconds(models: Sequence[nn.Module], batch: Mapping[str, Any], dtype: str) -> list[float]:
    """The least seconds of a training step (AdamW) of each model on `batch`, the models taking turns; their weights change."""
    import torch

    from trialist.objectives import CrossEntropy
    from trialist.optimizers import adamw

    objective, device = CrossEntropy(), batch["input_ids"].device
    optimizers = [adamw(model, 1e-6) for model in models]
    least = [float("inf")] * len(models)
    for turn in range(WARM_UP + ROUNDS):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            _wait(device)
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss, stats = objective(model, batch)
            (loss / stats["weight"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait(device)
            if turn >= WARM_UP:
                least[index] = min(least[index], time.perf_counter() - began)
    return least


def _wait(device: Any) -> None:
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
