"""Tiny nested models for tests of what acts on their precision."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from trialist.models.nested.precision import set_precision
from trialist.models.nested.quantizer import NestedQuantConfig
from trialist.weights.nested import quantize_nested

from ..models.conftest import FAMILIES, sharpen, tokens


def dense_model(name: str = "llama", **changes: Any) -> Any:
    """A model of a family."""
    config = FAMILIES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    sharpen(model)
    return model.eval()


def nested_model(name: str = "llama", bits: tuple[int, int] = (2, 4), **changes: Any) -> Any:
    """The same whose weights can be read at these bits, from the lowest to the highest, at which it is."""
    model = dense_model(name, **changes)
    quantize_nested(model, NestedQuantConfig(seed_bits=bits[0], parent_bits=bits[1], sensitivity="none"))
    set_precision(model, bits[1])
    return model


def padded_rows() -> tuple[Tensor, Tensor]:
    """Token ids (3, 11) and their mask; the second row has four tokens of padding on the left."""
    ids = tokens(3, 11)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask
