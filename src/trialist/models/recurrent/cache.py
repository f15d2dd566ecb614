"""Cache layer of recurrent mixers: the state after the last token, which is all that the past leaves behind.

The linear attention layer of transformers keeps a recurrent state only where a convolution is cached beside it, and does not
count tokens. B batch, d_h state width, d stream width, K taps of the convolution
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
)

from trialist.models.configuration import RECURRENT_MIXERS

Layer = TypeVar("Layer")


class RecurrentStateLayer(CacheLayerMixin):
    """State `(B, d_h)`, last inputs of the convolution `(B, K - 1, d)`, and the number of tokens they stand for.

    Its size does not grow, so it serves dynamic and static caches alike. What a state has absorbed cannot be taken out of it
    again: `crop` raises RuntimeError.
    """

    # transformers sizes the causal mask by the first layer that is not sliding, and that must be one with keys
    is_sliding = True
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.conv_tail: Tensor | None = None
        self.cumulative_length = 0

    def store(self, state: Tensor, conv_tail: Tensor | None, tokens: int) -> None:
        """Keep a copy of what `tokens` more tokens left: it may be a view, behind which all states of the pass stand."""
        self.state, self.conv_tail = state.clone(), None if conv_tail is None else conv_tail.clone()
        self.device = state.device
        self.cumulative_length += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError(NO_KEYS)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(NO_KEYS)

    def crop(self, tokens_to_remove: int) -> None:
        refuse_crop(tokens_to_remove, self.cumulative_length)

    def reset(self) -> None:
        self.state = self.conv_tail = None
        self.cumulative_length = 0
        self.is_initialized = False

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = function(self.state)
        if self.conv_tail is not None:
            self.conv_tail = function(self.conv_tail)


def refuse_crop(tokens_to_remove: int, held: int) -> None:
    """Raises RuntimeError where tokens are to leave a layer of `held` tokens that cannot give any back."""
    tokens_to_remove = int(tokens_to_remove)  # some versions hand over a tensor
    if tokens_to_remove > 0:  # the meaning in earlier versions of transformers: how many tokens to keep
        tokens_to_remove = min(0, tokens_to_remove - held)
    if tokens_to_remove < 0 and held > 0:
        raise RuntimeError(
            f"a recurrent layer cannot give back its last {-tokens_to_remove} tokens, its state has absorbed them; decode "
            "without assistant, or start from a fresh cache"
        )


NO_KEYS = "a recurrent layer keeps a state and no keys and values; store the state with `store`"

# by hand, because `_layer_type` holds one name only
for _name in RECURRENT_MIXERS:
    DYNAMIC_LAYER_TYPE_MAPPING[_name] = STATIC_LAYER_TYPE_MAPPING[_name] = RecurrentStateLayer


def layer_of(cache: Cache, layer_idx: int, kind: type[Layer], what: str) -> Layer:
    """The layer of `cache` for the model's layer `layer_idx`. Raises ValueError, with `what` it should be, for another kind."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, kind):
        found = "no layer" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(
            f"layer {layer_idx} needs a cache with a {what} layer and found {found}; build it from the model's "
            "configuration: DynamicCache(config=model.config)"
        )
    return layer
