"""The cache of recurrent depth: a flat list of standard cache layers, one per (slot, core layer) instead of one per layer.

Layers stand in the order in which a token passes them: the prelude's, then for each slot the core's, then the coda's. Step i
of the core reads and writes slot i mod slots. With as many slots as steps every step meets what the same step left for
earlier tokens, as in a pass over the whole sequence. With fewer, a step meets the latest of the steps that share its slot.

B batch, G key/value heads, S cached tokens, T new tokens, D head width
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from trialist.models.recurrent_depth.settings import layer_counts, settings_of

if TYPE_CHECKING:
    from trialist.models.configuration import ModularDecoderConfig


class RecurrentDepthCache(Cache):
    """`prelude + slots * core + coda` cache layers; the kind of each is that of its `layer_type`.

    Because the layers are standard ones, crop, reordering, repetition and offloading work as for any cache. `generate` and
    `forward` turn an empty cache of transformers into this one, in place.

    num_steps: None is the configuration's. kv_slots: None is one slot for every step.
    """

    num_steps: Tensor | None
    """Steps that each cached token ran, (B, S); 0 at padding"""
    last_state: Tensor | None
    """Final state of the latest token (B, 1, d), kept for a warm start"""
    offset: Tensor | None
    """Position id of each row's first real token, (B, 1)"""

    def __init__(self, config: ModularDecoderConfig, num_steps: int | None = None, kv_slots: int | None = None) -> None:
        settings = settings_of(config, {"num_steps": num_steps, "kv_slots": kv_slots})
        super().__init__(layers=[])
        self._arrange(config, settings.kv_slots or settings.steps, exact=settings.kv_slots is None)

    def _arrange(self, config: ModularDecoderConfig, slots: int, exact: bool) -> None:
        # empty layers: those of the cache that is turned into this one, or those that the configuration names
        given: list[Any] = self.layers or DynamicCache(config=config).layers  # type: ignore[has-type]
        self.prelude_layers, self.core_layers, self.coda_layers = layer_counts(config)
        core = range(self.prelude_layers, self.prelude_layers + self.core_layers)
        order = [*range(core.start), *(index for _ in range(slots) for index in core)]
        order += range(core.stop, core.stop + self.coda_layers)
        self.layers = [copy.deepcopy(given[index]) for index in order]
        self.layer_class_to_replicate = None
        self.slots, self.exact = slots, exact
        self.num_steps = self.last_state = self.offset = None

    @staticmethod
    def upgrade(cache: Cache, config: ModularDecoderConfig, steps: int, kv_slots: int | None) -> RecurrentDepthCache:
        """`cache` with the layers of recurrent depth, in place, if it has not got them yet.

        Raises ValueError for a cache that holds tokens already and has no layers, or not the slots, that the call needs.
        """
        if not isinstance(cache, RecurrentDepthCache):
            if len(cache.layers) and int(cache.get_seq_length()) > 0:
                raise ValueError(
                    f"the given {type(cache).__name__} holds tokens but no layers for the steps of recurrent depth; start "
                    "from an empty cache"
                )
            # in place, because the caller goes on with the object that was given
            cache.__class__ = _recurrent(type(cache))  # type: ignore[arg-type]
            cache._arrange(config, kv_slots or steps, exact=kv_slots is None)  # type: ignore[attr-defined]
        assert isinstance(cache, RecurrentDepthCache)
        slots = kv_slots or steps
        if (kv_slots is None) == cache.exact and (slots == cache.slots or (cache.exact and slots < cache.slots)):
            return cache
        if int(cache.get_seq_length()) > 0:
            held = f"{cache.slots} steps" if cache.exact else f"kv_slots={cache.slots}"
            fewer = " (fewer steps may follow more)" if cache.exact and cache._core_is(DynamicLayer) else ""
            raise ValueError(
                f"the cache was filled with {held} and the call says num_steps={steps}, kv_slots={kv_slots}; its tokens have no "
                f"keys where that would look. Go on with the same numbers{fewer}, or start from an empty cache"
            )
        coda = len(cache.layers) - cache.coda_layers
        cache.layers = [*cache.layers[: cache.prelude_layers + cache.core_layers], *cache.layers[coda:]]
        cache._arrange(config, slots, exact=kv_slots is None)
        return cache

    def view(self, step: int) -> SlotView:
        """The cache as the layers of the model see it during `step`: one layer for each of theirs."""
        first = self.prelude_layers + (step % self.slots) * self.core_layers
        coda = len(self.layers) - self.coda_layers
        indices = [*range(self.prelude_layers), *range(first, first + self.core_layers), *range(coda, len(self.layers))]
        return SlotView(self, indices)

    def of_layer(self, index: int) -> list[Any]:
        """The cache layers of one layer of the model, of all slots."""
        if index < self.prelude_layers:
            return [self.layers[index]]
        if index >= self.prelude_layers + self.core_layers:
            return [self.layers[index + (self.slots - 1) * self.core_layers]]
        return [self.layers[index + slot * self.core_layers] for slot in range(self.slots)]

    def _core_is(self, *kinds: type) -> bool:
        return all(type(layer) in kinds for layer in self._core(0))

    def _core(self, step: int) -> list[Any]:
        """The layers of the core in the slot of `step`."""
        return self.view(step).layers[self.prelude_layers : self.prelude_layers + self.core_layers]

    def require(self, steps: int) -> None:
        """Raises ValueError, before anything is written, where the core's layers cannot do what a pass of `steps` steps needs:
        take a token back out of a slot that steps share, or stand in for the steps that are left out."""
        for layer in self._core(0):
            kind = type(layer)
            if steps > self.slots and kind is not StaticLayer and not getattr(layer, "is_croppable", False):
                raise ValueError(
                    f"kv_slots: {kind.__name__} cannot take a token back, so steps cannot share a slot; leave kv_slots None, "
                    "which keeps every step's"
                )
            if steps < self.slots and kind is not DynamicLayer:
                raise ValueError(
                    f"the cache has slots for {self.slots} steps and {steps} are to be run; a {kind.__name__} cannot stand in "
                    f"for the others: give num_steps={self.slots}, or start from an empty cache"
                )

    def take_back(self, step: int, tokens: int) -> None:
        """Removes the latest tokens from the slot of `step`, which is about to write them anew."""
        for layer in self._core(step):
            if type(layer) is StaticLayer:
                layer.cumulative_length.sub_(tokens)
            else:
                layer.crop(-tokens)

    def fill(self, done: int, tokens: int) -> None:
        """Gives the latest tokens, which ran `done` steps, their last keys and values in the slots of all later steps."""
        for j, layer in enumerate(self._core(done - 1), start=self.prelude_layers):
            keys, values = layer.keys[..., -tokens:, :], layer.values[..., -tokens:, :]
            for step in range(done, self.slots):
                self.view(step).update(keys, values, j)

    def note(self, num_steps: Tensor, last_state: Tensor | None) -> None:
        """Keeps what a call ran: steps of its tokens (B, T), and the state a warm start goes on from."""
        self.num_steps = num_steps if self.num_steps is None else torch.cat([self.num_steps, num_steps], 1)
        self.last_state = last_state

    def _map(self, function: Any) -> None:
        for name in ("num_steps", "last_state", "offset"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, function(value))

    def crop(self, tokens_to_remove: int) -> None:
        before = int(self.get_seq_length())
        super().crop(tokens_to_remove)
        after = int(self.get_seq_length())
        if after < before:
            self.last_state = None  # that of an earlier token is not kept
            if self.num_steps is not None:
                self.num_steps = self.num_steps[:, :after]

    def reset(self) -> None:
        super().reset()
        self.num_steps = self.last_state = self.offset = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda value: value[indices])


@functools.cache
def _recurrent(kind: type[Cache]) -> type[RecurrentDepthCache]:
    """The class of a cache of `kind` that was turned into one of recurrent depth: it still is one of `kind`."""
    return type(f"RecurrentDepth{kind.__name__}", (RecurrentDepthCache, kind), {})


class _Layers(Sequence[Any]):
    """Chosen layers of a cache; what is put in the place of one stands in the cache itself."""

    def __init__(self, cache: RecurrentDepthCache, indices: list[int]) -> None:
        self.cache, self.indices = cache, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        chosen = self.indices[place]
        return [self.cache.layers[index] for index in chosen] if isinstance(place, slice) else self.cache.layers[chosen]

    def __setitem__(self, place: int, layer: Any) -> None:
        self.cache.layers[self.indices[place]] = layer


class SlotView(Cache):
    """The layers of a `RecurrentDepthCache` that one step uses, at the indices that the model's layers have."""

    def __init__(self, cache: RecurrentDepthCache, indices: list[int]) -> None:
        super().__init__(layers=_Layers(cache, indices))  # type: ignore[arg-type]
        self.cache, self.indices = cache, indices

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.cache.offloading:  # the next layer was fetched ahead, but a slot may be another one
            self.layers[layer_idx].prefetch()
        return self.cache.update(key_states, value_states, self.indices[layer_idx], *args, **kwargs)
