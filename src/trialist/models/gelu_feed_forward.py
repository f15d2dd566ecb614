"""The feed-forward layer of GPT-2: two matrices and a GELU between them."""

from __future__ import annotations

from torch import Tensor, nn

from trialist.models.configuration import ModularDecoderConfig


class GELUFeedForward(nn.Module):
    """down(gelu(up(x))), arXiv 1606.08415: a dense layer of the neurons that PEER has as experts."""

    residual_output = "down_proj"

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))
