"""A linear layer whose weights are read at 2, 3, 4 ... bits from one set of bit-planes (arXiv 2402.10517)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trialist.kernels.nested import TABLES, dequantize, nested_linear

# N outputs, K inputs, P bits of the longest code, W words of 64 bits in a row


@dataclass(eq=False)
class PrecisionDial:
    """How many bits the layers of a model read at present: one object that all of them look at."""

    available: tuple[int, ...]
    """Bits that there are tables for, ascending"""
    bits: int
    trained_around: bool = False
    """Whether a forward pass in training mode is meant: something else is trained, and these weights stay as they are"""

    def set(self, bits: int) -> None:
        """Raises ValueError for bits that the model does not have, naming those that it has."""
        if bits not in self.available:
            raise ValueError(f"the weights cannot be read at {bits} bits; they can at {self.listed}")
        self.bits = bits

    @property
    def listed(self) -> str:
        *others, last = map(str, self.available)
        return f"{', '.join(others)} or {last}" if others else last


class NestedLinear(nn.Module):
    """`y = x W_b^T + bias`, where W_b is read from the first b bits of every code.

    qweight: `(P, N, W)` int64 bit-planes, the highest bit first. lut2, lut3, ...: `(N, 2^b)` tables, float16 or bfloat16, which
    casts of the model leave as they are. b is that of the dial, or `bits` of the call.

    The weights have no gradient. A forward pass in training mode with gradients raises RuntimeError, unless `train_around` or a
    LoRA adapter said that something else is trained.
    """

    qweight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: tuple[int, ...] = (2, 3, 4),
        *,
        bias: bool = False,
        table_dtype: torch.dtype = torch.float16,
        dial: PrecisionDial | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if table_dtype not in TABLES:
            raise ValueError(f"table_dtype is {table_dtype}; wanted float16 or bfloat16")
        self.in_features, self.out_features = in_features, out_features
        self.dial = dial or PrecisionDial(tuple(sorted(bits)), max(bits))
        self.backend = "auto"
        self.transposed = False
        """Whether it stands for a Conv1D of GPT-2, which stores `(K, N)`"""
        words = -(-in_features // 64)
        planes = torch.zeros(max(bits), out_features, words, dtype=torch.int64, device=device)
        self.register_buffer("qweight", planes)
        for b in sorted(bits):
            self.register_buffer(f"lut{b}", torch.zeros(out_features, 1 << b, dtype=table_dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def table(self, bits: int) -> Tensor:
        """`(N, 2^bits)`. Raises ValueError for bits that there are no values for."""
        found = self._buffers.get(f"lut{bits}")
        if found is None:
            raise ValueError(f"the weights cannot be read at {bits} bits; they can at {self.dial.listed}")
        return found

    def dequantize(self, bits: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix `(N, K)` at a precision, by default the present one."""
        table = self.table(self.dial.bits if bits is None else bits)
        return dequantize(self.qweight, table, self.in_features, dtype)

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix `(N, K)` at the present precision, for code that looks at weights; changes to it are lost."""
        if self.qweight.is_meta:
            return torch.empty(self.out_features, self.in_features, device="meta")
        copy = self.dequantize()
        copy._is_hf_initialized = True  # type: ignore[attr-defined]  # initialisation in transformers passes it by
        return copy

    def forward(self, x: Tensor, bits: int | None = None) -> Tensor:
        """`(..., N)` of `(..., K)`."""
        if self.training and not self.dial.trained_around and torch.is_grad_enabled():
            raise RuntimeError(
                "nested weights are stored as codes and cannot be trained: call model.eval(), train LoRA adapters over them "
                "(trialist.models.nested_lora), or say train_around(model) to train what else the model has"
            )
        table = self.table(self.dial.bits if bits is None else bits)
        return nested_linear(x, self.qweight, table, self.bias, backend=self.backend)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def, override]
        """Moves go through; casts do not reach the tables, whose digits would be lost, or bytes won."""
        kept = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            moved, old = self._buffers[name], before[name]
            assert moved is not None
            assert old is not None
            if moved.dtype != dtype:
                self._buffers[name] = old.to(moved.device)
        return self

    def extra_repr(self) -> str:
        bits = f"bits={self.dial.bits} of {self.dial.available}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {bits}"
