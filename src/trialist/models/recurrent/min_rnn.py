"""minGRU and minLSTM (arXiv 2410.01201): recurrent layers whose gates see the input only, so that time is a linear scan.

    minGRU     h[t] = (1 - z) h[t-1] + z g(W_h x[t])        z = sigmoid(W_z x[t])
    minLSTM    h[t] = f' h[t-1] + i' g(W_h x[t])            f' = f / (f + i),  i' = i / (f + i),  f, i = sigmoid(W x[t])

minLSTM is minGRU with z = i': one recurrence, `gated_scan`, computes both, with one gate or two. g keeps states
positive, as the paper's log-space version needs them; with activation "identity" it is the paper's plain version, another
function.

Departures: the recurrence is computed directly, not from sums of logarithms (`trialist.kernels.scan` says why). The first
state is 0, and a carried state is taken as it is, never through g again. No official code exists.

B batch, T time, d input width, d_h state width
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from trialist.kernels.scan import gated_scan
from trialist.models.recurrent.checks import GateBias, check_call, check_settings


class MinimalRNN(nn.Module):
    """What minGRU and minLSTM share; a subclass says how many projections it has and what they mean."""

    projections: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        expansion: float = 1.0,
        proj: bool = True,
        bias: bool = True,
        activation: str = "g",
        gate_bias_init: GateBias = 0.0,
        backend: str = "auto",
    ) -> None:
        """input_size: d, also the width of the output where `proj`. hidden_size: d_h; None is `expansion` * d.

        proj: whether a linear layer brings the states back to d; without, the output is the states.
        activation: "g" (positive states), "identity" or "tanh" of the candidate.
        gate_bias_init: log-odds with which a gate keeps the old state before training, 0 as in the paper (half a state is
            forgotten at every token); or (shortest, longest) memory in tokens, spread over the channels. Needs `bias`.
        backend: of `trialist.kernels.scan`. Raises ValueError for sizes and names that cannot be.
        """
        super().__init__()
        if hidden_size is not None and expansion != 1.0:
            raise ValueError(f"give hidden_size ({hidden_size}) or expansion ({expansion}), not both")
        if input_size < 1 or (hidden_size is not None and hidden_size < 1):
            raise ValueError(f"input_size {input_size} and hidden_size {hidden_size} must be at least 1")
        check_settings(
            input_size, expansion=expansion, activation=activation, gate_bias_init=gate_bias_init, bias=bias, backend=backend
        )  # fmt: skip
        if hidden_size is None:
            hidden_size = round(input_size * expansion)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.activation, self.gate_bias_init, self.backend = activation, gate_bias_init, backend
        self.in_proj = nn.Linear(input_size, self.projections * hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, input_size, bias=bias) if proj else None
        self.draw_initial_weights()

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        padding_mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output `(B, T, d)` (`(B, T, d_h)` without projection) in the dtype of x, and the state `(B, d_h)` it leaves.

        x: `(B, T, d)`. state: float32 (float64 for float64 x), what an earlier call returned; None is zero.
        padding_mask: bool `(B, T)`, False at padding, which leaves the state as it is.
        reset: bool `(B, T)`, True at the first token of a packed document, which starts from state zero.
        Raises ValueError for T = 0, and for a state or masks that do not fit.
        """
        check_call(x, state, self.hidden_size, padding_mask, reset)
        gate, candidate, forget = self.gates(self.in_proj(x))
        states = gated_scan(
            gate, candidate, state, forget=forget, activation=self.activation, padding_mask=padding_mask, reset=reset,
            backend=self.backend,
        )  # fmt: skip
        output = states.to(x.dtype)
        return (output if self.out_proj is None else self.out_proj(output)), states[:, -1]

    def gates(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Before their activations: the gate that takes the new state, the candidate, the gate that keeps the old state.

        `(B, T, d_h)` each; without a third, what the first does not take is kept.
        """
        raise NotImplementedError

    def gate_biases(self, kept: Tensor) -> Tensor:
        """The bias of all projections for which a zero input keeps the old state with log-odds `kept` `(d_h,)`."""
        raise NotImplementedError

    @torch.no_grad()
    def draw_initial_weights(self) -> None:
        if self.in_proj.bias is not None:
            init.copy_(self.in_proj.bias, self.gate_biases(kept_log_odds(self.gate_bias_init, self.hidden_size)))

    def flops_per_token(self, length: int) -> float:
        """Multiply-add of the recurrence, two for each channel; the linear layers are counted as such."""
        return 2.0 * self.hidden_size


class MinGRU(MinimalRNN):
    """One gate: z opens for the new state as it closes for the old one."""

    projections = 2

    def gates(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, candidate = projected.chunk(2, -1)
        return gate, candidate, None

    def gate_biases(self, kept: Tensor) -> Tensor:
        return torch.cat([-kept, torch.zeros_like(kept)])


class MinLSTM(MinimalRNN):
    """A forget and an input gate, normalised to sum 1: what counts is their ratio."""

    projections = 3

    def gates(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        forget, take, candidate = projected.chunk(3, -1)
        return take, candidate, forget

    def gate_biases(self, kept: Tensor) -> Tensor:
        return torch.cat([kept, -kept, torch.zeros_like(kept)])  # log sigmoid(k) - log sigmoid(-k) = k


def kept_log_odds(gate_bias_init: GateBias, channels: int) -> Tensor:
    """Log-odds `(channels,)` of keeping the old state; a memory of n tokens keeps 1 - 1/n of it at each."""
    if not isinstance(gate_bias_init, Sequence):
        return torch.full((channels,), float(gate_bias_init))
    shortest, longest = gate_bias_init
    return torch.logspace(math.log10(shortest), math.log10(longest), channels).sub(1).log()
