"""Causal multi-head attention with rotary positions and grouped keys: the standard mixer of the modular decoder.

B batch, T new tokens, S columns (past and new), H query heads, G key/value heads, D head width
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from trialist.models.configuration import ModularDecoderConfig


class FullAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v after rotary embedding; the computation is `config._attn_implementation`'s."""

    residual_output = "o_proj"

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert groups is not None
        assert width is not None
        self.head_dim = width
        self.num_key_value_groups = heads // groups
        self.scaling = width**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        some, every = bool(config.attention_bias), config.attention_bias is True
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=some)
        self.k_proj = nn.Linear(config.hidden_size, groups * width, bias=some)
        self.v_proj = nn.Linear(config.hidden_size, groups * width, bias=every)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=every)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        padding_mask: Tensor | None = None,
        reset: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed states `(B, T, hidden_size)` and the attention weights where the implementation has them.

        attention_mask as transformers builds it from padding and positions, so `padding_mask` and `reset` have nothing to add.
        """
        B, T, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        key = self.k_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        value = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, S, D)
        output, weights = self.attend(query, key, value, attention_mask, past_key_values, **kwargs)
        return self.o_proj(output.reshape(B, T, -1)), weights

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Output `(B, T, H, D)` and weights; what a variant of attention replaces."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return interface(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def flops_per_token(self, length: int) -> float:
        """Multiply-adds of q k^T and P v, times two, for a token of a sequence of `length`; projections not included.

        All `length` columns count, as the implementations compute them, although half of them are masked.
        """
        return 4.0 * self.config.num_attention_heads * self.head_dim * length
