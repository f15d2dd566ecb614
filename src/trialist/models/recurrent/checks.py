"""What recurrent layers refuse: inputs, states and masks of a call, and settings of a layer."""

# B batch, T time, d input width, d_h state width

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from trialist.kernels.scan import check_activation, check_masks

GateBias = float | Sequence[float]


def check_call(
    x: Tensor, state: Tensor | None, hidden_size: int, padding_mask: Tensor | None, reset: Tensor | None
) -> None:
    """Raises ValueError where a recurrent layer cannot go on from `state`, has no token to go on with, or masks do not fit."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"the input has shape {tuple(x.shape)}, wanted (B, T, d) with at least one time step")
    check_masks((x.shape[0], x.shape[1]), padding_mask, reset)
    if state is None:
        return
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state.shape != (x.shape[0], hidden_size) or state.dtype != wide:
        raise ValueError(
            f"state is {state.dtype} of shape {tuple(state.shape)}, wanted {wide} (B, d_h) = {(x.shape[0], hidden_size)}: "
            "pass what an earlier call returned"
        )


def check_settings(
    width: int,
    *,
    expansion: float = 1.0,
    conv_kernel: int | None = None,
    bias: bool = True,
    activation: str = "g",
    gate_bias_init: GateBias = 0.0,
    backend: str = "auto",
) -> None:
    """Raises ValueError for settings of a recurrent layer of `width` inputs, or of the mixer around it, that cannot be."""
    if not _is_number(expansion) or not math.isfinite(expansion):
        raise ValueError(f"expansion is {expansion!r}; it must be a finite number, hidden over input width")
    if round(expansion * width) < 1:
        raise ValueError(f"expansion is {expansion}: of a width of {width} it leaves no channel; it must be larger")
    if conv_kernel is not None and (
        not isinstance(conv_kernel, int) or isinstance(conv_kernel, bool) or conv_kernel < 1
    ):
        raise ValueError(f"conv_kernel is {conv_kernel!r}; it must be a number of taps of at least 1, or None for none")
    if not isinstance(bias, bool):
        raise ValueError(f"bias is {bias!r}; it must be True or False")
    check_activation(activation, backend)
    if isinstance(gate_bias_init, list | tuple):
        numbers = all(map(_is_number, gate_bias_init)) and len(gate_bias_init) == 2
        if not numbers or not 1 < gate_bias_init[0] <= gate_bias_init[1] < math.inf:
            raise ValueError(
                f"gate_bias_init is {gate_bias_init!r}; give a number or (shortest, longest) memory in tokens, "
                "1 < shortest <= longest"
            )
    elif not _is_number(gate_bias_init) or not math.isfinite(gate_bias_init):
        raise ValueError(
            f"gate_bias_init is {gate_bias_init!r}; it must be a finite number, or a pair of memories in tokens"
        )
    if not bias and gate_bias_init != 0:
        raise ValueError(f"gate_bias_init {gate_bias_init!r} needs bias=True")


READ = {"gru": ("expansion", "conv_kernel", "bias"), "conv_attention": ("conv_kernel",)}
"""The settings that a mixer reads; minimal RNNs read all"""


def check_configuration(
    mixers: Collection[str], given: Mapping[str, Any] | None, settings: Mapping[str, Any], width: int
) -> None:
    """Raises ValueError for settings that cannot be, and for those that none of the mixers named would read.

    given: what the configuration holds. settings: the same with defaults for the rest.
    """
    read = {name for mixer in mixers for name in READ.get(mixer, settings)}
    if unread := sorted(set(given or {}) - read):
        readers = f"layer_types has {', '.join(sorted(mixers))}" if mixers else "no layer is recurrent"
        raise ValueError(f"min_rnn holds {', '.join(unread)}, which nothing reads: {readers}; leave it out")
    check_settings(width, **{name: settings[name] for name in read})
    if "conv_attention" in mixers and settings["conv_kernel"] is None:
        raise ValueError("min_rnn.conv_kernel is None; conv_attention without a convolution is full_attention")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
