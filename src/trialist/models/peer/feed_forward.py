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

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        spread = config.initializer_range * math.sqrt(config.hidden_size)  # of both factors, for input of unit variance
        inner = second_moment("silu", spread) * spread**2 * config.intermediate_size
        last = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        super().__init__(config.hidden_size, **config.settings("peer"), output_std=last * math.sqrt(inner))


def peer_layers(model: nn.Module) -> dict[str, PEER]:
    """The PEER layers of a model by name; ValueError where there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PEER)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEER layer; build one, or call swap_ffn")
    return layers


def grow_experts(model: nn.Module, new_side: int, generator: torch.Generator | None = None) -> None:
    """`PEER.grow` for every PEER layer of a model, recorded in its configuration, so that it can be saved and loaded.

    Raises ValueError, before anything grows, where some layer is as large already.
    """
    layers = peer_layers(model)
    for name, layer in layers.items():
        if new_side <= layer.side:
            raise ValueError(f"new_side is {new_side}, but the pool of {name} has side {layer.side} and can only grow")
    for layer in layers.values():
        layer.grow(new_side, generator)
    grown = {name: layer.settings[name] for name in ("num_experts", "generations")}
    config: Any = getattr(model, "config", None)
    if getattr(config, "peer", None) is not None:
        config.peer = {**config.peer, **grown}
    if getattr(config, "swapped_ffn", None) is not None:
        swapped = config.swapped_ffn
        config.swapped_ffn = {**swapped, "settings": {**swapped["settings"], **grown}}


@torch.no_grad()
def peer_metrics(model: nn.Module, batches: Iterable[Mapping[str, Tensor] | Tensor]) -> dict[str, dict[str, float]]:
    """How a model's PEER layers use their experts on `batches`, by the layer's name, in evaluation mode.

    With z the weights of every expert summed over heads and tokens (no padding), divided by their sum:
    `usage`: share of experts with z > 0. `unevenness`: KL divergence of z from uniform, in nats, from 0 to log N.
    `effective_experts`: exp of the entropy of z. `top1_usage`: share of experts that are some head's first choice.

    batches: what the model takes: dicts of arguments (labels are left out), or tensors. Raises ValueError for none.
    """
    layers = peer_layers(model)
    sums = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}
    first = {name: torch.zeros(layer.num_experts, dtype=torch.bool) for name, layer in layers.items()}

    def watched(name: str, retrieve: Any) -> Any:
        def retrieve_and_count(x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            ids, weights = retrieve(x, padding_mask)
            counted = (ids, weights) if padding_mask is None else (ids[padding_mask], weights[padding_mask])
            chosen, shares = (tensor.reshape(-1, layers[name].top_k).cpu() for tensor in counted)  # (N H, K)
            sums[name].index_add_(0, chosen.flatten(), shares.flatten().double())
            first[name][chosen[:, 0]] = True
            return ids, weights

        return retrieve_and_count

    modes = {module: module.training for module in model.modules()}
    model.eval()
    for name, layer in layers.items():
        layer.retrieve = watched(name, layer.retrieve)  # type: ignore[method-assign]
    try:
        for batch in batches:
            if isinstance(batch, Tensor):
                model(batch)
            else:
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    finally:
        for layer in layers.values():
            del layer.retrieve
        for module, mode in modes.items():
            module.training = mode
    return {name: _measures(sums[name], first[name], name) for name in layers}


def _measures(sums: Tensor, first: Tensor, name: str) -> dict[str, float]:
    if not sums.sum() > 0:
        raise ValueError(f"no expert of {name} got any weight; peer_metrics needs batches with tokens")
    z = sums / sums.sum()
    entropy = -torch.special.xlogy(z, z).sum().item()
    return {
        "usage": (z > 0).double().mean().item(),
        "unevenness": math.log(z.numel()) - entropy,
        "effective_experts": math.exp(entropy),
        "top1_usage": first.double().mean().item(),
    }
