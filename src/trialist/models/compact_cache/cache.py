"""A cache for generation whose layers store less: made for a model, filled within `compact_attention`, measured in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from trialist.models.attention_interface import attention_modules, plain_model, refuse_unsupported
from trialist.models.compact_cache.attention import WHAT
from trialist.models.compact_cache.channels import KeyChannels
from trialist.models.compact_cache.layer import CompactCacheLayer, Plan
from trialist.models.compact_cache.tokens import TokenBudget
from trialist.models.compact_cache.values import QuantizedValues
from trialist.models.eviction.cache import cache_bytes, layer_bytes


@dataclass(frozen=True)
class LayerReport:
    """What a layer of a cache holds."""

    layer: int
    tokens: int
    """Of the text"""
    stored: int
    """Tokens that are still there"""
    pruned: int
    """Of those, how many are stored in fewer channels or bits"""
    key_channels: int
    """Of a pruned token, per head"""
    bytes: int
    """Measured"""
    dense_bytes: int
    """Of all tokens, whole, in a cache without spare room"""


class CompactCache(Cache):
    """The layers of a model's ordinary cache, those with full attention as `CompactCacheLayer`; others stay as they are.

    keys, values, eviction: what is pruned, quantised and given up, each None for nothing. A cache can be used in one
    generation after another as long as its text goes on.

    Raises ValueError for models in which no layer can store less, and for keys that prune the channels of values which are
    to be quantised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: KeyChannels | None = None,
        values: QuantizedValues | None = None,
        eviction: TokenBudget | None = None,
    ) -> None:
        plain = plain_model(model)
        self.plan = Plan()
        layers: list[Any] = list(DynamicCache(config=plain.config).layers)
        for index in compactable(plain, layers):
            layers[index] = CompactCacheLayer(self.plan, index)
        super().__init__(layers=layers)
        for name, part in (("keys", keys), ("values", values), ("eviction", eviction)):
            if part is not None:
                self.own(name, part)

    def own(self, name: str, part: KeyChannels | QuantizedValues | TokenBudget) -> None:
        """Lets `part` decide on `name`: `keys`, `values` or `eviction`.

        Raises ValueError where another one does already, and where the cache was filled without it.
        """
        before = getattr(self.plan, name)
        if before == part:
            return
        if before is not None:
            raise ValueError(
                f"{before} decides on the {name} of the given cache already, so {part} cannot; start from an empty cache"
            )
        if self.get_seq_length():
            raise ValueError(
                f"the given cache holds tokens, and {part} cannot decide on its {name} any more; start from an empty cache"
            )
        decided = dataclasses.replace(self.plan)
        setattr(decided, name, None if part.neutral else part)
        if decided.keys is not None and decided.values is not None and decided.keys.value_keep < 1.0:
            raise ValueError(
                f"value_keep {decided.keys.value_keep} prunes the channels of values, and quantised values are stored in groups "
                "of channels; leave one of the two out"
            )
        setattr(self.plan, name, getattr(decided, name))

    def finalize_prefill(self) -> None:
        """The prompt is whole, and is cut when the next call ends; for one whose length `await_prompt` was not told rightly."""
        self.plan.awaited = self.get_seq_length()

    def await_prompt(self, tokens: int) -> None:
        """Nothing is cut before the cache holds `tokens`: for a prompt that comes in several calls."""
        self.plan.awaited = tokens

    def nbytes(self) -> int:
        """Bytes of memory behind all tensors of the cache, measured; spare room and notes on tokens included."""
        return cache_bytes(self)

    def report(self) -> list[LayerReport]:
        """What each layer holds, and what it would hold with everything whole."""
        return list(self._reports())

    def _reports(self) -> Iterator[LayerReport]:
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
                continue
            tokens = int(layer.get_seq_length())
            if isinstance(layer, CompactCacheLayer):
                assert layer.tail_keys is not None
                assert layer.tail_values is not None
                key, value = layer.tail_keys.buffer, layer.tail_values.buffer
                width = key.shape[-1] if layer.old_keys is None else layer.old_keys.buffer.shape[2]
                dense = tokens * key.shape[0] * key.shape[1] * (key.shape[-1] + value.shape[-1]) * key.element_size()
                yield LayerReport(index, tokens, layer.stored, layer.pruned, width, layer.nbytes(), dense)
            else:
                assert layer.keys is not None
                held = layer_bytes(layer)
                yield LayerReport(index, tokens, layer.keys.shape[-2], 0, layer.keys.shape[-1], held, held)


def compactable(plain: PreTrainedModel, layers: list[Any]) -> list[int]:
    """Which `layers` of a model's ordinary cache can store less. Raises ValueError where none can."""
    name, text = type(plain).__name__, plain.config.get_text_config(decoder=True)
    if plain.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; {WHAT} needs a causal decoder")
    if getattr(text, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"{name} stores a low-rank latent for keys and values (MLA), in which no channels can be pruned"
        )
    modules = attention_modules(plain)
    found = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer and index in modules]
    if modules and not found:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"no layer of {name} has full attention to all tokens (its cache has {', '.join(kinds)}), which {WHAT} needs"
        )
    refuse_unsupported(plain, modules, found, WHAT)
    return found
