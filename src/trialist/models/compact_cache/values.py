"""Values in few bits: per token and group of channels, asymmetric, as KIVI stores values (arXiv 2402.02750).

`code = round((v - low) / step)` with low the least value of a group and step its range divided by `2^bits - 1`. Two codes of 4
bits share a byte. Low and step are float16, so a group of 32 costs one further bit a number.

S tokens, D channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE = 16
"""The setting of `bits` that stores values as they are, whatever their type"""
BITS = (4, 8, WHOLE)


@dataclass(frozen=True)
class QuantizedValues:
    """How a cache stores its values once a prompt was read."""

    bits: int = WHOLE
    """4 or 8; 16 stores values as they are, and nothing changes"""
    group: int = 32
    """Channels of a token that share a range; it must divide the width of a head"""
    recent: int = 32
    """Latest tokens that stay whole"""
    every: int = 32
    """Tokens by which the whole ones may outgrow `recent` before they are quantised too"""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(
                f"bits of values is {self.bits}; choose one of {', '.join(map(str, BITS))} (16 keeps them whole)"
            )
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group is {self.group}; give an even number of channels, as 32")
        if self.recent < 0 or self.every < 1:
            raise ValueError(f"recent is {self.recent} and every {self.every}; they must be at least 0 and 1")

    @property
    def neutral(self) -> bool:
        return self.bits == WHOLE

    def check(self, width: int) -> None:
        """Raises ValueError where groups do not fit values of `width` channels."""
        if width % self.group:
            raise ValueError(
                f"group is {self.group}, which does not divide the {width} channels of a value; give a divisor"
            )


def quantize(values: Tensor, settings: QuantizedValues) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `(..., S, D)`, or `(..., S, D / 2)` for 4 bits; low and step, float16 `(..., S, D / group)`."""
    groups = values.unflatten(-1, (-1, settings.group)).to(torch.promote_types(values.dtype, torch.float32))
    low, high = groups.amin(-1), groups.amax(-1)
    most = 2**settings.bits - 1
    low, step = low.to(torch.float16), ((high - low) / most).to(torch.float16)
    wide = step.to(groups.dtype)[..., None]
    codes = ((groups - low.to(groups.dtype)[..., None]) / wide.where(wide > 0, 1.0)).round_().clamp_(0, most)
    codes = codes.to(torch.uint8).flatten(-2)
    if settings.bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, low, step


def dequantize(codes: Tensor, low: Tensor, step: Tensor, settings: QuantizedValues, dtype: torch.dtype) -> Tensor:
    """Values `(..., S, D)` of what `quantize` returned."""
    if settings.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    groups = codes.unflatten(-1, (-1, settings.group)).to(dtype)
    return (groups * step.to(dtype)[..., None]).add_(low.to(dtype)[..., None]).flatten(-2)
