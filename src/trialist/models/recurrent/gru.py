"""The gated recurrent unit (arXiv 1406.1078) with padding, packed documents and a carried state: the yardstick of minGRU.

Its gates depend on the state, so it can track what minGRU cannot, and must take one step after the other.
"""

# B batch, T time, d input width, d_h state width, S segments, L tokens of the longest

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import initialization as init

from trialist.models.recurrent.checks import check_call


class GRU(nn.Module):
    """`nn.GRU` of one layer, called as `MinGRU` without projection: output `(B, T, d_h)` and state `(B, d_h)`."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.rnn = nn.GRU(input_size, hidden_size, bias=bias, batch_first=True)

    @torch.no_grad()
    def draw_initial_weights(self) -> None:
        for name, parameter in self.rnn.named_parameters():
            if name.startswith("bias"):
                init.zeros_(parameter)
            elif name.startswith("weight_hh"):
                init.orthogonal_(parameter)
            else:
                init.xavier_uniform_(parameter)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        padding_mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and errors as for `MinGRU`; the output is 0 at padding. Under autocast it computes in its precision."""
        check_call(x, state, self.hidden_size, padding_mask, reset)
        device, stored = x.device.type, self.rnn.weight_hh_l0.dtype
        inner = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stored
        first = x.new_zeros(x.shape[0], self.hidden_size, dtype=inner) if state is None else state.to(inner)
        with torch.autocast(device, enabled=False):
            weights = [weight.to(inner) for weight in self.rnn.all_weights[0]]
            if reset is None and (padding_mask is None or bool(padding_mask.all())):
                output, last = torch.gru(x.to(inner), first[None], weights, *self._shape(), batch_first=True)
                last = last[0]
            else:
                output, last = self._by_segment(x.to(inner), first, weights, padding_mask, reset)
        wide = torch.float64 if stored == torch.float64 else torch.float32
        return output.to(x.dtype), last.to(wide)

    def _shape(self) -> tuple[bool, int, float, bool, bool]:
        """As `torch.gru` takes it: whether there are biases, layers, dropout, whether it trains, whether it runs both ways."""
        return self.rnn.bias, 1, 0.0, self.training, False

    @torch.compiler.disable  # how many segments there are, and how long, is known from the masks only
    def _by_segment(
        self, x: Tensor, first: Tensor, weights: list[Tensor], padding_mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Documents, and what a row goes on with, become rows of a batch of their own: (S, L, d)."""
        tokens = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding_mask is None else padding_mask
        row = tokens.nonzero()[:, 0]  # of every token
        if len(row) == 0:
            return x.new_zeros(*x.shape[:2], self.hidden_size), first
        anew = torch.zeros_like(row, dtype=torch.bool) if reset is None else reset[tokens]
        begins = anew.clone()
        begins[0] = True
        begins[1:] |= row[1:] != row[:-1]
        segment = begins.cumsum(0) - 1
        start = begins.nonzero()[:, 0]  # (S,)
        place = torch.arange(len(row), device=x.device) - start[segment]
        lengths = segment.bincount()
        batch = x.new_zeros(len(start), int(lengths.max()), x.shape[2])
        batch[segment, place] = x[tokens]
        initial = torch.where(anew[start, None], 0.0, first[row[start]])
        packed = pack_padded_sequence(batch, lengths.cpu(), batch_first=True, enforce_sorted=False)
        order = packed.sorted_indices
        states, last = torch.gru(packed.data, packed.batch_sizes, initial[order][None], weights, *self._shape())
        last = last[:, packed.unsorted_indices]
        output = x.new_zeros(*x.shape[:2], self.hidden_size)
        output[tokens] = pad_packed_sequence(packed._replace(data=states), batch_first=True)[0][segment, place]
        owner = row[start]
        ends = torch.ones_like(owner, dtype=torch.bool)  # the last segment of its row
        ends[:-1] = owner[1:] != owner[:-1]
        return output, first.index_put((owner[ends],), last[0][ends])
