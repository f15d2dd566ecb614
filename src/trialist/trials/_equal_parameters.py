"""Decoders of different make with equally many parameters: what a mixer lacks, the feed-forward gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameters(fields: Mapping[str, Any]) -> int:
    """Parameters of the decoder with these fields of `ModularDecoderConfig`, counted without allocating them."""
    import torch

    from trialist.models.configuration import ModularDecoderConfig
    from trialist.models.decoder import ModularDecoderForCausalLM

    with torch.device("meta"):
        return ModularDecoderForCausalLM(ModularDecoderConfig(tie_word_embeddings=False, **fields)).num_parameters()


def widened(fields: Mapping[str, Any], least: int) -> dict[str, Any]:
    """The fields with the narrowest SwiGLU, not narrower than given, that brings the parameters to `least` or above."""
    missing = max(0, least - parameters(fields))
    row = 3 * fields["hidden_size"] * fields["num_hidden_layers"]  # parameters of one hidden unit in every layer
    return {**fields, "intermediate_size": fields["intermediate_size"] + -(-missing // row)}
