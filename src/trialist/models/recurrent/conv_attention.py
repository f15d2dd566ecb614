"""Full attention behind the causal convolution of the recurrent mixers: what of their quality is the convolution's?

    mixer(x) = attention(x + conv(x))

B batch, T time, d stream width, K taps
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    StaticLayer,
)

from trialist.models.attention import FullAttention
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.recurrent.cache import layer_of, refuse_crop
from trialist.models.recurrent.mixer import CausalConvolution


class ConvolvedAttention(FullAttention):
    """The mixer `conv_attention`."""

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.conv = CausalConvolution(config.hidden_size, config.settings("min_rnn")["conv_kernel"])

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
        """As `FullAttention`; a document does not reach into the next one through the convolution either."""
        cache = past_key_values
        layer = None if cache is None else layer_of(cache, self.layer_idx, _Tailed, "conv_attention")
        x = hidden_states if padding_mask is None else hidden_states * padding_mask[..., None]
        local, tail = self.conv(x, None if layer is None else layer.conv_tail, reset)
        if layer is not None:
            layer.conv_tail = tail.clone()  # a view of all inputs
        return super().forward(x + local, position_embeddings, attention_mask, past_key_values, padding_mask, **kwargs)


class _Tailed(CacheLayerMixin):
    """Keys, values and the last inputs of the convolution `(B, K - 1, d)`, which cannot be cropped."""

    is_croppable = False
    is_compileable = False
    conv_tail: Tensor | None = None

    def crop(self, tokens_to_remove: int) -> None:
        refuse_crop(tokens_to_remove, int(self.get_seq_length()))

    def reset(self) -> None:
        super().reset()
        self.conv_tail = None

    def offload(self) -> None:
        super().offload()
        self._map(lambda tail: tail.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._map(lambda tail: tail.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda tail: tail.index_select(0, beam_idx.to(tail.device)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.conv_tail is not None:
            self.conv_tail = function(self.conv_tail)


class ConvolvedLayer(_Tailed, DynamicLayer):
    """The cache layer of `conv_attention` that grows."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda tail: tail.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda tail: tail[indices])


class StaticConvolvedLayer(_Tailed, StaticLayer):
    """The cache layer of `conv_attention` whose keys and values are preallocated."""


DYNAMIC_LAYER_TYPE_MAPPING["conv_attention"] = ConvolvedLayer
STATIC_LAYER_TYPE_MAPPING["conv_attention"] = StaticConvolvedLayer
