"""Adaptive exit of recurrent depth: every token stops when its criterion falls below a threshold (arXiv 2502.05171, 6.1).

A token that has stopped keeps its state, and stands with the keys and values of its last step in all later steps. In decoding
this is what later tokens find in the cache; in a pass over many tokens it is computed the same way, so for criteria that read
the state alone (`latent_diff`, `cosine`) scoring a text and decoding it token by token are the same computation. Criteria that
read the next-token distribution (`kl`, `entropy_diff`, `argmax`) pass the coda at each look. There a pass over many tokens
looks while earlier tokens are still on their way, and may stop at other steps than decoding would.

B batch, A rows with active tokens, T tokens, d hidden size, V vocabulary, G key/value heads, D head width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from trialist.models.recurrent_depth.cache import RecurrentDepthCache, SlotView
from trialist.models.recurrent_depth.settings import LATENT, RecurrentSettings

Inputs = tuple[Tensor, dict[str, Any]]
"""What the core takes beside the state: e `(A, T, d)`, and the arguments of its blocks"""
LEAST_PROBABLE = 0.1
"""Of `minp_kl`: share of the largest probability below which a token does not count. The paper does not name it; our reading"""


def change(criterion: str, now: Tensor, before: Tensor) -> Tensor:
    """How much a look differs from the one before, `(..., n)` to `(...)` in float32.

    kl: KL(before || now) of log-probabilities.  minp_kl: the same of those that `without_improbable` gives.
    entropy_diff: |H(now) - H(before)|.  latent_diff: ||now - before|| / ||now||.  cosine: 1 - cos(now, before).
    """
    if criterion in ("kl", "minp_kl"):
        return (before.exp() * (before - now)).sum(-1)
    if criterion == "entropy_diff":
        return ((now.exp() * now).sum(-1) - (before.exp() * before).sum(-1)).abs()
    if criterion == "latent_diff":
        return (now - before).norm(dim=-1) / now.norm(dim=-1).clamp(min=torch.finfo(now.dtype).tiny)
    assert criterion == "cosine"
    return 1.0 - torch.nn.functional.cosine_similarity(now, before, dim=-1)


def without_improbable(log_probs: Tensor) -> Tensor:
    """Log-probabilities `(..., V)` in which each token below `LEAST_PROBABLE` of the best has 1/V, made to add up to 1 again."""
    p = log_probs.exp()
    p = torch.where(p < LEAST_PROBABLE * p.amax(-1, keepdim=True), 1 / p.shape[-1], p)
    return (p / p.sum(-1, keepdim=True)).log()


class ExitPass:
    """The loop of one call in which tokens stop by themselves.

    select: rows -> what the core takes of them beside the state. step: (state, inputs, caches) -> next state. logits: (state,
    inputs, caches) -> logits of the coda and head; needed by criteria that read distributions. rows: indices (A,), None for
    all. The layers of the cache are ones that `require_dynamic` accepts.
    """

    def __init__(
        self,
        settings: RecurrentSettings,
        steps: int,
        cache: RecurrentDepthCache | None,
        select: Callable[[Tensor | None], Inputs],
        step: Callable[[Tensor, Inputs, Cache], Tensor],
        logits: Callable[[Tensor, Inputs, Cache | None], Tensor],
    ) -> None:
        self.settings, self.steps, self.cache = settings, steps, cache
        self.select, self.step, self.logits = select, step, logits
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Latest keys and values of the tokens of this call, all rows, by (shared slot, layer)"""

    def __call__(
        self, state: Tensor, active: Tensor, keep: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:  # (B, T, d), (B, T)
        """Final states and the number of steps of each token.

        state: s_0 (B, T, d). active: bool (B, T), False at padding. keep: told every state.
        """
        settings, taken = self.settings, torch.zeros_like(active, dtype=torch.long)
        looks, rows, inputs = Looks(settings, state), None, self.select(None)
        for i in range(self.steps):
            self.index, self.active, self.rows = i, active, rows
            if self.cache is not None and i >= self.cache.slots:
                self.cache.take_back(i, state.shape[1])
            part, alive = _rows(state, rows), _rows(active, rows)
            part = torch.where(alive[..., None], self.step(part, inputs, HoldingView(self)), part)
            state = part if rows is None else state.index_copy(0, rows, part)
            if keep is not None:
                keep(state)
            taken += active
            if looks.due(i + 1) and i + 1 < self.steps:
                seen = part if settings.exit_criterion in LATENT else self._log_probs(part, rows, inputs)
                done = looks(seen, rows, exits=i + 1 >= settings.min_steps)
                if done is not None:
                    alive = alive & ~done
                    active = alive if rows is None else active.index_copy(0, rows, alive)
                    left = active.any(1).nonzero()[:, 0]
                    if len(left) == 0:
                        break
                    if len(left) < len(part):
                        rows, inputs = left, self.select(left)
        if self.cache is not None and i + 1 < self.cache.slots:
            self.cache.fill(i + 1, state.shape[1])
        return state, taken

    def _log_probs(self, state: Tensor, rows: Tensor | None, inputs: Inputs) -> Tensor:
        view = None if self.cache is None else PeekingView(self.cache, rows)
        log_probs = self.logits(state, inputs, view).float().log_softmax(-1)  # (A, T, V)
        return without_improbable(log_probs) if self.settings.exit_criterion == "minp_kl" else log_probs

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (A, G, S, D) that a core layer attends to, after those of active tokens were written."""
        # what tokens that have stopped stand with: their own entry of a shared slot, or that of the step before
        shared = self.cache is not None and self.cache.slots < self.steps
        place = (self.index % self.cache.slots if shared else 0, layer)  # type: ignore[union-attr]
        last = self.held.get(place)
        if last is not None:
            moving = _rows(self.active, self.rows)[:, None, :, None]
            key, value = (
                _put(old, torch.where(moving, new, _rows(old, self.rows)), self.rows)
                for new, old in zip((key, value), last, strict=True)
            )
        self.held[place] = (key, value)  # (B, G, T, D)
        if self.cache is not None:
            key, value = self.cache.view(self.index).update(key, value, layer)
        return _rows(key, self.rows), _rows(value, self.rows)


class Looks:
    """Looks at the tokens every `check_every` steps from `min_steps` on, and tells which of them have settled.

    The first look that may end a token compares with the step before it; at step 1 that is s_0, or the uniform distribution.
    """

    def __init__(self, settings: RecurrentSettings, s0: Tensor) -> None:
        self.settings = settings
        self.before: Tensor | None = s0.float() if settings.exit_criterion in LATENT else None
        self.equal = torch.zeros(s0.shape[:2], device=s0.device)
        """Looks in a row with the same most probable token, (B, T)"""

    def due(self, step: int) -> bool:
        first, every = self.settings.min_steps, self.settings.check_every
        return step == first - 1 or (step >= first and (step - first) % every == 0)

    def __call__(self, seen: Tensor, rows: Tensor | None, exits: bool) -> Tensor | None:
        """Which tokens of `rows` stop (A, T); None at the look that is only compared with.

        seen: states (A, T, d) or log-probabilities (A, T, V).
        """
        criterion, threshold = self.settings.exit_criterion, self.settings.threshold
        assert criterion is not None
        seen = seen.float()
        if self.before is None:
            before = torch.full_like(seen, -math.log(seen.shape[-1]))
        else:
            before = _rows(self.before, rows)
        if criterion == "argmax":
            same = (seen.argmax(-1) == before.argmax(-1)) & (self.before is not None)
            count = torch.where(same, _rows(self.equal, rows) + 1, 0.0)
            self.equal = _put(self.equal, count, rows)
            done = count >= threshold
        else:
            done = change(criterion, seen, before) < threshold
        self.before = seen if self.before is None or rows is None else self.before.index_copy(0, rows, seen)
        return done if exits else None


class HoldingView(Cache):
    """What the core layers take for their cache while tokens are stopping."""

    def __init__(self, run: ExitPass) -> None:
        super().__init__(layers=[])
        self.run = run

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.run.update(key_states, value_states, layer_idx)


class PeekingView(SlotView):
    """The coda's cache, read and not written: a look leaves no trace."""

    def __init__(self, cache: RecurrentDepthCache, rows: Tensor | None) -> None:
        view = cache.view(0)
        super().__init__(cache, view.indices)
        self.rows = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if int(layer.get_seq_length()) == 0:
            return key_states, value_states
        if self.cache.offloading:
            layer.prefetch()
        past = _rows(layer.keys, self.rows), _rows(layer.values, self.rows)
        return torch.cat([past[0], key_states], dim=-2), torch.cat([past[1], value_states], dim=-2)


def require_dynamic(cache: RecurrentDepthCache, criterion: str) -> None:
    """Raises ValueError for a cache in which a row cannot stop before the others."""
    other = {type(layer).__name__ for layer in cache.layers[cache.prelude_layers :] if type(layer) is not DynamicLayer}
    if other:
        raise ValueError(
            f"exit_criterion={criterion!r} needs a dynamic cache, where a row can stop before the others; this one holds "
            f"{', '.join(sorted(other))}"
        )


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows.to(x.device))


def _put(whole: Tensor, part: Tensor, rows: Tensor | None) -> Tensor:
    return part if rows is None else whole.index_copy(0, rows.to(whole.device), part)
