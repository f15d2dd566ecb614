"""The modular decoder as Hugging Face model classes: embedding, blocks of mixer and feed-forward, norm, head.

With `full_attention`, `swiglu`, `stack` and `norm_style="pre"` it computes what a Llama of the same sizes computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from trialist.models.attention import FullAttention
from trialist.models.configuration import DEPTHS, FEED_FORWARDS, MIXERS, STATEFUL_MIXERS, ModularDecoderConfig, resolve


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    residual_output = "down_proj"

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(GradientCheckpointingLayer):
    """One mixer and one feed-forward, each in a residual branch; `norm_style` says where the norms stand.

    A mixer is called as `mixer(x, padding_mask=, reset=, attention_mask=, position_embeddings=, position_ids=,
    past_key_values=)` and returns a tuple whose first element is the output; a feed-forward as `ffn(x, padding_mask=)`. `reset`
    is bool `(B, T)`, True at the first token of a packed document, None where a row holds one. Both name in
    `residual_output` the linear layer that writes to the residual stream, or None, and may carry
    `draw_initial_weights()` for parameters that no rule of transformers covers.
    """

    def __init__(self, config: ModularDecoderConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        assert config.ffn_types is not None
        self.sandwich = config.norm_style == "sandwich"

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.mixer_norm, self.ffn_norm = norm(), norm()
        if self.sandwich:
            self.mixer_stream_norm, self.ffn_stream_norm = norm(), norm()
        self.mixer = resolve(MIXERS, config.layer_types[layer_idx])(config, layer_idx)
        self.ffn = resolve(FEED_FORWARDS, config.ffn_types[layer_idx])(config, layer_idx)
        for branch in (self.mixer, self.ffn):
            if branch.residual_output is not None:  # read where the initial weights are drawn
                getattr(branch, branch.residual_output).is_residual_output = True

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`(B, T, hidden_size)`; padding_mask: bool `(B, T)`, False at padding, None where there is none."""
        x = x + self.mixer(self.mixer_norm(x), padding_mask=padding_mask, **kwargs)[0]
        if self.sandwich:
            x = self.mixer_stream_norm(x)
        x = x + self.ffn(self.ffn_norm(x), padding_mask=padding_mask)
        return self.ffn_stream_norm(x) if self.sandwich else x


class Stack(nn.ModuleList):
    """Depth as a plain stack: every block once, in order.

    A depth is called as `depth(x, norm=, ...)` with the arguments of the blocks, and returns the states before the final
    norm and a dict of further fields of the output. It may name further arguments of `forward` and `generate` in
    `call_options`, ask for the head with `reads_head = True`, arrange the cache in `prepare_cache(cache, options, speculates=)`,
    go without a cache in training with `trains_without_cache = True`, name in `scoring_arguments` what log-probabilities are
    computed with, and draw initial weights in `draw_weights_of(module, config)`.
    """

    call_options: tuple[str, ...] = ()

    def __init__(self, config: ModularDecoderConfig) -> None:
        super().__init__(DecoderBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))

    def forward(self, x: Tensor, norm: nn.Module | None = None, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        for block in self:
            x = block(x, **kwargs)
        return x, {}


@dataclass
class ModularDecoderOutput(BaseModelOutputWithPast):
    """num_steps: with recurrent depth, the steps that each token ran, (B, T).

    latent_states: on demand (`output_latent_states=True`), s_0 to s_r, (B, T, hidden_size) each.
    """

    num_steps: Tensor | None = None
    latent_states: tuple[Tensor, ...] | None = None


@dataclass
class ModularDecoderCausalLMOutput(CausalLMOutputWithPast):
    """`num_steps` and `latent_states` as in `ModularDecoderOutput`."""

    num_steps: Tensor | None = None
    latent_states: tuple[Tensor, ...] | None = None


class ModularDecoderPreTrainedModel(PreTrainedModel):
    config: ModularDecoderConfig
    config_class = ModularDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DecoderBlock,
        "attentions": OutputRecorder(FullAttention, index=1),
    }

    @property
    def _is_stateful(self) -> bool:  # transformers then refuses assisted decoding, which takes tokens back
        return bool(set(STATEFUL_MIXERS) & set(self.config.layer_types or []))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "draw_initial_weights"):
            module.draw_initial_weights()
        if getattr(module, "is_residual_output", False):
            # as in GPT-2: with the plain rule the sum of the branches drowns the token's own embedding at the start, the
            # more so the more heads there are, and a wide attention learns late for no reason of its own
            scale = self.config.initializer_range / math.sqrt(2 * self.config.effective_depth)
            init.normal_(module.weight, mean=0.0, std=scale)
        spread = self.config.embedding_initializer_range
        if spread is not None and isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=spread)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        depth = resolve(DEPTHS, self.config.depth)
        if hasattr(depth, "draw_weights_of"):
            depth.draw_weights_of(module, self.config)


class ModularDecoderModel(ModularDecoderPreTrainedModel):
    """The decoder without a head; `last_hidden_state` is `(B, T, hidden_size)` after the final norm."""

    def __init__(self, config: ModularDecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = resolve(DEPTHS, config.depth)(config)
        self.attends = any(isinstance(module, FullAttention) for module in self.layers.modules())
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def scoring_arguments(self) -> dict[str, Any]:
        """Further arguments of a pass that scores a text."""
        return getattr(self.layers, "scoring_arguments", {})

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModularDecoderOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, hidden_size)
        given = past_key_values  # with a cache, even an empty one, transformers does not look for packed documents
        if self._is_stateful and not (attention_mask is None or _is_padding(attention_mask)):
            raise ValueError(
                f"attention_mask is {_in_words(attention_mask)}, which says who sees whom; a recurrent layer has seen all "
                "that came before and takes a padding mask (B, T), packed documents go by position_ids"
            )
        reset = None
        if position_ids is not None and attention_mask is None:
            reset = self._restarts(position_ids.expand(len(x), -1), given)
        if self.training and getattr(self.layers, "trains_without_cache", False):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + past).unsqueeze(0)
        padding_mask = None
        if isinstance(attention_mask, Tensor) and _is_padding(attention_mask):
            padding_mask = attention_mask[:, -x.shape[1] :].bool()
        mask = None
        if isinstance(attention_mask, dict):  # `generate` builds the masks itself where it compiles the decoding step
            mask = attention_mask["full_attention"]
        elif self.attends:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=given,
                position_ids=position_ids,
            )
        x, further = self.layers(
            x,
            norm=self.norm,
            attention_mask=mask,
            padding_mask=padding_mask,
            reset=reset,
            position_embeddings=self.rotary_emb(x, position_ids=position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return ModularDecoderOutput(last_hidden_state=self.norm(x), past_key_values=past_key_values, **further)

    def _restarts(self, position_ids: Tensor, cache: Cache | None) -> Tensor | None:
        """Bool `(B, T)`, True at the first token of a document, as transformers finds them; None where no layer needs to know.

        position_ids: `(B, T)` of rows without a padding mask. Raises ValueError where the cache holds what the attention
        layers would see of another document.
        """
        if not self._is_stateful and (cache is None or not self.attends):
            return None
        starts = position_ids == 0
        starts[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        if torch.compiler.is_compiling():  # which cannot look at numbers
            return starts if self._is_stateful else None
        continued = cache is not None and int(cache.get_seq_length()) > 0
        if not (starts if continued else starts[:, 1:]).any():
            return None
        if cache is not None and self.attends:
            raise ValueError(
                "position_ids start a document anew, and with past_key_values the attention layers would see the one before; "
                "pack documents without a cache, and give each a cache of its own to go on from"
            )
        return starts


def _is_padding(attention_mask: object) -> bool:
    return isinstance(attention_mask, Tensor) and attention_mask.dim() == 2


def _in_words(attention_mask: object) -> str:
    if isinstance(attention_mask, Tensor):
        return f"of shape {tuple(attention_mask.shape)}"
    return f"a {type(attention_mask).__name__}"


class ModularDecoderForCausalLM(ModularDecoderPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head, tied to the embedding unless the configuration says otherwise."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ModularDecoderConfig) -> None:
        super().__init__(config)
        self.model = ModularDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ModularDecoderCausalLMOutput:
        head = {"head": self.lm_head} if getattr(self.model.layers, "reads_head", False) else {}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **head,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])  # (B, T | logits_to_keep, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return ModularDecoderCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            num_steps=outputs.num_steps,
            latent_states=outputs.latent_states,
        )

    def with_steps(self, num_steps: int, **options: Any) -> Self:
        """A model with the same weights that runs `num_steps` steps of recurrent depth, for example to draft for this one."""
        from trialist.models.recurrent_depth.steps import with_steps

        return with_steps(self, num_steps, **options)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = self.model.layers.call_options
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in own})

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        for name in self.model.layers.call_options:  # a call's own value has been written into the configuration by now
            if hasattr(generation_config, name):
                model_kwargs[name] = getattr(generation_config, name)
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and hasattr(self.model.layers, "prepare_cache"):
            speculates = generation_mode == GenerationMode.ASSISTED_GENERATION
            self.model.layers.prepare_cache(cache, model_kwargs, speculates=speculates)
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()


class ModularDecoderForSequenceClassification(GenericForSequenceClassification, ModularDecoderPreTrainedModel):
    """The decoder with a linear score of the last token that is not padding."""
