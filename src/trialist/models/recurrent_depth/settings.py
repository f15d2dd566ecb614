"""The settings of recurrent depth: what a configuration says of it, and what one call may say instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trialist.models.configuration import ModularDecoderConfig

CHOICES: dict[str, tuple[str | None, ...]] = {
    "train_recurrence": ("poisson_lognormal", "uniform", "fixed"),
    "injection": ("concat", "add"),
    "state_init": ("normal", "zero"),
    "initialization": ("default", "takase"),
    "exit_criterion": (None, "kl", "entropy_diff", "latent_diff", "cosine", "argmax"),
}
THRESHOLDS = {"kl": 5e-4, "entropy_diff": 1e-3, "latent_diff": 0.03, "cosine": 1e-3, "argmax": 5}
"""Where a token exits when no threshold is given; that of `kl` is the paper's"""
CALL_OPTIONS = ("num_steps", "kv_slots", "exit_criterion", "exit_threshold", "min_steps", "check_every", "warm_start")
"""Settings that an argument of `forward` or `generate` of the same name overrides"""


@dataclass(frozen=True)
class RecurrentSettings:
    """`config.recurrent`, checked. The defaults stand in `trialist.models.configuration.SETTINGS`."""

    prelude_layers: int | None
    core_layers: int | None
    coda_layers: int | None
    """Layers before, inside and after the loop; their sum is `num_hidden_layers`. None for all three is a quarter of the
    layers before and after, at least one, and the rest inside"""
    mean_recurrence: int
    """r_bar: steps in evaluation, and centre of their distribution in training"""
    backprop_depth: int
    """k: steps, the last ones, that gradients flow through"""
    recurrence_sigma: float
    """Spread of the logarithm of the expected number of steps, for `poisson_lognormal`"""
    train_recurrence: str
    """Distribution of the number of steps in training: `poisson_lognormal` (mean r_bar + 1), `uniform` (1 to 2 r_bar - 1),
    `fixed` (r_bar)"""
    injection: str
    """How the prelude's output e enters each step: `concat` W [s; e], or `add` s + e"""
    core_norm: bool
    """Whether the final norm also stands, with the same weights, between the loop and the coda"""
    state_init: str
    """s_0: `normal`, or `zero`"""
    state_std: float | None
    """Standard deviation of s_0 before it is cut off at three of it; None is sqrt(2/5)"""
    embedding_scale: float | str | None
    """Factor of the token embeddings; `sqrt_width` is sqrt(hidden_size), None is 1"""
    initialization: str
    """Initial weights: `default`, or `takase` (the paper's: truncated normal, variance 2 / (5 hidden_size), residual outputs
    divided by sqrt(2 * effective depth))"""
    seed: int
    """Of s_0 and of the number of steps in training"""
    num_steps: int | None
    """Steps in evaluation; None is `mean_recurrence`"""
    kv_slots: int | None
    """Cached keys and values per token and core layer: step i reads and writes slot i mod kv_slots; None keeps every step's"""
    exit_criterion: str | None
    """What must become small for a token to stop early; None never stops"""
    exit_threshold: float | None
    """A token stops when the criterion falls below it (`argmax`: after so many equal looks); None is the default of the
    criterion"""
    min_steps: int
    """Fewest steps before a token may stop"""
    check_every: int
    """Steps from one look to the next"""
    warm_start: bool
    """Whether a decoded token starts from the last state of the token before it instead of from s_0"""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"recurrent.{name} is {getattr(self, name)!r}; choose one of {', '.join(map(repr, choices))}"
                )
        for name in ("mean_recurrence", "backprop_depth", "min_steps", "check_every"):
            _at_least_one(name, getattr(self, name))
        for name in ("num_steps", "kv_slots"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if not self.recurrence_sigma >= 0:
            raise ValueError(f"recurrent.recurrence_sigma is {self.recurrence_sigma}; it must be at least 0")
        if self.state_std is not None and not 0 <= self.state_std < math.inf:
            raise ValueError(f"recurrent.state_std is {self.state_std}; it must be a finite number >= 0")
        if self.exit_threshold is not None and not self.exit_threshold >= 0:
            raise ValueError(f"recurrent.exit_threshold is {self.exit_threshold}; it must be at least 0")
        if isinstance(self.embedding_scale, str) and self.embedding_scale != "sqrt_width":
            raise ValueError(f"recurrent.embedding_scale is {self.embedding_scale!r}; a number or 'sqrt_width'")
        if self.exit_criterion is not None and self.kv_slots is not None and self.min_steps < self.kv_slots:
            raise ValueError(
                f"min_steps is {self.min_steps} and kv_slots {self.kv_slots}: a token that exits earlier would leave slots "
                f"empty; give min_steps={self.kv_slots} or more"
            )

    @property
    def steps(self) -> int:
        """r in evaluation."""
        return self.mean_recurrence if self.num_steps is None else self.num_steps

    @property
    def threshold(self) -> float:
        assert self.exit_criterion is not None
        return THRESHOLDS[self.exit_criterion] if self.exit_threshold is None else self.exit_threshold

    def s0_std(self) -> float:
        return math.sqrt(2 / 5) if self.state_std is None else self.state_std


def settings_of(config: ModularDecoderConfig, given: Mapping[str, Any] | None = None) -> RecurrentSettings:
    """The settings of `config`, changed by the call options in `given` that are not None."""
    changes = {name: value for name, value in (given or {}).items() if value is not None}
    return RecurrentSettings(**{**config.settings("recurrent"), **changes})


def layer_counts(config: ModularDecoderConfig) -> tuple[int, int, int]:
    """Layers of prelude, core and coda."""
    settings, total = config.settings("recurrent"), config.num_hidden_layers
    counts = tuple(settings[f"{part}_layers"] for part in ("prelude", "core", "coda"))
    if counts == (None, None, None):
        outer = max(1, total // 4)
        counts = (outer, total - 2 * outer, outer)
    prelude, core, coda = counts
    if any(count is None for count in counts):
        raise ValueError(
            f"recurrent.prelude_layers, core_layers and coda_layers are {prelude}, {core} and {coda}; give all three or none"
        )
    if core < 1 or prelude < 0 or coda < 0 or sum(counts) != total:
        raise ValueError(
            f"recurrent: prelude, core and coda have {prelude}, {core} and {coda} layers and num_hidden_layers is {total}; "
            "they must add up to it, with at least one in the core"
        )
    return prelude, core, coda


def effective_depth(config: ModularDecoderConfig) -> int:
    """l_eff: layers that a token passes at the mean number of steps."""
    prelude, core, coda = layer_counts(config)
    return prelude + core * settings_of(config).mean_recurrence + coda


def check_settings(config: ModularDecoderConfig) -> None:
    """Raises ValueError for settings that cannot work."""
    settings = settings_of(config)
    prelude, core, _ = layer_counts(config)
    if settings.exit_criterion is not None:
        check_exit(settings, list(config.layer_types or []), prelude, core)


def check_exit(settings: RecurrentSettings, layer_types: list[str], prelude: int, core: int) -> None:
    """Raises ValueError where a token's early exit is not defined for the layers."""
    parts = {"core": layer_types[prelude : prelude + core]}
    if settings.exit_criterion not in ("latent_diff", "cosine"):
        parts["coda"] = layer_types[prelude + core :]
    for part, names in parts.items():
        other = sorted(set(names) - {"full_attention"})
        if other:
            raise ValueError(
                f"exit_criterion={settings.exit_criterion!r}: the {part} holds {', '.join(other)}, which carries more from "
                "token to token than the keys and values that an exited token leaves behind; use full_attention there"
                + (", or the criterion 'latent_diff'" if part == "coda" else ", or no early exit")
            )


def split_steps(
    num_steps: int | tuple[int, int], backprop_depth: int
) -> tuple[int, int]:  # (without gradient, with gradient)
    """How many steps run without and with gradient. An int r keeps the last min(r, k); a pair says both."""
    if isinstance(num_steps, tuple | list):
        if len(num_steps) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in num_steps):
            raise ValueError(f"num_steps is {num_steps!r}; a pair is (steps without gradient, steps with), both >= 0")
        if sum(num_steps) < 1:
            raise ValueError("num_steps is (0, 0); the core must run at least once")
        return num_steps[0], num_steps[1]
    _at_least_one("num_steps", num_steps)
    return max(num_steps - backprop_depth, 0), min(num_steps, backprop_depth)


def _at_least_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def with_changes(config: ModularDecoderConfig, **changes: Any) -> None:
    """Writes settings into `config.recurrent` and checks them."""
    config.recurrent = {**(config.recurrent or {}), **changes}
    unknown = set(changes) - {field.name for field in dataclasses.fields(RecurrentSettings)}
    if unknown:
        raise ValueError(f"recurrent has no settings {sorted(unknown)}")
    check_settings(config)
