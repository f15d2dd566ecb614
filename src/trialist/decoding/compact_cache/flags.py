"""Command-line options of the compact cache; its parts are in `options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class CompactCacheFlags:
    """What the cache of a generation stores."""

    key_keep: float = 1.0
    """Share of the channels of each cached key that is kept once a prompt was read, in (0, 1]; 1 keeps all"""
    key_score: Literal["query", "key_norm", "random"] = "query"
    """What decides which channels stay: the latest queries and the keys, the keys alone, or chance"""
    key_recent: int = 32
    """Latest tokens whose keys stay whole"""
    value_bits: Literal[4, 8, 16] = 16
    """Bits of each cached value; 16 stores them as they are"""
    cache_budget: int = 0
    """Tokens that each layer keeps once a prompt was read; 0 keeps all"""
    cache_policy: Literal["snapkv", "h2o", "recency"] = "snapkv"
    """Which tokens stay within the budget: those the latest queries attend to, those most attended to so far, or the latest"""

    def options(self, model: Any, tokenizer: Any, prompts: Sequence[Any]) -> Sequence[Any]:
        """As `Flags` says."""
        if not 0.0 < self.key_keep <= 1.0:
            raise ValueError(f"--key-keep {self.key_keep}: a share of the channels in (0, 1]; 1 keeps all")
        if self.key_recent < 0:
            raise ValueError(f"--key-recent {self.key_recent}: at least 0 tokens")
        if self.cache_budget < 0:
            raise ValueError(f"--cache-budget {self.cache_budget}: at least 0 tokens; 0 keeps all")
        found: list[Any] = []
        if self.key_keep < 1.0:
            from trialist.decoding.compact_cache.options import KeyPruning

            found.append(KeyPruning(keep=self.key_keep, score=self.key_score, recent=self.key_recent))
        if self.value_bits != 16:
            from trialist.decoding.compact_cache.options import ValueQuantization

            found.append(ValueQuantization(bits=self.value_bits, group=_group(model)))
        if self.cache_budget:
            from trialist.decoding.compact_cache.options import TokenEviction

            try:
                found.append(TokenEviction(budget=self.cache_budget, policy=self.cache_policy))
            except ValueError as error:
                raise ValueError(f"--cache-budget {self.cache_budget}: {error}") from error
        return found


def _group(model: Any) -> int:
    """32 channels, or what divides the width of the model's values."""
    import math

    text = model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return math.gcd(width, 32)
