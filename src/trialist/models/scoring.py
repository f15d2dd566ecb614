"""Log-probabilities of chosen tokens: the backbone runs once, and only the hidden states that count are projected.

With V = 50,000 the logits of a batch are a hundred times larger than its hidden states; they are never there at once.
B batch, T time, N scored positions, d hidden size, V vocabulary
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

OUTPUTS = ("log_probs", "entropy")
TILE, TILE_OF_ACCELERATORS = 2**24, 2**26
"""Largest number of logits held at once, in a forward or backward pass, which takes some four times that in float32. Each tile
adds a product as large as the head's weight to its gradient: where memory moves slowly against products, tiles should be few"""


def selected_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    chunk: int = 4096,
    outputs: Sequence[str] = ("log_probs",),
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """log p(token t+1 | tokens up to t) in nats, `(B, T-1)` in float32 (float64 for a float64 model), 0 where not
    scored.

    Token t+1 is scored where `completion_mask[:, t+1]` is true; or where `labels[:, t+1]` is not -100, and then the
    label is the token; without either, wherever tokens t and t+1 are both no padding. `input_ids`, masks,
    `position_ids` and `labels` are `(B, T)`; an `attention_mask` may also say who sees whom, `(B, 1, T, T)`, as transformers
    take it (bool, or to be added), and then `position_ids` are needed where they do not run through; models with recurrent
    layers, which cannot honour it, refuse it.

    outputs: "log_probs" and "entropy" (of the whole next-token distribution, in nats); several come back as a tuple in
        that order. Gradients of all of them are exact.
    chunk: positions projected at once, at most; fewer where the vocabulary is large.
    arguments: further ones of the model's forward pass, such as `num_steps` of recurrent depth. Without them a model is scored
        with its `scoring_arguments`, where it has any: with recurrent depth no token exits early.

    Honours tied heads, biases, logit scaling and soft-capping, autocast, LoRA (also on the head). The first call for a
    model compares one position with the model's own logits, which also tells which number of the configuration scales them.
    Raises ValueError for models whose logits are anything else, for masks that disagree in shape or score padding, and for
    unknown outputs.
    """
    scored, targets = _scored(input_ids, attention_mask, completion_mask, labels)
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise ValueError(f"outputs is {tuple(outputs)!r}; choose from {OUTPUTS}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")

    plain = _plain(model)
    module = _output(plain)
    further = {**getattr(plain.base_model, "scoring_arguments", {}), **(arguments or {})}
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **further}
    padding = attention_mask is not None and attention_mask.dim() == 2
    if position_ids is None and padding and _takes(plain.base_model, "position_ids"):
        assert attention_mask is not None
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # padding on the left shifts no position
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if plain in _VERIFIED:
        hidden = plain.base_model(**inputs).last_hidden_state
    else:
        hidden = _verified(plain, module, inputs)
    head = Head(module, _VERIFIED[plain], _softcap(plain))

    states = hidden[:, :-1][scored]  # (N, d)
    values = _project(states, targets[scored], head, chunk, "entropy" in outputs)
    shaped = {name: _scatter(value, scored) for name, value in zip(OUTPUTS, values)}
    results = tuple(shaped[name] for name in outputs)
    return results[0] if len(results) == 1 else results


def _scatter(values: Tensor, scored: Tensor) -> Tensor:
    return values.new_zeros(scored.shape).masked_scatter(scored, values)  # (N,) -> (B, T-1)


def _scored(
    input_ids: Tensor, attention_mask: Tensor | None, completion_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which positions t predict a scored token t+1, bool `(B, T-1)`, and those tokens `(B, T-1)`."""
    if completion_mask is not None and labels is not None:
        raise ValueError("completion_mask and labels both say what is scored; give one of them")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, wanted (B, T)")
    for name, tensor in (("attention_mask", attention_mask), ("completion_mask", completion_mask), ("labels", labels)):
        whole = name == "attention_mask" and tensor is not None and tensor.dim() == 4
        if tensor is not None and tensor.shape != input_ids.shape and not whole:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}; give equal shapes"
            )
    real = None if attention_mask is None or attention_mask.dim() == 4 else attention_mask.bool()
    if labels is not None:
        scored, targets = labels[:, 1:] != -100, labels[:, 1:]
    elif completion_mask is not None:
        scored, targets = completion_mask[:, 1:].bool(), input_ids[:, 1:]
    elif real is not None:
        return real[:, 1:] & real[:, :-1], input_ids[:, 1:]
    else:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool), input_ids[:, 1:]
    if real is not None:
        bad = (scored & ~real[:, 1:]).any(-1).nonzero()
        if bad.numel():
            raise ValueError(
                f"row {int(bad[0])}: a token is scored where attention_mask marks padding; clear completion_mask there "
                "(or set the label to -100)"
            )
    return scored, targets


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: capped(scale * (W h + b))."""

    module: nn.Module
    scale: float
    softcap: float | None

    def logits(self, states: Tensor) -> Tensor:
        return self.finish(self.module(states))

    def finish(self, raw: Tensor) -> Tensor:
        """Scaled and capped, in at least float32."""
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def _plain(model: nn.Module) -> Any:
    """The transformers model inside compiled and PEFT wrappers; LoRA stands inside it."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            "prompt-learning adapters change the sequence; selected_logprobs supports adapters inside the layers"
        )
    return model.get_base_model()


def _output(model: Any) -> nn.Module:
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None or model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    return module


def _softcap(model: Any) -> float | None:
    return getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)


def _scales(config: Any) -> tuple[float, ...]:
    """1, and the numbers that a configuration calls a scale or a multiplier, and their reciprocals: some models multiply
    by what others divide by."""
    found = [getattr(config, name, None) for name in dir(config) if "scal" in name or "multiplier" in name]
    named = [
        float(value) for value in found if isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
    return tuple(dict.fromkeys((1.0, *named, *(1 / value for value in named))))


_VERIFIED: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
"""Model -> the scale of its logits"""


def _verified(model: Any, module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Hidden states of the backbone, after the model's own logits at the last position told the scale and confirmed that
    nothing else happens to them."""
    device = inputs["input_ids"].device
    keep = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        theirs = model(**inputs, **keep).logits[:, -1]
    hidden = model.base_model(**inputs).last_hidden_state  # from the same random state, so with the same dropout
    with torch.no_grad():
        raw = module(hidden[:, -1])
        scales = _scales(model.config.get_text_config(decoder=True))
        if len(scales) > 1 and not (raw.isfinite() & (raw != 0)).any():
            raise ValueError(
                f"{type(model).__name__} scales its logits, and those of the first batch are all 0 or no numbers, so the scale "
                "cannot be told; is the model whole, and its head initialised?"
            )
        errors = [_difference(Head(module, scale, _softcap(model)).finish(raw), theirs) for scale in scales]
    error, scale = min(zip(errors, scales), key=lambda found: found[0])
    largest = float(theirs.nan_to_num(posinf=0.0, neginf=0.0).abs().amax())
    if not error <= max(_rounding(raw), _rounding(theirs)) * max(largest, 1e-3):
        raise ValueError(
            f"{type(model).__name__} turns hidden states into logits in a way that selected_logprobs does not know "
            f"(largest difference {error:.3g}, largest logit {largest:.3g})"
        )
    _VERIFIED[model] = scale
    return hidden


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; 0 where both are the same infinity or no number."""
    theirs = theirs.to(ours.dtype)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return float((ours - theirs).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf).amax())


def _rounding(logits: Tensor) -> float:
    """How far logits of one model may lie apart over the largest of them, for their precision."""
    if logits.dtype == torch.float64:
        return 1e-8
    if logits.dtype == torch.float32:  # TF32 has the fraction of float16
        exact = logits.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
        return 1e-4 if exact else 4 * torch.finfo(torch.float16).eps
    return 4 * torch.finfo(logits.dtype).eps


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _project(states: Tensor, targets: Tensor, head: Head, chunk: int, entropy: bool) -> tuple[Tensor, ...]:
    """Log-probability of each target and, on demand, entropy of each distribution, `(N,)` each."""
    weight, bias = getattr(head.module, "weight", None), getattr(head.module, "bias", None)
    if type(head.module) is nn.Linear and not head.module._forward_hooks and not head.module._forward_pre_hooks:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        assert weight is not None
        rows = _rows_at_once(weight.shape[0], chunk, device)
        arguments = (states, weight, bias, targets, head.scale, head.softcap, rows, entropy, dtype)
        return _LinearLogProbs.apply(*arguments)
    vocabulary = head.module(states[:1]).shape[-1] if len(states) else 1
    rows = _rows_at_once(vocabulary, chunk, states.device.type)
    parts = [
        checkpoint(_log_probs_of, head, part, part_targets, use_reentrant=False)
        for part, part_targets in zip(states.split(rows), targets.split(rows))
    ]
    return tuple(torch.cat(column) for column in zip(*parts))


def _rows_at_once(vocabulary: int, chunk: int, device: str) -> int:
    """Positions in a tile on a type of device."""
    return max(1, min(chunk, (TILE if device == "cpu" else TILE_OF_ACCELERATORS) // vocabulary))


def _log_probs_of(head: Head, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = head.logits(states).log_softmax(-1)  # (n, V)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class _LinearLogProbs(torch.autograd.Function):
    """A linear head with scale and cap, in tiles of `rows` positions. The backward pass computes the logits again unless
    one tile holds them all.

    With p the distribution, y the target, H the entropy, and gradients g (log-probability) and e (entropy):
    dlogit = g (1[y] - p) - e p (log p + H).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float,
        softcap: float | None, rows: int, entropy: bool, dtype: torch.dtype | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        ctx.settings = (scale, softcap, rows, entropy, dtype, wide)
        log_probs = torch.empty(len(states), dtype=wide, device=states.device)
        entropies = torch.empty_like(log_probs) if entropy else None
        normaliser = torch.empty_like(log_probs)
        kept: tuple[Tensor | None, Tensor | None] = (None, None)
        with torch.autocast(states.device.type, enabled=False):
            matrix, offset = _cast(weight, dtype), _cast(bias, dtype)
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                logits, slope = _tile(states[part], matrix, offset, scale, softcap, dtype, wide)  # (n, V)
                if len(states) <= rows:
                    kept = (logits, slope)
                normaliser[part] = logits.logsumexp(-1)
                log_probs[part] = logits.gather(-1, targets[part, None])[:, 0] - normaliser[part]
                if entropies is not None:
                    p = torch.softmax(logits, -1)
                    entropies[part] = normaliser[part] - p.mul_(logits).sum(-1)
        ctx.save_for_backward(states, weight, bias, targets, normaliser, entropies, *kept)
        return (log_probs,) if entropies is None else (log_probs, entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor | None = None) -> tuple:  # type: ignore[override]
        states, weight, bias, targets, normaliser, entropies, *kept = ctx.saved_tensors
        scale, softcap, rows, _, dtype, wide = ctx.settings
        need_states, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if need_states else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if bias is not None and need_bias else None
        with torch.autocast(states.device.type, enabled=False):
            matrix, offset = _cast(weight, dtype), _cast(bias, dtype)
            for start in range(0, len(states), rows):
                part = slice(start, start + rows)
                if kept[0] is None:
                    logits, slope = _tile(states[part], matrix, offset, scale, softcap, dtype, wide)
                else:
                    logits, slope = kept
                log_p = logits - normaliser[part, None]
                p = log_p.exp()
                factor = -grad[part, None]  # (n, 1)
                if grad_entropy is not None and entropies is not None:
                    d_logits = log_p.add_(entropies[part, None]).mul_(-grad_entropy[part, None]).add_(factor).mul_(p)
                else:
                    d_logits = p.mul_(factor)
                d_logits.scatter_add_(-1, targets[part, None], grad[part, None])
                if slope is not None:
                    d_logits.mul_(slope)
                if scale != 1.0:
                    d_logits.mul_(scale)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(matrix.dtype)
                if d_states is not None:
                    d_states[part] = d_logits @ matrix
                if d_weight is not None:
                    inputs = _cast(states[part], dtype)
                    if d_weight.dtype == d_logits.dtype:
                        d_weight.addmm_(d_logits.T, inputs)
                    else:
                        d_weight += d_logits.T @ inputs
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_states, d_weight, d_bias, None, None, None, None, None, None


def _cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def _tile(
    states: Tensor, matrix: Tensor, offset: Tensor | None, scale: float, softcap: float | None,
    dtype: torch.dtype | None, wide: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Logits `(n, V)` in `wide`, and the slope of the soft cap there."""
    logits = nn.functional.linear(_cast(states, dtype), matrix, offset).to(wide)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is None:
        return logits, None
    capped = logits.div_(softcap).tanh_()
    slope = 1 - capped * capped
    return capped.mul_(softcap), slope
