"""The options of preference losses, declared once: for the objective, and for the recipe, whose help shows them without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["dpo", "d2po", "dpo-norm", "simpo", "sampo", "r-dpo", "ld-dpo"]


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """What a preference loss may be told besides its method; which method has which, `trialist.objectives.Preference` checks."""

    beta: float | None = None
    """Inverse temperature, > 0; without it 0.1, and 5 (simpo 2) where sums are divided by something"""
    gamma: float | None = None
    """Of d2po: weight of a token over that of the token before, in (0, 1]; 1 is dpo; without it 0.98"""
    half_life: float | None = None
    """Of d2po, instead of gamma: tokens after which the weight is one half"""
    exponent_start: int = 0
    """Of d2po: exponent of the first token, 0 as in the paper or 1 as in its code"""
    alpha: float | None = None
    """Of r-dpo: nats per token of length difference; of ld-dpo: weight of tokens beyond the shorter answer, in [0, 1]"""
    normalize: Literal["none", "length", "weights"] | None = None
    """Divide an answer's sum by nothing, its length or its weights; without it as the method does"""
    margin_ratio: float | None = None
    """Margin that the difference of rewards should reach, in units of beta; without it 0.5 for simpo, 0 else"""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5)"""
    reference_free: bool = False
    """Leave the reference out; simpo always does"""
