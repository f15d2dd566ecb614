"""The settings of recurrent depth: what a configuration says of it, and what one call may say instead."""

from __future__ import annotations

import copy
import math
import numbers
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
    "exit_criterion": (None, "kl", "minp_kl", "entropy_diff", "latent_diff", "cosine", "argmax"),
}
THRESHOLDS = {"kl": 5e-4, "minp_kl": 1e-5, "entropy_diff": 1e-3, "latent_diff": 0.03, "cosine": 1e-3, "argmax": 5}
"""Where a token exits when no threshold is given; that of `kl` is the paper's"""
LATENT = ("latent_diff", "cosine")
"""Criteria that read the state alone; the others pass the coda and the head at each look"""
SWITCHES = ("kv_slots", "exit_criterion")
"""Call options that None switches off"""
EXIT_OPTIONS = ("exit_threshold", "min_steps", "check_every")
CALL_OPTIONS = ("num_steps", *SWITCHES, *EXIT_OPTIONS, "warm_start")
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
    """A token stops when the criterion falls below it: 0 never, infinity at the first look. With `argmax` it stops when so many
    looks in a row found the most probable token of the look before: 0 at the first look, infinity never. None is the default
    of the criterion"""
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
            whole(name, getattr(self, name))
        whole("seed", self.seed, least=0)
        for name in ("num_steps", "kv_slots"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        for name in ("core_norm", "warm_start"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"recurrent.{name} is {getattr(self, name)!r}; it must be True or False")
        for name in ("recurrence_sigma", "state_std"):
            value = getattr(self, name)
            if not (value is None and name == "state_std") and not (_is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"recurrent.{name} is {value!r}; it must be a finite number of at least 0")
        if self.exit_threshold is not None and not (_is_number(self.exit_threshold) and self.exit_threshold >= 0):
            raise ValueError(f"recurrent.exit_threshold is {self.exit_threshold!r}; it must be a number of at least 0")
        scale = self.embedding_scale
        if scale not in (None, "sqrt_width") and not (_is_number(scale) and math.isfinite(scale)):  # type: ignore[arg-type]
            raise ValueError(f"recurrent.embedding_scale is {scale!r}; it must be a finite number or 'sqrt_width'")
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
    """The settings of `config`, changed by the call options in `given`.

    None switches `exit_criterion` and `kv_slots` off, and leaves the other options as the configuration has them. A criterion
    other than the configured one comes with its own threshold. Raises ValueError for options of an exit where no token exits.
    """
    return RecurrentSettings(**{**config.settings("recurrent"), **_changes(config, given or {})})


def _changes(config: ModularDecoderConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    changes = {name: value for name, value in given.items() if value is not None or name in SWITCHES}
    configured = config.settings("recurrent")["exit_criterion"]
    criterion = changes.get("exit_criterion", configured)
    orphans = [name for name in EXIT_OPTIONS if name in changes]
    if criterion is None and orphans:
        raise ValueError(
            f"{orphans[0]}={changes[orphans[0]]!r} says when tokens exit, and in this pass none does; give exit_criterion too, "
            f"or leave {orphans[0]} out"
        )
    if criterion != configured:
        changes.setdefault("exit_threshold", None)
    return changes


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


def linear_std(config: ModularDecoderConfig) -> float:
    """Standard deviation of the initial weights of a linear layer inside a branch, by `initialization`."""
    takase = settings_of(config).initialization == "takase"
    return math.sqrt(2 / (5 * config.hidden_size)) if takase else config.initializer_range


def check_settings(config: ModularDecoderConfig) -> None:
    """Raises ValueError for settings that cannot work."""
    settings = settings_of(config)
    layer_counts(config)
    if settings.exit_criterion is not None:
        check_exit(settings, config, settings.steps)
    elif settings.exit_threshold is not None:
        raise ValueError(
            f"recurrent.exit_threshold is {settings.exit_threshold} and exit_criterion is None; a threshold belongs to a "
            "criterion"
        )


def check_exit(settings: RecurrentSettings, config: ModularDecoderConfig, steps: int) -> None:
    """Raises ValueError where a token's early exit is not defined for the layers, or comes after the last of the steps."""
    if settings.min_steps > steps:
        raise ValueError(f"min_steps is {settings.min_steps}, more than num_steps, which is {steps}")
    prelude, core, _ = layer_counts(config)
    layer_types = list(config.layer_types or [])
    parts = {"core": layer_types[prelude : prelude + core]}
    if settings.exit_criterion not in LATENT:
        parts["coda"] = layer_types[prelude + core :]
    for part, names in parts.items():
        other = sorted(set(names) - {"full_attention"})
        if other:
            raise ValueError(
                f"exit_criterion={settings.exit_criterion!r}: the {part} holds {', '.join(other)}, which carries more from "
                "token to token than the keys and values that an exited token leaves behind; use full_attention there"
                + (", or the criterion 'latent_diff'" if part == "coda" else ", or no early exit")
            )


def check_speculation(settings: RecurrentSettings, config: ModularDecoderConfig, steps: int) -> None:
    """Raises ValueError where checking several drafted tokens in one pass is another computation than decoding them."""
    reason = None
    if settings.warm_start:
        reason = "warm_start=True: a token starts from the final state of the token before, which one pass over both has not got"
    elif settings.kv_slots is not None and settings.kv_slots < steps:
        reason = (
            f"kv_slots={settings.kv_slots} of {steps} steps: a decoded token meets the latest keys of tokens before it, in one "
            "pass it meets those of its own step"
        )
    elif settings.exit_criterion not in (None, *LATENT) and layer_counts(config)[2]:
        reason = (
            f"exit_criterion={settings.exit_criterion!r}: it looks through the coda, where in one pass the tokens before are "
            "still on their way; 'latent_diff' and 'cosine' do not"
        )
    if reason is not None:
        raise ValueError(
            "speculation (assistant_model, prompt_lookup_num_tokens) would not write what plain decoding writes with "
            f"{reason}. Leave one of the two out"
        )


def split_steps(
    num_steps: int | tuple[int, int], backprop_depth: int
) -> tuple[int, int]:  # (without gradient, with gradient)
    """How many steps run without and with gradient. An int r keeps the last min(r, k); a pair says both."""
    if isinstance(num_steps, tuple | list):
        if len(num_steps) != 2 or not all(_is_whole(n) and n >= 0 for n in num_steps):
            raise ValueError(f"num_steps is {num_steps!r}; a pair is (steps without gradient, steps with), both >= 0")
        if sum(num_steps) < 1:
            raise ValueError("num_steps is (0, 0); the core must run at least once")
        return int(num_steps[0]), int(num_steps[1])
    steps = whole("num_steps", num_steps)
    return max(steps - backprop_depth, 0), min(steps, backprop_depth)


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int. Raises ValueError for anything but a whole number (also NumPy's) of at least `least`."""
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def with_changes(config: ModularDecoderConfig, **given: Any) -> None:
    """Writes call options, or `mean_recurrence`, into `config.recurrent`. What cannot work raises ValueError and leaves the
    configuration as it was."""
    unknown = sorted(set(given) - {*CALL_OPTIONS, "mean_recurrence"})
    if unknown:
        raise ValueError(f"{unknown[0]} is no call option of recurrent depth; those are {', '.join(CALL_OPTIONS)}")
    changes = {name: int(value) if _is_whole(value) else value for name, value in _changes(config, given).items()}
    changed = copy.copy(config)
    changed.recurrent = {**(config.recurrent or {}), **changes}
    check_settings(changed)
    config.recurrent = changed.recurrent
