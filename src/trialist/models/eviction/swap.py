"""The swap of eviction into existing models of transformers, through their attention interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from trialist.models.attention_interface import (
    BASES,
    attention_modules,
    cache_among,
    plain_model,
    refuse_arguments,
    refuse_unsupported,
    standard_attention,
)
from trialist.models.eviction.budgets import Budgets, spread_budgets
from trialist.models.eviction.cache import EvictingCacheLayer
from trialist.models.eviction.policies import POLICIES, Policy, attend_evicting
from trialist.models.selective_attention.cache import take_over


def _evicting_forward(base: str) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        evicting_cache: EvictingCacheLayer | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        standard, policy, budget = standard_attention(base, module), getattr(module, "_evicts", None), None
        if policy is not None:
            budget = module.budget

        def attend(mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return standard(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)

        if policy is None or budget is None:
            return attend(attention_mask)
        if evicting_cache is None and key.shape[2] > query.shape[2]:
            raise ValueError(
                f"{type(module).__name__} was given cached keys without the cache object, so nothing could be evicted from "
                "it; pass past_key_values=DynamicCache()"
            )
        refuse_arguments(module, kwargs, "eviction")
        return attend_evicting(
            attend,
            query,
            key,
            attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            policy=policy,
            budget=budget,
            layer=evicting_cache,
        )

    return forward


for _base, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"evicting_{_base}", _evicting_forward(_base))
    AttentionMaskInterface.register(f"evicting_{_base}", _mask)


def _hand_over_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives the attention function, which sees no cache, the cache layer to evict from."""
    cache = cache_among(args, kwargs)
    if cache is None or module.budget is None:
        return args, kwargs
    layer = take_over(cache, int(module.layer_idx), EvictingCacheLayer, None, "eviction")  # type: ignore[arg-type]
    return args, {**kwargs, "evicting_cache": layer}


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
        modules[layer].register_forward_pre_hook(_hand_over_cache, with_kwargs=True)
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
    for module in plain.modules():
        if not hasattr(module, "_evicts"):
            continue
        del module._evicts, module.budget
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _hand_over_cache:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    base = plain.config._attn_implementation or ""
    if base.startswith("evicting_"):
        plain.set_attn_implementation(base.removeprefix("evicting_"))
        if hasattr(plain.config, "eviction"):
            del plain.config.eviction
    return model
