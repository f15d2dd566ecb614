"""The swap of eviction into existing models of transformers, through their attention interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

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
from trialist.models.eviction.cache import EvictingCacheLayer
from trialist.models.eviction.policies import POLICIES, Attend, Policy, attend_evicting
from trialist.models.selective_attention.cache import take_over


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    standard: Attend,
    scaling: float,
    layer: EvictingCacheLayer | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    policy, budget = module._evicts, module.budget
    return attend_evicting(
        standard, query, key, attention_mask, scaling=scaling, policy=policy, budget=budget, layer=layer
    )  # type: ignore[arg-type]


def _evicts(module: nn.Module) -> bool:
    return getattr(module, "_evicts", None) is not None and module.budget is not None


register_replacement("evicting", _attend, replaced=_evicts, what="eviction", lost="nothing could be evicted from it")


def _layer_of(module: nn.Module, cache: Cache) -> EvictingCacheLayer | None:
    if module.budget is None:
        return None
    return take_over(cache, int(module.layer_idx), EvictingCacheLayer, None, "eviction")  # type: ignore[arg-type]


def enable_eviction(
    model: PreTrainedModel,
    policy: str | Policy = "h2o",
    budgets: Budgets = None,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Let the cache of `layers` (None is all) hold at most `budgets` tokens, in place; returns the model.

    Works for decoders that use the attention interface of transformers. Nothing is trained or added. With a policy given
    by name the settings are written to `model.config.eviction`, so `trialist.models.load_model` enables them again.

    policy: `recency` (option `sinks`), `h2o` (option `recent_share`), or a `trialist.models.eviction.policies.Policy`.
    budgets: tokens a layer keeps, one number or one a layer of `layers`, in order; None keeps all, which is exactly the
        full cache.

    Raises ValueError for unknown policies and options, and for models and layers whose attention cannot be replaced.
    """
    plain = plain_model(model)
    if any(hasattr(module, "_evicts") for module in plain.modules()):
        raise ValueError("eviction is enabled already; call disable_eviction first")
    modules = attention_modules(plain)
    chosen = sorted(modules if layers is None else layers)
    refuse_unsupported(plain, modules, chosen, "eviction")
    base = plain.config._attn_implementation
    if base not in BASES:
        raise ValueError(
            f"the model runs attn_implementation={base!r}; load it with 'sdpa' or 'eager'. A model with selective attention "
            "evicts by itself: give its budgets to enable_selective_attention or set_budgets"
        )
    chosen_policy = _policy(policy, options)
    spread = spread_budgets(budgets, len(chosen))
    for budget in spread:
        if budget is not None:
            chosen_policy.check(budget)
    for layer, budget in zip(chosen, spread, strict=True):
        modules[layer]._evicts, modules[layer].budget = chosen_policy, budget  # type: ignore[assignment]
    hand_over_cache([modules[layer] for layer in chosen], _layer_of)
    plain.set_attn_implementation(f"evicting_{base}")
    if isinstance(policy, str):
        settings = dataclasses.asdict(chosen_policy)  # type: ignore[call-overload]
        plain.config.eviction = {"policy": policy, "budgets": spread, "layers": chosen, **settings}
    return model


def _policy(policy: str | Policy, options: dict[str, Any]) -> Policy:
    if not isinstance(policy, str):
        if options:
            raise ValueError(
                f"{', '.join(options)}: options go with the name of a policy; give them to the object instead"
            )
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    known = [field.name for field in dataclasses.fields(POLICIES[policy])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"policy {policy!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return POLICIES[policy](**options)


def disable_eviction(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable_eviction`: the model keeps everything again, bit for bit as before. Returns the model."""
    plain = plain_model(model)
    modules = [module for module in plain.modules() if hasattr(module, "_evicts")]
    restore_attention(plain, "evicting", "eviction", modules)
    for module in modules:
        del module._evicts, module.budget
    return model
