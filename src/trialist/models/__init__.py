"""Architectures as Hugging Face models, swaps for existing models, loading, and log-probabilities of chosen tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from trialist.models.configuration import ModularDecoderConfig
from trialist.models.decoder import (
    ModularDecoderForCausalLM,
    ModularDecoderForSequenceClassification,
    ModularDecoderModel,
)
from trialist.models.flops import flops_per_token
from trialist.models.initialization import initialize_
from trialist.models.loading import count_parameters, load_model, model_digest
from trialist.models.scoring import selected_logprobs
from trialist.models.selective_attention import disable_selective_attention, enable_selective_attention
from trialist.models.selective_cache import SelectiveCacheLayer, StaticSelectiveCacheLayer
from trialist.models.selective_mixer import SelectiveAttention

__all__ = [
    "ModularDecoderConfig",
    "ModularDecoderForCausalLM",
    "ModularDecoderForSequenceClassification",
    "ModularDecoderModel",
    "SelectiveAttention",
    "SelectiveCacheLayer",
    "StaticSelectiveCacheLayer",
    "count_parameters",
    "disable_selective_attention",
    "enable_selective_attention",
    "flops_per_token",
    "initialize_",
    "load_model",
    "model_digest",
    "selected_logprobs",
]

AutoConfig.register(ModularDecoderConfig.model_type, ModularDecoderConfig, exist_ok=True)
AutoModel.register(ModularDecoderConfig, ModularDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(ModularDecoderConfig, ModularDecoderForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    ModularDecoderConfig, ModularDecoderForSequenceClassification, exist_ok=True
)
