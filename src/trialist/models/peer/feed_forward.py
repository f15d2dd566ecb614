"""PEER as a feed-forward of the modular decoder, growth and measures of all PEER layers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trialist.models.configuration import ModularDecoderConfig
from trialist.models.peer.layer import PEER, second_moment


class PEERFeedForward(PEER):
    """`PEER` with the settings `peer` of a configuration; its output starts as large as that of the SwiGLU it replaces."""

    residual_output = None
    recorded_in = "peer"

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        std = config.linear_std
        spread = std * math.sqrt(config.hidden_size)  # of both factors, for input of unit variance
        inner = second_moment("silu", spread) * spread**2 * config.intermediate_size
        last = std / math.sqrt(2 * config.effective_depth)
        super().__init__(config.hidden_size, **config.settings("peer"), output_std=last * math.sqrt(inner))


def peer_layers(model: nn.Module) -> dict[str, PEER]:
    """The PEER layers of a model by name, of the copies that PEFT's `modules_to_save` makes the one that runs.

    Raises ValueError where there is none.
    """
    idle = {module for wrapper in model.modules() for copy in _idle_copies(wrapper) for module in copy.modules()}
    layers = {name: part for name, part in model.named_modules() if isinstance(part, PEER) and part not in idle}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER layer; build one, or call swap_ffn")
    return layers


def _idle_copies(module: nn.Module) -> list[nn.Module]:
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return []
    copies = {None: module.original_module, **dict(module.modules_to_save.items())}
    active = None if module.disable_adapters or not module.active_adapters else module.active_adapters[0]
    return [copy for name, copy in copies.items() if name != (active if active in copies else None)]


def grow_experts(model: nn.Module, new_side: int, generator: torch.Generator | None = None) -> None:
    """`PEER.grow` for every PEER layer of a model, recorded in its configuration, so that it can be saved and loaded.

    Raises ValueError, before anything grows, where some layer is as large already, where layers whose settings are recorded
    together grew apart, and for a model in PEFT, whose files do not hold the size of its base.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("grow before wrapping: grow_experts takes the transformers model, not one with PEFT adapters")
    layers = peer_layers(model)
    for name, layer in layers.items():
        if new_side <= layer.side:
            raise ValueError(f"new_side is {new_side}, but the pool of {name} has side {layer.side} and can only grow")
    recorded: dict[str | None, tuple[str, PEER]] = {}
    for name, layer in layers.items():
        other, first = recorded.setdefault(layer.recorded_in, (name, layer))
        if layer.recorded_in is not None and layer.sides != first.sides:
            raise ValueError(
                f"{other} grew through the sides {first.sides} and {name} through {layer.sides}, but the configuration records "
                "one growth for all layers; grow those of a model by grow_experts only"
            )
    for layer in layers.values():
        layer.grow(new_side, generator)
    config: Any = getattr(model, "config", None)
    for field, (_, layer) in recorded.items():
        grown = {name: layer.settings[name] for name in ("num_experts", "generations")}
        if field == "peer":
            config.peer = {**(config.peer or {}), **grown}
        elif field == "swapped_ffn":
            config.swapped_ffn = {**config.swapped_ffn, "settings": {**config.swapped_ffn["settings"], **grown}}


@torch.no_grad()
def peer_metrics(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor] | Tensor], *, by_call: bool = False
) -> dict[str, dict[str, float]]:
    """How a model's PEER layers use their experts on `batches`, by the layer's name, in evaluation mode.

    With z the weights of every expert summed over heads and tokens (no padding), divided by their sum:
    `usage`: share of experts with z > 0. `unevenness`: KL divergence of z from uniform, in nats, from 0 to log N.
    `effective_experts`: exp of the entropy of z. `top1_usage`: share of experts that are some head's first choice.

    batches: what the model takes: dicts of arguments (labels are left out), or tensors. by_call: a layer that a pass runs
    several times, as in a recurrent core, has an entry for each of its runs, NAME[0], NAME[1] and so on.
    Raises ValueError for no batch, and for a layer that does not run.
    """
    layers = peer_layers(model)
    counts: dict[tuple[str, int], _Counts] = {}
    calls = dict.fromkeys(layers, 0)

    def watched(name: str, retrieve: Any) -> Any:
        def retrieve_and_count(x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            ids, weights = retrieve(x, padding_mask)
            entry = (name, calls[name] if by_call else 0)
            counted = (ids, weights) if padding_mask is None else (ids[padding_mask], weights[padding_mask])
            counts.setdefault(entry, _Counts(layers[name])).add(*counted)
            calls[name] += 1
            return ids, weights

        return retrieve_and_count

    modes = {module: module.training for module in model.modules()}
    model.eval()
    for name, layer in layers.items():
        layer.retrieve = watched(name, layer.retrieve)  # type: ignore[method-assign]
    try:
        for batch in batches:
            calls.update(dict.fromkeys(layers, 0))
            if isinstance(batch, Tensor):
                model(batch)
            else:
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    finally:
        for layer in layers.values():
            del layer.retrieve
        for module, mode in modes.items():
            module.training = mode
    if idle := sorted(set(layers) - {name for name, _ in counts}):
        raise ValueError(f"{idle[0]} did not run; peer_metrics needs batches with tokens")
    names = {(name, call): f"{name}[{call}]" if by_call else name for name, call in counts}
    return {names[entry]: counted.measures(names[entry]) for entry, counted in counts.items()}


class _Counts:
    """What the experts of one layer got: z in float64, and who was a head's first choice."""

    def __init__(self, layer: PEER) -> None:
        self.top_k = layer.top_k
        self.sums = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.first = torch.zeros(layer.num_experts, dtype=torch.bool)

    def add(self, ids: Tensor, weights: Tensor) -> None:
        """Counts tokens: ids and weights, `(..., H, K)`."""
        chosen, shares = (tensor.reshape(-1, self.top_k).cpu() for tensor in (ids, weights))  # (N H, K)
        self.sums.index_add_(0, chosen.flatten(), shares.flatten().double())
        self.first[chosen[:, 0]] = True

    def measures(self, name: str) -> dict[str, float]:
        if not self.sums.sum() > 0:
            raise ValueError(f"no expert of {name} got any weight; peer_metrics needs batches with tokens")
        z = self.sums / self.sums.sum()
        entropy = -torch.special.xlogy(z, z).sum().item()
        return {
            "usage": (z > 0).double().mean().item(),
            "unevenness": math.log(z.numel()) - entropy,
            "effective_experts": math.exp(entropy),
            "top1_usage": self.first.double().mean().item(),
        }
