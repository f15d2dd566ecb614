"""Configuration of the modular decoder: one decoder whose mixer, feed-forward and depth are chosen by name.

The three registries map a name to `module:Class`, imported when a model is built. A new architecture adds a line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from trialist.models.eviction.budgets import spread_budgets

MIXERS = {
    "conv_attention": "trialist.models.recurrent.conv_attention:ConvolvedAttention",
    "full_attention": "trialist.models.attention:FullAttention",
    "gru": "trialist.models.recurrent.mixer:GRUMixer",
    "min_gru": "trialist.models.recurrent.mixer:MinGRUMixer",
    "min_lstm": "trialist.models.recurrent.mixer:MinLSTMMixer",
    "selective_attention": "trialist.models.selective_attention.mixer:SelectiveAttention",
}
"""`layer_types`: what mixes the tokens of a layer"""

RECURRENT_MIXERS = ("gru", "min_gru", "min_lstm")
"""Mixers that are a recurrent state and no keys and values"""

STATEFUL_MIXERS = (*RECURRENT_MIXERS, "conv_attention")
"""Mixers that carry something from token to token which cannot be cropped; they read `min_rnn`"""

FEED_FORWARDS = {
    "gelu": "trialist.models.gelu_feed_forward:GELUFeedForward",
    "peer": "trialist.models.peer.feed_forward:PEERFeedForward",
    "swiglu": "trialist.models.decoder:SwiGLU",
}
"""`ffn_types`: what follows the mixer in a layer"""

DEPTHS = {
    "recurrent": "trialist.models.recurrent_depth.loop:RecurrentDepth",
    "stack": "trialist.models.decoder:Stack",
}
"""`depth`: how the layers are run"""

SETTINGS: dict[str, dict[str, Any]] = {
    "recurrent": {
        "prelude_layers": None,
        "core_layers": None,
        "coda_layers": None,
        "mean_recurrence": 32,
        "backprop_depth": 8,
        "recurrence_sigma": 0.5,
        "train_recurrence": "poisson_lognormal",
        "injection": "concat",
        "core_norm": True,
        "state_init": "normal",
        "state_std": None,
        "embedding_scale": None,
        "initialization": "default",
        "seed": 0,
        "num_steps": None,
        "kv_slots": None,
        "exit_criterion": None,
        "exit_threshold": None,
        "min_steps": 1,
        "check_every": 1,
        "warm_start": False,
    },
    "min_rnn": {
        "expansion": 1.0,
        "conv_kernel": 4,
        "activation": "g",
        "bias": True,
        "gate_bias_init": 0.0,
        "backend": "auto",
    },
    "peer": {
        "num_experts": 1024**2,
        "num_heads": 8,
        "top_k": 16,
        "key_dim": 128,
        "activation": "gelu",
        "score": "softmax",
        "query_norm": "batchnorm",
        "glu": False,
        "sparse_grad": False,
        "backend": "auto",
        "learning_rate_scale": 1.0,
        "generations": None,
    },
    "selective": {"selector_head": 0, "protect_bos": True, "budgets": None},
}
"""The fields of the configuration that hold the settings of one architecture, with their keys and defaults"""


def resolve(registry: Mapping[str, str], name: str) -> Any:
    """The class that `registry` holds under `name`."""
    module, attribute = registry[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def _check(registry: Mapping[str, str], field: str, name: str) -> None:
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field}: {name!r} is unknown.{hint} Known: {', '.join(sorted(registry))}")


@strict
class ModularDecoderConfig(PreTrainedConfig):
    """A causal decoder: token embedding, `num_hidden_layers` blocks of mixer and feed-forward, RMSNorm, head.

    `layer_types` and `ffn_types` name one mixer and one feed-forward a layer; None is `full_attention` and `swiglu`
    everywhere, which is a Llama. Raises ValueError for an unknown name, a list of the wrong length and head counts that
    do not divide.
    """

    model_type = "modular_decoder"
    keys_to_ignore_at_inference = ["past_key_values", "num_steps", "latent_states"]
    auto_map: ClassVar[dict[str, str]] = {}  # saved models bring no code; TRL asks configurations it does not know

    vocab_size: int = 32000
    hidden_size: int = 256
    """Width of the residual stream"""
    intermediate_size: int = 704
    """Inner width of the feed-forward"""
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Key/value heads, a divisor of `num_attention_heads`; None is as many as query heads"""
    head_dim: int | None = None
    """Width of one head, even; None is hidden_size / num_attention_heads"""
    layer_types: list[str] | None = None
    ffn_types: list[str] | None = None
    depth: str = "stack"
    norm_style: str = "pre"
    """`pre`: x + f(norm(x)).  `sandwich`: norm(x + f(norm(x))), the stream itself is normalised (arXiv 2502.05171)"""
    min_rnn: dict | None = None
    """Mixers `min_gru`, `min_lstm` and `gru`: `expansion` (state over stream width, default 1.0), `conv_kernel` (taps of
    the causal convolution before the gates, default 4, None for none), `bias`; not for `gru`: `activation`,
    `gate_bias_init` and `backend` as in `trialist.models.MinGRU`; for `conv_attention`: `conv_kernel`. What no layer reads is
    refused"""
    peer: dict | None = None
    """Feed-forward `peer`: the arguments of `trialist.models.PEER`, and `generations` of a pool of experts that grew"""
    recurrent: dict | None = None
    """Recurrent depth (`depth="recurrent"`): the settings of `trialist.models.recurrent_depth.settings`"""
    selective: dict | None = None
    """Selective attention: `selector_head` (default 0), `protect_bos` (default True) and `budgets`: how many tokens a layer
    keeps, one number for all or one a selective layer in order, None for all tokens (default None)"""
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention_bias: bool | str = False
    """Bias of the projections of attention: of all four, or with `qk` of those of queries and keys (arXiv 2502.05171)"""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights"""
    embedding_initializer_range: float | None = None
    """Standard deviation of the initial token embeddings (1.0 suits small untied models); None is `initializer_range`"""
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.ffn_types is None:
            self.ffn_types = ["swiglu"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def settings(self, field: str) -> dict[str, Any]:
        """The settings of one architecture (a key of `SETTINGS`): what was given, defaults for the rest."""
        return {**SETTINGS[field], **(getattr(self, field) or {})}

    @property
    def effective_depth(self) -> int:
        """Layers that a token passes: `num_hidden_layers`, those of a recurrent core as often as they run on average."""
        if self.depth != "recurrent":
            return self.num_hidden_layers
        from trialist.models.recurrent_depth.settings import effective_depth

        return effective_depth(self)

    @property
    def linear_std(self) -> float:
        """Standard deviation of the initial weights of a linear layer inside a branch."""
        if self.depth != "recurrent":
            return self.initializer_range
        from trialist.models.recurrent_depth.settings import linear_std

        return linear_std(self)

    def validate_layer_type(self) -> None:
        """Every slot holds a known name and every layer has one."""
        for field, registry in (("layer_types", MIXERS), ("ffn_types", FEED_FORWARDS)):
            names = getattr(self, field) or []
            for name in names:
                _check(registry, field, name)
            if len(names) != self.num_hidden_layers:
                raise ValueError(
                    f"{field} names {len(names)} layers, num_hidden_layers is {self.num_hidden_layers}; give one "
                    "name a layer"
                )
        _check(DEPTHS, "depth", self.depth)

    def validate_architecture(self) -> None:
        """Head counts and widths fit."""
        heads, groups, width = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if groups is None or heads % groups:
            raise ValueError(f"num_key_value_heads is {groups}; it must divide num_attention_heads, which is {heads}")
        if width is None or width < 2 or width % 2:
            raise ValueError(
                f"head_dim is {width}; rotary embeddings need an even one. Without head_dim it is "
                f"hidden_size / num_attention_heads = {self.hidden_size} / {heads}"
            )
        if self.attention_bias not in (True, False, "qk"):
            raise ValueError(f"attention_bias is {self.attention_bias!r}; choose True, False or 'qk'")
        if self.norm_style not in ("pre", "sandwich"):
            raise ValueError(f"norm_style is {self.norm_style!r}; choose 'pre' or 'sandwich'")
        for field, known in SETTINGS.items():
            unknown = set(getattr(self, field) or {}) - set(known)
            if unknown:
                raise ValueError(f"{field} holds unknown keys {sorted(unknown)}; known are {', '.join(known)}")
        stateful = set(STATEFUL_MIXERS) & set(self.layer_types or [])
        if stateful or self.min_rnn:
            from trialist.models.recurrent.checks import check_configuration

            check_configuration(stateful, self.min_rnn, self.settings("min_rnn"), self.hidden_size)
        if "peer" in (self.ffn_types or []):
            from trialist.models.peer.layer import check_peer

            check_peer(**self.settings("peer"))
        if self.depth == "recurrent":
            from trialist.models.recurrent_depth.settings import check_settings

            check_settings(self)
        spread_budgets(
            self.settings("selective")["budgets"],
            (self.layer_types or []).count("selective_attention"),
            "selective.budgets",
        )
        selector = self.settings("selective")["selector_head"]
        if "selective_attention" in (self.layer_types or []) and not 0 <= selector < heads:
            raise ValueError(
                f"selective.selector_head is {selector}; it must be one of the {heads} heads (0 to {heads - 1})"
            )
