"""The linear recurrence in PyTorch operations, for any device and precision, as one PyTorch operator.

As an operator it stands in a compiled graph as it is: the loop over time is neither traced nor unrolled. Its derivative is
made of the same operator and products, so it can be differentiated as often as wanted.

B batch, T time, D channels
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.library.custom_op("trialist::linear_scan_torch", mutates_args=())
def linear_scan_torch(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """As `linear_scan`, for tensors of one precision.

    Step by step on the CPU; elsewhere, where a step costs its launch, about 3 sqrt(T) steps on blocks of sqrt(T).
    """
    if a.device.type != "cpu":
        if reverse:
            return scan_blocks(a.flip(1), b.flip(1), h0).flip(1)
        return scan_blocks(a, b, h0)
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    last = torch.zeros_like(b[:, 0]) if h0 is None else h0
    steps = zip(a.unbind(1), b.unbind(1), h.unbind(1), strict=True)
    for decay, new, out in reversed(list(steps)) if reverse else steps:
        last = torch.addcmul(new, decay, last, out=out)
    return h


def scan_blocks(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """Within all blocks at once, from state zero; then from block to block; then what entered each block, decayed."""
    B, T, D = a.shape
    n = math.isqrt(T - 1) + 1
    blocks = -(-T // n)
    fill = (0, 0, 0, blocks * n - T)
    a = torch.nn.functional.pad(a, fill).view(B, blocks, n, D)
    h = torch.nn.functional.pad(b, fill).view(B, blocks, n, D).clone()
    decay = a.clone()  # product of a since the start of the block
    for i in range(1, n):
        h[:, :, i].addcmul_(a[:, :, i], h[:, :, i - 1])
        decay[:, :, i].mul_(decay[:, :, i - 1])
    entering = torch.zeros_like(h[:, :, 0])  # (B, blocks, D)
    if h0 is not None:
        entering[:, 0] = h0
    for j in range(1, blocks):
        torch.addcmul(h[:, j - 1, -1], decay[:, j - 1, -1], entering[:, j - 1], out=entering[:, j])
    return h.addcmul_(decay, entering[:, :, None]).view(B, blocks * n, D)[:, :T].contiguous()


@linear_scan_torch.register_fake
def _empty(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _differentiate(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The recurrence run the other way: d_b[t] = d_h[t] + a[t+1] d_b[t+1],  d_a[t] = d_b[t] h[t-1],  d_h0 = a[1] d_b[1]."""
    a, h, h0 = ctx.saved_tensors
    start = torch.zeros_like(h[:, :1]) if h0 is None else h0[:, None]
    one = torch.ones_like(a[:, :1])
    if ctx.reverse:
        d_b = linear_scan_torch(torch.cat([one, a[:, :-1]], 1), grad, None, False)
        d_a, d_h0 = d_b * torch.cat([h[:, 1:], start], 1), a[:, -1] * d_b[:, -1]
    else:
        d_b = linear_scan_torch(torch.cat([a[:, 1:], one], 1), grad, None, True)
        d_a, d_h0 = d_b * torch.cat([start, h[:, :-1]], 1), a[:, 0] * d_b[:, 0]
    return d_a, d_b, None if h0 is None else d_h0, None


linear_scan_torch.register_autograd(_differentiate, setup_context=_save)
