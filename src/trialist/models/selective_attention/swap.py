"""The swap of selective attention (arXiv 2410.02703) into existing models of transformers.

A registered attention function computes the chosen layers selectively; a hook hands it the cache layer that holds F,
which the attention interface of transformers does not pass on.

B batch, T queries, S columns, H query heads, G key/value heads, D head width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trialist.models.attention_interface import (
    BASES,
    attention_modules,
    hand_over_cache,
    plain_model,
    refuse_unsupported,
    register_replacement,
    restore_attention,
)
from trialist.models.eviction.budgets import Budgets, spread_budgets
from trialist.models.eviction.policies import Eviction
from trialist.models.masks import first_tokens, visible_columns
from trialist.models.selective_attention.cache import selective_layer
from trialist.models.selective_attention.mixer import PENALTY, CacheLayer, attend_selectively


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    standard: object,
    scaling: float,
    layer: CacheLayer | None,
    dropout: float,
) -> tuple[Tensor, None]:
    output = attend_selectively(
        query, key, value, attention_mask, scaling=scaling, **module._selective, layer=layer,
        budget=module.eviction.budget, policy=module.eviction.policy, memory=module.memory_record, dropout=dropout,
        training=module.training,
    )  # type: ignore[arg-type]  # fmt: skip
    return output, None


def _selects(module: nn.Module, layer: object = None) -> bool:
    return getattr(module, "_selective", None) is not None


def _probe_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Standard attention that notes, per head, how much that head would select."""
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    (B, H, T, _), G, S = query.shape, key.shape[1], key.shape[2]
    logits = (query @ key.repeat_interleave(H // G, 1).transpose(-1, -2) * scaling).float()
    earlier = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T - 1)
    if attention_mask is not None:
        earlier = earlier & visible_columns(attention_mask)
    earlier = earlier & ~first_tokens(attention_mask, B, S, query.device)[:, None, None]  # (B, 1, T, S)
    selected = logits.relu().masked_fill(~earlier, 0.0).sum((0, 2, 3))
    module._selection_by_head = selected / earlier.sum().clamp(min=1)  # (H,)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


register_replacement(
    "selective", _attend, replaced=_selects, what="selective attention", lost="what the past selected is unknown"
)
AttentionInterface.register("selective_probe", _probe_forward)
AttentionMaskInterface.register("selective_probe", sdpa_mask)


def _layer_of(module: nn.Module, cache: Cache) -> CacheLayer:
    return selective_layer(cache, module.layer_idx)


def enable_selective_attention(
    model: PreTrainedModel,
    selector_head: int | Literal["auto"] | Sequence[int] = 0,
    protect_bos: bool = True,
    layers: Sequence[int] | None = None,
    *,
    inputs: Tensor | None = None,
    budgets: Budgets = None,
) -> PreTrainedModel:
    """Replace the attention of `layers` (None is all) by selective attention, in place; returns the model.

    Works for decoders that use the attention interface of transformers, also wrapped by PEFT. No parameter is added.
    The settings are written to `model.config.selective_attention`, so `trialist.models.load_model` enables them again
    in a saved model. `layers=[]` leaves the model untouched.

    selector_head: a head for all layers, or one a layer of `layers`; "auto" takes, in each layer, the head that would
        select least on `inputs` (token ids `(B, T)`), the gentlest start for a pretrained model.
    protect_bos: never hide the first real token.
    budgets: how many tokens a layer keeps, one number or one a layer of `layers`; None keeps all. See
        `trialist.models.selective_attention.eviction`, and `calibrate_budgets` for good ones.

    Raises ValueError for encoders, cross attention, sliding windows, soft-capped logits, attention sinks and heads or
    layers that do not exist. A pretrained model gets worse at first: its heads were not trained to select.
    """
    plain = plain_model(model)
    if is_selective(plain):
        raise ValueError("selective attention is enabled already; call disable_selective_attention first")
    if plain.config.is_encoder_decoder:
        raise ValueError(f"{type(plain).__name__} is an encoder-decoder; selective attention needs a causal decoder")
    modules = attention_modules(plain)
    chosen = sorted(modules) if layers is None else list(layers)
    if layers is not None and not chosen:
        return model
    refuse_unsupported(plain, modules, chosen, "selective attention")
    base = plain.config._attn_implementation
    if base not in BASES:
        raise ValueError(f"the model runs attn_implementation={base!r}; load it with 'sdpa' or 'eager'")
    heads = _heads(plain, modules, chosen, selector_head, inputs)
    spread = spread_budgets(budgets, len(chosen))
    for layer, head, budget in zip(chosen, heads, spread, strict=True):
        modules[layer]._selective = {"selector_head": head, "protect_bos": protect_bos}
        modules[layer].eviction, modules[layer].memory_record = Eviction(PENALTY, budget), None
    hand_over_cache([modules[layer] for layer in chosen], "selective", "selective attention", _layer_of)
    plain.set_attn_implementation(f"selective_{base}")
    plain.config.selective_attention = {
        "selector_head": heads,
        "protect_bos": protect_bos,
        "layers": chosen,
        "budgets": spread,
    }
    return model


def _heads(
    model: PreTrainedModel,
    modules: dict[int, nn.Module],
    layers: Sequence[int],
    selector_head: int | str | Sequence[int],
    inputs: Tensor | None,
) -> list[int]:
    if selector_head == "auto":
        if inputs is None:
            raise ValueError('selector_head="auto" measures the heads on a text: pass token ids as inputs=')
        return _gentlest_heads(model, modules, layers, inputs)
    if isinstance(selector_head, str):
        raise ValueError(f'selector_head is {selector_head!r}; give a head, one head a layer, or "auto"')
    heads = [selector_head] * len(layers) if isinstance(selector_head, int) else list(selector_head)
    if len(heads) != len(layers):
        raise ValueError(f"selector_head names {len(heads)} heads for {len(layers)} layers; give one a layer")
    available = model.config.get_text_config(decoder=True).num_attention_heads
    wrong = [head for head in heads if not 0 <= head < available]
    if wrong:
        raise ValueError(f"selector_head {wrong[0]} does not exist: the model has heads 0 to {available - 1}")
    return heads


def _gentlest_heads(
    model: PreTrainedModel, modules: dict[int, nn.Module], layers: Sequence[int], inputs: Tensor
) -> list[int]:
    base, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("selective_probe")
    try:
        with torch.no_grad():
            model.eval()(input_ids=inputs, use_cache=False)
        return [int(modules[layer]._selection_by_head.argmin()) for layer in layers]
    finally:
        model.set_attn_implementation(base)
        model.train(training)
        for module in modules.values():
            module.__dict__.pop("_selection_by_head", None)
            module._buffers.pop("_selection_by_head", None)


def is_selective(model: nn.Module) -> bool:
    """Whether selective attention is enabled in some layer of an existing model."""
    return next(_selective_modules(model), None) is not None


def _selective_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _selects(module))


def disable_selective_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable_selective_attention`: the model computes exactly what it computed before. Returns the model.

    Raises ValueError where `enable_eviction` gave the layers another policy: that is undone first.
    """
    plain = plain_model(model)
    modules = list(_selective_modules(plain))
    if any(module.eviction.given for module in modules):
        raise ValueError("eviction was enabled on top of selective attention; call disable_eviction first")
    restore_attention(plain, "selective", modules)
    for module in modules:
        del module._selective, module.eviction, module.memory_record
    if hasattr(plain.config, "selective_attention"):
        del plain.config.selective_attention
    return model
