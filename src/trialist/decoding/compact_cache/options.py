"""Generation with a cache that stores less: fewer channels of keys, fewer bits of values, fewer tokens. The three compose.

`KeyPruning` is ThinK (arXiv 2407.21018), `ValueQuantization` stores values as KIVI does (arXiv 2402.02750), `TokenEviction` cuts
a prompt to a budget of tokens (SnapKV, arXiv 2404.14469; heavy hitters; recency). A prompt is read with whole attention; each
layer is cut right behind it, so no more than one layer is whole at a time beyond what it keeps. The model itself is as before
when `generate` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin

from trialist.decoding.options import Slot, around_loop
from trialist.models.attention_interface import plain_model
from trialist.models.compact_cache.attention import compact_attention
from trialist.models.compact_cache.cache import CompactCache, compactable
from trialist.models.compact_cache.channels import KeyChannels
from trialist.models.compact_cache.tokens import TokenBudget
from trialist.models.compact_cache.values import QuantizedValues

Part = KeyChannels | QuantizedValues | TokenBudget


@dataclass(frozen=True)
class KeyPruning(KeyChannels):
    """Keys of the prompt in the channels that its latest queries use most; `keep=1` is plain generation."""

    slot: ClassVar[Slot] = "cache.keys"

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The cache is `past_key_values` of the output of `return_dict_in_generate`; `report()` and `nbytes()` measure it, and
        the next turn of a conversation may be given it. Raises ValueError for models and arguments that have no such cache."""
        return _with_compact_cache(model, generate_kwargs, "keys", self)


@dataclass(frozen=True)
class ValueQuantization(QuantizedValues):
    """Values of the prompt in 8 or 4 bits; `bits=16` is plain generation."""

    slot: ClassVar[Slot] = "cache.values"

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As of `KeyPruning`."""
        return _with_compact_cache(model, generate_kwargs, "values", self)


@dataclass(frozen=True)
class TokenEviction(TokenBudget):
    """A prompt is cut to `budget` tokens once it was read, and again while the text grows; `budget=None` is plain generation."""

    slot: ClassVar[Slot] = "cache.eviction"

    def prepare(self, model: GenerationMixin, generate_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As of `KeyPruning`. Assisted decoding takes back more than such a cache can, and is refused."""
        assisted = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if _given(generate_kwargs, name)]
        if assisted and not self.neutral:
            raise ValueError(
                f"{assisted[0]} drafts tokens and takes some back, and a cache that gave tokens up cannot always: leave the "
                "budget or the assistant out"
            )
        return _with_compact_cache(model, generate_kwargs, "eviction", self)


def _with_compact_cache(
    model: GenerationMixin, generate_kwargs: Mapping[str, Any], name: str, part: Part
) -> dict[str, Any]:
    if part.neutral:
        return dict(generate_kwargs)
    what = type(part).__name__
    if _given(generate_kwargs, "use_cache") is False:
        raise ValueError(f"{what} is about the cache, and use_cache is False; leave it out")
    implementation = _given(generate_kwargs, "cache_implementation")
    if implementation not in (None, "dynamic"):
        raise ValueError(f"{what} needs its own cache; leave cache_implementation={implementation!r} out")
    plain = plain_model(model)  # type: ignore[arg-type]
    compactable(plain, list(DynamicCache(config=plain.config).layers))
    if generate_kwargs.get("past_key_values") is not None:
        _taken(plain, generate_kwargs["past_key_values"], what)

    def around(loop: Any, model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        cache = _taken(model, kwargs.get("past_key_values"), what)
        cache.own(name, part)
        chunk, mask = kwargs["generation_config"].prefill_chunk_size, kwargs.get("attention_mask")
        whole = input_ids.shape[1] if mask is None else mask.shape[1]
        cache.await_prompt(whole if chunk else 0)
        with compact_attention(model):
            return loop(model, input_ids, **{**kwargs, "past_key_values": cache})

    return around_loop(generate_kwargs, around)


def _given(generate_kwargs: Mapping[str, Any], name: str) -> Any:
    """An argument of `generate`, or what its configuration says."""
    if generate_kwargs.get(name) is not None:
        return generate_kwargs[name]
    return getattr(generate_kwargs.get("generation_config"), name, None)


def _taken(model: Any, cache: Cache | None, what: str) -> CompactCache:
    """The cache itself, or a compact one in the place of an ordinary one that is empty."""
    if isinstance(cache, CompactCache):
        return cache
    if cache is None or type(cache) is not DynamicCache or cache.offloading:
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise ValueError(f"{what} stands in for a plain DynamicCache on the model's device, and here is {kind}")
    if cache.get_seq_length():
        raise ValueError(
            f"{what} cannot tell what of the {cache.get_seq_length()} tokens in the given cache is worth keeping; start from "
            "an empty cache, or go on with one that was filled under the same options"
        )
    return CompactCache(model)
