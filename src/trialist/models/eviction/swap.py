"""The swap of eviction into existing models of transformers, through their attention interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from trialist.models.attention_interface import (
    BASES,
    attention_modules,
    hand_over_cache,
    plain_model,
    refuse_unsupported,
    register_replacement,
    restore_attention,
)
from trialist.models.eviction.attention import Attend, attend_evicting, attend_evicting_uncompiled
from trialist.models.eviction.budgets import Budgets, spread_budgets
from trialist.models.eviction.cache import EvictingCacheLayer, refuse_static, take_over
from trialist.models.eviction.policies import POLICIES, Eviction, Policy, evicting_modules


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    standard: Attend,
    scaling: float,
    layer: EvictingCacheLayer | StaticLayer | None,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, StaticLayer):  # the budget holds all of it
        return standard(attention_mask)
    policy, budget = module.eviction.policy, module.eviction.budget  # type: ignore[union-attr]
    attend = attend_evicting if layer is None else attend_evicting_uncompiled
    return attend(standard, query, key, attention_mask, scaling=scaling, policy=policy, budget=budget, layer=layer)  # type: ignore[arg-type]


def _evicts(module: nn.Module, layer: CacheLayerMixin | None) -> bool:
    settings = getattr(module, "eviction", None)
    return isinstance(settings, Eviction) and (settings.budget is not None or isinstance(layer, EvictingCacheLayer))


register_replacement("evicting", _attend, replaced=_evicts, what="eviction", lost="nothing could be evicted from it")


def _layer_of(module: nn.Module, cache: Cache) -> CacheLayerMixin | None:
    """The layer that evicts, a static one that has room, or None where everything is kept and always was."""
    index, budget = int(module.layer_idx), module.eviction.budget  # type: ignore[arg-type, union-attr]
    if budget is None:
        layer = cache.layers[index] if index < len(cache.layers) else None
    else:
        layer = take_over(cache, index, EvictingCacheLayer, StaticLayer, "eviction")
    if isinstance(layer, EvictingCacheLayer):
        layer.expect()
        return layer
    if budget is None:
        return None
    assert isinstance(layer, StaticLayer)
    refuse_static(budget, layer.max_cache_len)
    return layer


def enable_eviction(
    model: PreTrainedModel,
    policy: str | Policy = "h2o",
    budgets: Budgets = None,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Let the cache of `layers` (None is all) hold at most `budgets` tokens, in place; returns the model.

    Works for decoders that use the attention interface of transformers, also wrapped by PEFT, and for the modular decoder. A
    layer with selective attention goes on selecting, and `policy` decides in the place of its penalty what is evicted. Nothing
    is trained or added. With a policy given by name the settings are written to `model.config.eviction`, so
    `trialist.models.load_model` enables them again. `layers=[]` leaves the model untouched.

    policy: `recency` (option `sinks`), `h2o` (option `recent_share`), or a `trialist.models.eviction.policies.Policy`.
    budgets: tokens a layer keeps, one number or one a layer of `layers`, in order; None keeps all, which is exactly the
        full cache.

    Raises ValueError for unknown policies and options, and for models and layers whose attention cannot be replaced.
    """
    plain = plain_model(model)
    selecting = {module.layer_idx: module for module in evicting_modules(plain)}
    if any(module.eviction.given for module in selecting.values()):
        raise ValueError("eviction is enabled already; call disable_eviction first")
    if layers is not None and not len(layers):
        return model
    base = plain.config._attn_implementation
    modules = {**attention_modules(plain), **selecting}
    chosen = list(layers) if layers is not None else sorted(modules if base in BASES else selecting or modules)
    refuse_unsupported(plain, modules, chosen, "eviction")
    standard = [layer for layer in chosen if layer not in selecting]
    if standard and base not in BASES:
        advice = f"pass layers={sorted(selecting)}" if selecting else "load it with 'sdpa' or 'eager'"
        raise ValueError(
            f"the model runs attn_implementation={base!r}, so eviction cannot stand beside the standard attention of layers "
            f"{standard}; {advice}"
        )
    chosen_policy = _policy(policy, options)
    spread = spread_budgets(budgets, len(chosen))
    for budget in spread:
        if budget is not None:
            chosen_policy.check(budget)
    for layer, budget in zip(chosen, spread, strict=True):
        replaced = modules[layer].eviction if layer in selecting else None
        modules[layer].eviction = Eviction(chosen_policy, budget, given=True, replaced=replaced)  # type: ignore[assignment]
    if standard:
        hand_over_cache([modules[layer] for layer in standard], "evicting", "eviction", _layer_of)
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
    """Undo `enable_eviction`, in place: standard layers keep everything again, selective ones evict by their penalty, under the
    budgets they had; bit for bit as before. Returns the model.

    A cache from which tokens were evicted belongs to the policy that did so: standard layers refuse it.
    """
    plain = plain_model(model)
    given = [module for module in evicting_modules(plain) if module.eviction.given]
    standard = [module for module in given if module.eviction.replaced is None]
    restore_attention(plain, "evicting", standard)
    for module in given:
        module.eviction = module.eviction.replaced
    for module in standard:
        del module.eviction
    if hasattr(plain.config, "eviction"):
        del plain.config.eviction
    return model
