"""Recurrent layers as mixers of the modular decoder: a short causal convolution, a cell, the projection to the stream.

    mixer(x) = W_out cell(x + conv(x))

Departure from arXiv 2410.01201: there the convolution is a residual branch of the stream with a norm of its own; here it stands
inside the mixer, so that a block is mixer and feed-forward whatever the mixer is.
"""

# B batch, T time, d stream width, d_h state width, K taps

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from trialist.kernels.causal_conv import causal_conv
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.recurrent.cache import RecurrentStateLayer, layer_of
from trialist.models.recurrent.gru import GRU
from trialist.models.recurrent.min_rnn import MinGRU, MinLSTM


class CausalConvolution(nn.Module):
    """y[t] = sum over n < K of w[n] x[t-n], for each channel by itself; a document does not reach into the next one."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, channels))
        self.draw_initial_weights()

    @torch.no_grad()
    def draw_initial_weights(self) -> None:
        bound = len(self.weight) ** -0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, before: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`(B, T, d)`, and the last K - 1 inputs `(B, K - 1, d)`, which are `before` of the tokens that follow.

        before: None is zeros. reset: bool `(B, T)`, True at the first token of a document.
        """
        y = causal_conv(x, self.weight, before, None if reset is None else tokens_since(reset))
        tail = len(self.weight) - 1
        if before is None and x.shape[1] < tail:
            before = x.new_zeros(x.shape[0], tail, x.shape[2])
        past = x if before is None else torch.cat([before.to(x.dtype), x], 1)
        return y, past[:, past.shape[1] - tail :]

    def flops_per_token(self, length: int) -> float:
        return 2.0 * self.weight.numel()


def tokens_since(reset: Tensor) -> Tensor:
    """How many tokens ago, `(B, T)`, the last True of `reset` was; more than any sequence is long where there was none."""
    index = torch.arange(reset.shape[1], device=reset.device).expand_as(reset)
    return index - torch.where(reset, index, -(2**40)).cummax(1).values


class RecurrentMixer(nn.Module):
    """A recurrent layer as a mixer of the modular decoder: causal convolution, cell, projection back to the stream."""

    residual_output = "out_proj"
    cell: nn.Module

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        settings = config.settings("min_rnn")
        self.layer_idx = layer_idx
        taps = settings["conv_kernel"]
        self.conv = None if taps is None else CausalConvolution(config.hidden_size, taps)
        self.cell = self.make_cell(config.hidden_size, settings)
        self.out_proj = nn.Linear(self.cell.hidden_size, config.hidden_size, bias=False)

    def make_cell(self, width: int, settings: dict[str, Any]) -> nn.Module:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        reset: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mixed states `(B, T, hidden_size)`. reset: bool `(B, T)`, True at the first token of a packed document."""
        cache = past_key_values
        layer = None if cache is None else layer_of(cache, self.layer_idx, RecurrentStateLayer, "recurrent")
        state, before = (None, None) if layer is None else (layer.state, layer.conv_tail)
        x, tail = hidden_states, None
        if self.conv is not None:
            if padding_mask is not None:
                x = x * padding_mask[..., None]
            local, tail = self.conv(x, before, reset)
            x = x + local
        output, state = self.cell(x, state, padding_mask=padding_mask, reset=reset)
        if layer is not None:
            layer.store(state, tail, tokens=x.shape[1])
        return self.out_proj(output), None


class MinGRUMixer(RecurrentMixer):
    """The mixer `min_gru`."""

    def make_cell(self, width: int, settings: dict[str, Any]) -> nn.Module:
        return MinGRU(width, **_cell_settings(settings))


class MinLSTMMixer(RecurrentMixer):
    """The mixer `min_lstm`."""

    def make_cell(self, width: int, settings: dict[str, Any]) -> nn.Module:
        return MinLSTM(width, **_cell_settings(settings))


class GRUMixer(RecurrentMixer):
    """The mixer `gru`: the recurrent layer that minGRU simplifies, in the same place."""

    def make_cell(self, width: int, settings: dict[str, Any]) -> nn.Module:
        return GRU(width, round(width * settings["expansion"]), bias=settings["bias"])


def _cell_settings(settings: dict[str, Any]) -> dict[str, Any]:
    named = ("expansion", "bias", "activation", "gate_bias_init", "backend")
    return {"proj": False, **{name: settings[name] for name in named}}
