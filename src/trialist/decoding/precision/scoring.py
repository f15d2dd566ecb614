"""How far a model under a schedule of precisions is from a reference, position by position.

Comparing texts with that of a reference rewards precision that comes early, as greedy texts part for good at the first token that
differs (`rouge_l`, `shared_prefix`). Here the text is fixed, its keys and values are those that the schedule writes, and all
positions count alike. On texts sampled from the reference at temperature 1 the mean is, per token, the Kullback-Leibler
divergence between the two as generators of whole texts, since that of a sequence is the sum of those of its steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trialist.models.nested.precision import available_bits, precision

# B rows, P columns of prompts, T generated tokens, V vocabulary

AT_ONCE = 1 << 24
"""Logits that are held at once, at most, for each model"""


@torch.no_grad()
def scheduled_logits(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    continuation: Tensor,
    bits: Sequence[int] | None = None,
    prefill_bits: int | None = None,
) -> Iterator[Tensor]:
    """Next-token logits at every token of a continuation, as generation under a schedule has them: pieces `(B, n, V)`, T in all.

    input_ids, attention_mask: (B, P), padded on the left. continuation: (B, T). bits: of the T - 1 steps that read a token of the
    continuation; the first logits come from the prompt, at `prefill_bits`. Without either the model runs as it is. Steps of one
    precision go through the model together, in as many passes as the sizes allow.
    """
    (B, P), T = input_ids.shape, continuation.shape[1]
    tokens = torch.cat([input_ids, continuation], 1)
    mask = torch.cat([attention_mask, attention_mask.new_ones(B, T)], 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    places = "position_ids" in inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config)
    at_once = max(1, AT_ONCE // (B * model.config.get_text_config(decoder=True).vocab_size))

    def read(start: int, end: int, keep: int, precise: int | None) -> Tensor:
        more = {"position_ids": positions[:, start:end]} if places else {}
        inputs = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end], **more}
        if precise is None:
            return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        with precision(model, precise):
            return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits

    yield read(0, P, 1, prefill_bits)
    start = P
    asked: Sequence[int | None] = [None] * (T - 1) if bits is None else bits
    for precise, group in groupby(asked):
        end = start + len(list(group))
        for begin in range(start, end, at_once):
            yield read(begin, min(begin + at_once, end), 0, precise)
        start = end


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model under a schedule beside a reference, in nats at every token of a continuation, (B, T) float32 each."""

    forward: Tensor
    """KL(reference || model)"""
    backward: Tensor
    """KL(model || reference)"""
    surprise: Tensor
    """-log p of the token under the reference"""


def compare(
    model: Any,
    reference: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    continuation: Tensor,
    bits: Sequence[int] | None,
    prefill_bits: int | None,
) -> Comparison:
    """Arguments as of `divergences`."""
    own = _reference_logits(model, reference, input_ids, attention_mask, continuation)
    found: list[tuple[Tensor, ...]] = []
    at = 0
    for logits in scheduled_logits(model, input_ids, attention_mask, continuation, bits, prefill_bits):
        n = logits.shape[1]
        log_q = logits.float().log_softmax(-1)
        log_p = torch.cat([next(own) for _ in range(n)], 1).float().log_softmax(-1)
        ratio = log_p - log_q
        surprise = -log_p.gather(-1, continuation[:, at : at + n, None])[..., 0]
        found.append(((log_p.exp() * ratio).sum(-1), -(log_q.exp() * ratio).sum(-1), surprise))
        at += n
    return Comparison(*(torch.cat(parts, 1) for parts in zip(*found)))


def divergences(
    model: Any,
    reference: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    continuation: Tensor,
    bits: Sequence[int] | None,
    prefill_bits: int | None,
) -> Tensor:
    """KL(reference || model under the schedule) in nats at every token of a continuation, (B, T) float32.

    reference: a model with the same tokens, or the nested model itself, which is then read at its highest precision.
    """
    return compare(model, reference, input_ids, attention_mask, continuation, bits, prefill_bits).forward


def _reference_logits(
    model: Any, reference: Any, input_ids: Tensor, attention_mask: Tensor, continuation: Tensor
) -> Iterator[Tensor]:
    """Logits of the reference, one position at a time."""
    highest, bits = None, None
    if reference is model:
        highest = available_bits(model)[-1]
        bits = [highest] * (continuation.shape[1] - 1)
    for logits in scheduled_logits(reference, input_ids, attention_mask, continuation, bits, highest):
        yield from logits.split(1, 1)


def rouge_l(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """F1 of the longest common subsequence, over tokens, in [0, 1]; 1 for two empty texts."""
    if not tokens and not reference:
        return 1.0
    return 2 * _common(tokens, reference) / (len(tokens) + len(reference))


def shared_prefix(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the reference up to the first token that differs, in [0, 1]; 1 for an empty reference."""
    if not reference:
        return 1.0
    same = next((at for at, (a, b) in enumerate(zip(tokens, reference)) if a != b), min(len(tokens), len(reference)))
    return same / len(reference)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence. Bit i of `rows` is 0 where the length grows at token i of the first."""
    whole = (1 << len(first)) - 1
    places: dict[int, int] = {}
    for at, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << at
    rows = whole
    for token in second:
        hits = rows & places.get(token, 0)
        rows = (rows + hits | rows - hits) & whole
    return len(first) - rows.bit_count()
