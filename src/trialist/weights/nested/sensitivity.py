"""What an error of each weight counts: the mean square of its gradient, or of its input, over calibration sequences.

The gradient is that of the mean cross entropy of one sequence at a time, and its squares are summed in float32: in bfloat16 a
hundred additions would lose the small ones. A gradient lives until its square is added, so that the memory is that of the model,
of the sums (4 bytes a weight), and of one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trialist.models.scoring import selected_logprobs

Calibration = Sequence[Tensor] | Mapping[str, Tensor]
"""Token ids `(T,)` of sequences, or rows `(N, T)` of `input_ids` with `labels`, `position_ids` or `attention_mask`"""
Progress = Callable[[int, int], None]


def sensitivities(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    calibration: Calibration,
    kind: str,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Layer -> what errors of its weights count, float32 `(N, K)` by gradients ("fisher"), `(K,)` by inputs ("activation").

    layers: linear layers of the model by name. The model runs in eval mode, so without dropout, and is left as it was. Raises
    ValueError for calibration data without a token to predict, for a float16 model with "fisher", whose small gradients would
    vanish, and for gradients that are not finite, naming the sequence.
    """
    if kind == "fisher" and any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError(
            "small gradients vanish in float16; load the model in float32 or bfloat16, or use sensitivity='activation'"
        )
    rows = list(_rows(calibration))
    if not rows:
        raise ValueError("there are no calibration sequences; give at least one")
    wanted = {id(layer.weight) for layer in layers.values()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():  # the first call looks at the model with passes of its own, which would count as inputs
        selected_logprobs(model, **{name: x.to(model.device) for name, x in rows[0].items()})
    collect = _Gradients(layers) if kind == "fisher" else _Inputs(layers)
    try:
        for parameter in before:
            parameter.requires_grad_(kind == "fisher" and id(parameter) in wanted)
        for number, row in enumerate(rows):
            with torch.set_grad_enabled(kind == "fisher"):
                logprobs = selected_logprobs(model, **{name: x.to(model.device) for name, x in row.items()})
                loss = -logprobs.sum() / max(1, scored(row))
            if not loss.isfinite():
                raise ValueError(f"calibration sequence {number}: the loss is {float(loss)}; is the model whole?")
            if kind == "fisher":
                loss.backward()
            if progress is not None:
                progress(number + 1, len(rows))
    finally:
        collect.close()
        for parameter, gradient in before.items():
            parameter.requires_grad_(gradient)
        for module, mode in modes.items():
            module.training = mode
    found = {name: total / len(rows) for name, total in collect.totals.items()}
    for name, value in found.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: the sensitivity is not finite; load the model in float32")
    return found


def scored(row: Mapping[str, Tensor]) -> int:
    """Tokens of a row whose prediction counts."""
    if "labels" in row:
        return int((row["labels"][:, 1:] != -100).sum())
    if "attention_mask" in row:
        real = row["attention_mask"].bool()
        return int((real[:, 1:] & real[:, :-1]).sum())
    return row["input_ids"][:, 1:].numel()


def _rows(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """One sequence `(1, T)` at a time. Raises ValueError that names a sequence without a token to predict."""
    if isinstance(calibration, Mapping):
        parts: Any = (
            {name: x[n : n + 1] for name, x in calibration.items()} for n in range(len(calibration["input_ids"]))
        )
    else:
        parts = ({"input_ids": ids.view(1, -1)} for ids in calibration)
    for number, row in enumerate(parts):
        if scored(row) < 1:
            raise ValueError(f"calibration sequence {number} has no token to predict; give at least two tokens in each")
        yield row


class _Gradients:
    """Sums of squares of the gradient of each weight, `(N, K)`."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.totals: dict[str, Tensor] = {}
        self.hooks = []
        for name, layer in layers.items():
            weight: Any = layer.weight
            shape = weight.shape[::-1] if isinstance(layer, Conv1D) else weight.shape
            self.totals[name] = torch.zeros(shape, dtype=torch.float32, device=weight.device)
            self.hooks.append(weight.register_post_accumulate_grad_hook(self._hook(name, isinstance(layer, Conv1D))))

    def _hook(self, name: str, transposed: bool) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.T if transposed else weight.grad
            self.totals[name].add_(gradient.float().square_())
            weight.grad = None

        return add

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Inputs:
    """Mean squares of each input of a layer, `(K,)`, summed over sequences."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.totals: dict[str, Tensor] = {}
        self.hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def add(layer: nn.Module, args: tuple) -> None:
            square = args[0].detach().flatten(0, -2).float().square().mean(0)
            self.totals[name] = self.totals[name] + square if name in self.totals else square

        return add

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
