"""Selective attention (arXiv 2410.02703): one existing head decides which earlier tokens all heads may forget.

    S[i, j] = relu(l[sel][i, j])  for j < i, 0 for a protected first token        l[h] = q[h] k[h]^T / sqrt(D), causal
    F[i, j] = sum over m < i of S[m, j]                                           a query does not see its own selection
    out[h]  = softmax(l[h] - F) v[h]                                              for all heads, the selector included

It has no parameters; gradients reach the selector's query and key through F. The formula is computed by
`trialist.kernels.selective`; here are the mixer of the modular decoder, and the swap for existing models.

Departures: "the first token" is the first token that is not padding, in packed rows that of each document. With grouped
keys the selector uses the key/value head of its group. No official code exists to compare with.

B batch, T queries, S columns, H query heads, G key/value heads, D head width
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trialist.kernels.selective import selective_attention
from trialist.models.attention import FullAttention
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.selective_cache import SelectiveCacheLayer, StaticSelectiveCacheLayer, selective_layer

CacheLayer = SelectiveCacheLayer | StaticSelectiveCacheLayer


def first_tokens(attention_mask: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    """Bool `(B, S)`: the first column that some query sees, which is the first real token of a row or of a document.

    attention_mask: bool or additive `(B | 1, H | 1, T, S)`; None is causal without padding, its first token column 0.
    """
    if attention_mask is None:
        first = torch.zeros(batch, columns, dtype=torch.bool, device=device)
        first[:, 0] = True
        return first
    seen = _seen(attention_mask)[:, 0]  # (B, T, S)
    sees, column = seen.max(-1)  # the first maximum: the first visible column
    marks = torch.zeros(seen.shape[0], columns, dtype=torch.int32, device=device)
    return marks.scatter_reduce_(1, column, sees.int(), "amax").bool().expand(batch, columns)


def _seen(attention_mask: Tensor) -> Tensor:
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def _silence_padding(attention_mask: Tensor, own: Tensor) -> Tensor:
    """The mask without the rows of padding queries, which do not see themselves; they must select nothing.

    own: columns `(T,)` of the queries.
    """
    index = own.view(1, 1, -1, 1).expand(*attention_mask.shape[:3], 1)
    if attention_mask.dtype == torch.bool:
        return attention_mask & attention_mask.gather(-1, index)
    return attention_mask.masked_fill(~_seen(attention_mask.gather(-1, index)), torch.finfo(attention_mask.dtype).min)


def attend_selectively(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    selector_head: int = 0,
    protect_bos: bool = True,
    layer: CacheLayer | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Output `(B, T, H, D)` of selective attention; with `layer`, F continues from earlier calls and is stored back.

    query `(B, H, T, D)`; key, value `(B, G, S, D)` as the cache returned them; attention_mask as transformers builds
    it.
    """
    (B, H, T, _), S, device = query.shape, key.shape[2], query.device
    own = torch.arange(S - T, S, device=device)
    if isinstance(layer, StaticSelectiveCacheLayer):
        if T == 1:
            own = layer.cumulative_length - 1 + torch.arange(1, device=device)
        else:  # the prompt: the columns behind it are empty, and without them the queries are the last columns again
            S = int(layer.cumulative_length)
            own = torch.arange(S - T, S, device=device)
            key, value = key[:, :, :S], value[:, :, :S]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :S]
        if layer is not None:
            attention_mask = _silence_padding(attention_mask, own)
    if protect_bos:
        protect = first_tokens(attention_mask, B, S, device)
    else:
        protect = torch.zeros(B, S, dtype=torch.bool, device=device)
    call = functools.partial(
        selective_attention, scaling=scaling, selector_head=selector_head, dropout=dropout, training=training
    )
    if layer is None:
        return call(query, key, value, attention_mask, protect=protect)[0]

    if isinstance(layer, StaticSelectiveCacheLayer):
        assert layer.penalty is not None
        if T == 1:  # the query's own column is not the last one here
            protect = protect.index_fill(1, own, True)
        output, penalty = call(query, key, value, attention_mask, protect=protect, penalty=layer.penalty[:, :S])
        layer.penalty[:, :S] = penalty
        return output

    before = layer.penalty
    output, penalty = call(query, key, value, attention_mask, protect=protect, penalty=before)
    group = selector_head * key.shape[1] // H
    selector = query[:, selector_head : selector_head + 1].clone()  # (B, 1, T, D), not a view that keeps all heads
    layer.store(
        penalty,
        functools.partial(_reselect, layer, selector, group, attention_mask, protect, before, scaling, selector_head),
        T,
    )
    return output


def _reselect(
    layer: SelectiveCacheLayer,
    selector: Tensor,
    group: int,
    attention_mask: Tensor | None,
    protect: Tensor,
    before: Tensor | None,
    scaling: float,
    selector_head: int,
    queries: int,
) -> Tensor:
    """F `(B, S')` after the first `queries` of a call, recomputed from its selector head alone."""
    S = protect.shape[1] - selector.shape[2] + queries
    keys = layer.keys[:, group : group + 1, :S]  # type: ignore[index]
    if attention_mask is not None:
        head = min(selector_head, attention_mask.shape[1] - 1)
        attention_mask = attention_mask[:, head : head + 1, :queries, :S]
    return selective_attention(
        selector[:, :, :queries],
        keys,
        keys,
        attention_mask,
        scaling=scaling,
        protect=protect[:, :S],
        penalty=None if before is None else before[:, :S],
    )[1]


class SelectiveAttention(FullAttention):
    """The mixer `selective_attention` of the modular decoder: the projections of full attention, no further
    parameter."""

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        settings = config.selective or {}
        self.selector_head = settings.get("selector_head", 0)
        self.protect_bos = settings.get("protect_bos", True)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        output = attend_selectively(
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            selector_head=self.selector_head,
            protect_bos=self.protect_bos,
            layer=None if past_key_values is None else _layer_of(past_key_values, self.layer_idx),
            dropout=self.attention_dropout,
            training=self.training,
        )
        return output, None


def _layer_of(cache: Cache, layer_idx: int) -> CacheLayer:
    layer = cache.layers[layer_idx]
    if not isinstance(layer, SelectiveCacheLayer | StaticSelectiveCacheLayer):
        raise ValueError(
            f"layer {layer_idx} needs a cache with a selective layer and got a {type(layer).__name__}; "
            "build it from the model's configuration: DynamicCache(config=model.config)"
        )
    return layer


# --- the swap for existing models -----------------------------------------------------------------------------------

BASES = ("sdpa", "eager")
"""Attention implementations that layers which stay standard may keep"""

UNSUPPORTED_ARGUMENTS = {
    "softcap": "soft-capped attention logits",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def _selective_forward(base: str) -> Any:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        selective_cache: CacheLayer | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        settings = getattr(module, "_selective", None)
        if settings is None:
            if base == "sdpa":
                standard = ALL_ATTENTION_FUNCTIONS["sdpa"]
            else:
                standard = sys.modules[type(module).__module__].eager_attention_forward
            return standard(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        if selective_cache is None and key.shape[2] > query.shape[2]:
            raise ValueError(
                f"{type(module).__name__} was given cached keys without the cache object, so what the past "
                "selected is unknown; "
                "pass past_key_values=DynamicCache()"
            )
        for name, what in UNSUPPORTED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"selective attention does not support {what}, which {type(module).__name__} uses")
        output = attend_selectively(
            query,
            key,
            value,
            attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            selector_head=settings["selector_head"],
            protect_bos=settings["protect_bos"],
            layer=selective_cache,
            dropout=dropout,
            training=module.training,
        )
        return output, None

    return forward


def _probe_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Standard attention that notes, per head, how much that head would select."""
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    (B, H, T, _), G, S = query.shape, key.shape[1], key.shape[2]
    logits = (query @ key.repeat_interleave(H // G, 1).transpose(-1, -2) * scaling).float()
    earlier = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T - 1)
    if attention_mask is not None:
        earlier = earlier & _seen(attention_mask)
    earlier = earlier & ~first_tokens(attention_mask, B, S, query.device)[:, None, None]  # (B, 1, T, S)
    selected = logits.relu().masked_fill(~earlier, 0.0).sum((0, 2, 3))
    module._selection_by_head = selected / earlier.sum().clamp(min=1)  # (H,)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


for _base, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(f"selective_{_base}", _selective_forward(_base))
    AttentionMaskInterface.register(f"selective_{_base}", _mask)
AttentionInterface.register("selective_probe", _probe_forward)
AttentionMaskInterface.register("selective_probe", sdpa_mask)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that call the attention interface of transformers, by layer index.

    Raises ValueError for two of them in one layer, as in models with cross attention.
    """
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if not calls_attention_interface(module) or getattr(module, "layer_idx", None) is None:
            continue
        if module.layer_idx in modules:
            raise ValueError(
                f"{name} is a second attention in layer {module.layer_idx}; cross attention is not supported"
            )
        modules[module.layer_idx] = module
    return modules


def calls_attention_interface(module: nn.Module) -> bool:
    """Whether `module` computes its attention through the interface of transformers, where it can be replaced."""
    if isinstance(module, FullAttention):
        return not isinstance(module, SelectiveAttention)
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT or compiled wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _refuse(model: PreTrainedModel, modules: dict[int, nn.Module], layers: Sequence[int]) -> None:
    """Words for every model that would silently compute something else."""
    name, config = type(model).__name__, model.config
    if not modules:
        raise ValueError(
            f"{name} has no layer that uses the attention interface of transformers, so its attention cannot be "
            "replaced; "
            "Llama, Qwen, Mistral, SmolLM, GPT-2 and their relatives have"
        )
    missing = [layer for layer in layers if layer not in modules]
    if missing:
        raise ValueError(f"layers {missing} are not attention layers of {name}; those are {sorted(modules)}")
    text = config.get_text_config(decoder=True)
    for layer in layers:
        module = modules[layer]
        if not getattr(module, "is_causal", True) or not getattr(config, "is_causal", True):
            raise ValueError(f"layer {layer} of {name} is not causal; selective attention needs a causal decoder")
        if getattr(text, "attn_logit_softcapping", None) is not None:
            raise ValueError(
                f"{name} soft-caps its attention logits (attn_logit_softcapping={text.attn_logit_softcapping}), "
                "which selective "
                "attention does not support"
            )
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name} has attention sinks, which selective attention does not support")
        if _window(module, text) is not None:
            full = [index for index, other in modules.items() if _window(other, text) is None]
            advice = f"pass layers={full}" if full else "no layer of this model has it"
            raise ValueError(
                f"layer {layer} of {name} attends within a sliding window of {_window(module, text)} tokens, "
                "where the first "
                f"token and old selections fall out of sight; selective attention needs full attention: {advice}"
            )
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()):
            raise ValueError(
                f"{type(module).__name__} passes no further arguments to its attention function: not supported"
            )


def _window(module: nn.Module, text: Any) -> int | None:
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None:
        sliding = layer_types[module.layer_idx] in ("sliding_attention", "chunked_attention")
        return (getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", 0)) if sliding else None
    return getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)


def _hand_over_cache(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives the attention function, which sees no cache, the cache layer that holds F."""
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    if cache is None:
        return args, kwargs
    return args, {**kwargs, "selective_cache": selective_layer(cache, module.layer_idx)}


def enable_selective_attention(
    model: PreTrainedModel,
    selector_head: int | Literal["auto"] | Sequence[int] = 0,
    protect_bos: bool = True,
    layers: Sequence[int] | None = None,
    *,
    inputs: Tensor | None = None,
) -> PreTrainedModel:
    """Replace the attention of `layers` (None is all) by selective attention, in place; returns the model.

    Works for decoders that use the attention interface of transformers, also wrapped by PEFT. No parameter is added.
    The settings are written to `model.config.selective_attention`, so `trialist.models.load_model` enables them again
    in a saved model. `layers=[]` leaves the model untouched.

    selector_head: a head for all layers, or one a layer of `layers`; "auto" takes, in each layer, the head that would
        select least on `inputs` (token ids `(B, T)`), the gentlest start for a pretrained model.
    protect_bos: never hide the first real token.

    Raises ValueError for encoders, cross attention, sliding windows, soft-capped logits, attention sinks and heads or
    layers that do not exist. A pretrained model gets worse at first: its heads were not trained to select.
    """
    plain = _plain(model)
    if is_selective(plain):
        raise ValueError("selective attention is enabled already; call disable_selective_attention first")
    if plain.config.is_encoder_decoder:
        raise ValueError(f"{type(plain).__name__} is an encoder-decoder; selective attention needs a causal decoder")
    modules = attention_modules(plain)
    chosen = sorted(modules) if layers is None else list(layers)
    if layers is not None and not chosen:
        return model
    _refuse(plain, modules, chosen)
    base = plain.config._attn_implementation
    if base not in BASES:
        raise ValueError(f"the model runs attn_implementation={base!r}; load it with 'sdpa' or 'eager'")
    heads = _heads(plain, modules, chosen, selector_head, inputs)
    for layer, head in zip(chosen, heads, strict=True):
        modules[layer]._selective = {"selector_head": head, "protect_bos": protect_bos}
        modules[layer].register_forward_pre_hook(_hand_over_cache, with_kwargs=True)
    plain.set_attn_implementation(f"selective_{base}")
    plain.config.selective_attention = {"selector_head": heads, "protect_bos": protect_bos, "layers": chosen}
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


def _selective_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if getattr(module, "_selective", None) is not None)


def disable_selective_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable_selective_attention`: the model computes exactly what it computed before. Returns the model."""
    plain = _plain(model)
    for module in list(_selective_modules(plain)):
        del module._selective
        for handle, hook in list(module._forward_pre_hooks.items()):
            if hook is _hand_over_cache:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
    base = plain.config._attn_implementation or ""
    if base.startswith("selective_"):
        plain.set_attn_implementation(base.removeprefix("selective_"))
        del plain.config.selective_attention
    return model
