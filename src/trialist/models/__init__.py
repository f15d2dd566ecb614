"""Architectures as Hugging Face models, swaps for existing models, loading, and log-probabilities of chosen tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from trialist.models.compact_cache.attention import compact_attention
from trialist.models.compact_cache.cache import CompactCache
from trialist.models.compact_cache.channels import KeyChannels
from trialist.models.compact_cache.tokens import SnapKV, TokenBudget
from trialist.models.compact_cache.values import QuantizedValues
from trialist.models.configuration import ModularDecoderConfig
from trialist.models.decoder import (
    ModularDecoderForCausalLM,
    ModularDecoderForSequenceClassification,
    ModularDecoderModel,
)
from trialist.models.deterministic import deterministic_scoring
from trialist.models.eviction.cache import EvictingCacheLayer, cache_bytes
from trialist.models.eviction.calibration import calibrate_budgets, get_budgets, set_budgets
from trialist.models.eviction.measure import kv_bytes
from trialist.models.eviction.policies import HeavyHitters, Recency
from trialist.models.eviction.swap import disable_eviction, enable_eviction
from trialist.models.flops import flops_per_token
from trialist.models.initialization import initialize_
from trialist.models.loading import count_parameters, load_model, model_digest
from trialist.models.nested.adapters import nested_lora
from trialist.models.nested.layer import NestedLinear
from trialist.models.nested.precision import (
    available_bits,
    get_precision,
    nested_bytes,
    precision,
    precision_dials,
    set_precision,
    train_around,
)
from trialist.models.nested.quantizer import NestedQuantConfig
from trialist.models.packed_attention import disable_packed_attention, enable_packed_attention
from trialist.models.peer.feed_forward import grow_experts, peer_metrics
from trialist.models.peer.layer import PEER
from trialist.models.recurrent.cache import RecurrentStateLayer
from trialist.models.recurrent.min_rnn import MinGRU, MinLSTM
from trialist.models.recurrent_depth.cache import RecurrentDepthCache
from trialist.models.recurrent_depth.convert import to_recurrent
from trialist.models.recurrent_depth.health import recurrence_gain, token_correlation
from trialist.models.recurrent_depth.loop import RecurrentDepth
from trialist.models.recurrent_depth.steps import set_mean_recurrence, set_num_steps, with_steps
from trialist.models.scoring import selected_logprobs
from trialist.models.selective_attention.cache import SelectiveCacheLayer, StaticSelectiveCacheLayer
from trialist.models.selective_attention.mixer import SelectiveAttention
from trialist.models.selective_attention.profile import memory_profile
from trialist.models.selective_attention.swap import disable_selective_attention, enable_selective_attention
from trialist.models.swaps import swap_ffn

__all__ = [
    "PEER",
    "CompactCache",
    "EvictingCacheLayer",
    "HeavyHitters",
    "KeyChannels",
    "MinGRU",
    "MinLSTM",
    "ModularDecoderConfig",
    "ModularDecoderForCausalLM",
    "ModularDecoderForSequenceClassification",
    "ModularDecoderModel",
    "NestedLinear",
    "NestedQuantConfig",
    "QuantizedValues",
    "Recency",
    "RecurrentDepth",
    "RecurrentDepthCache",
    "RecurrentStateLayer",
    "SelectiveAttention",
    "SelectiveCacheLayer",
    "SnapKV",
    "StaticSelectiveCacheLayer",
    "TokenBudget",
    "available_bits",
    "cache_bytes",
    "calibrate_budgets",
    "compact_attention",
    "count_parameters",
    "deterministic_scoring",
    "disable_eviction",
    "disable_packed_attention",
    "disable_selective_attention",
    "enable_eviction",
    "enable_packed_attention",
    "enable_selective_attention",
    "flops_per_token",
    "get_budgets",
    "get_precision",
    "grow_experts",
    "initialize_",
    "kv_bytes",
    "load_model",
    "memory_profile",
    "model_digest",
    "nested_bytes",
    "nested_lora",
    "peer_metrics",
    "precision",
    "precision_dials",
    "recurrence_gain",
    "selected_logprobs",
    "set_budgets",
    "set_mean_recurrence",
    "set_num_steps",
    "set_precision",
    "swap_ffn",
    "to_recurrent",
    "token_correlation",
    "train_around",
    "with_steps",
]

AutoConfig.register(ModularDecoderConfig.model_type, ModularDecoderConfig, exist_ok=True)
AutoModel.register(ModularDecoderConfig, ModularDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(ModularDecoderConfig, ModularDecoderForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    ModularDecoderConfig, ModularDecoderForSequenceClassification, exist_ok=True
)
