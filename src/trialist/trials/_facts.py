"""What the trials on generated facts share: decoders of equal FLOPs, facts as a model's tokens, recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trialist.engine.context import Context
from trialist.trials._language_model import new_decoder

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LENGTH = 3
"""Tokens of a fact: two keys and the value"""
SCORED = 4096
"""Facts scored at once"""


def fact_decoder(
    context: Context, *, device: str, vocab_size: int, layers: int, width: int, heads: int, **architecture: Any
) -> PreTrainedModel:
    """A small decoder for facts; architecture: further fields of its configuration."""
    return new_decoder(
        context, device=device, vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=8, **architecture,
    )  # fmt: skip


def swap_in_experts(model: PreTrainedModel, layer: int | None, settings: Mapping[str, Any], seed: int) -> int:
    """Puts a PEER layer, its weights drawn from `seed`, in place of the feed-forward of `layer` of a given model, by default the
    middle one; returns which."""
    import torch

    from trialist.models.swaps import swap_ffn

    chosen = model.config.get_text_config(decoder=True).num_hidden_layers // 2 if layer is None else layer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swap_ffn(model, [chosen], "peer", **settings)
    return chosen


def dense_width(kind: str, target: PreTrainedModel, quantity: Callable[[nn.Module], float]) -> int:
    """The least inner width at which a dense decoder of feed-forwards `kind`, alike in all else, has at least the FLOPs,
    parameters, or other `quantity` of `target` that grow by equal steps with the width."""
    import math

    import torch

    from trialist.models.configuration import ModularDecoderConfig
    from trialist.models.decoder import ModularDecoderForCausalLM

    fields = {**target.config.to_dict(), "ffn_types": [kind] * target.config.num_hidden_layers, "peer": None}

    def of_width(width: int) -> float:
        with torch.device("meta"):
            return quantity(ModularDecoderForCausalLM(ModularDecoderConfig(**{**fields, "intermediate_size": width})))

    narrow, step = of_width(8), of_width(9) - of_width(8)
    return max(8, 8 + math.ceil((quantity(target) - narrow) / step))


def as_tokens(batch: Mapping[str, Tensor], symbols: Tensor, device: str) -> dict[str, Any]:
    """A batch of facts in a model's token ids: `symbols` holds one for each symbol of the task."""
    labels = batch["labels"]
    named = {
        "input_ids": symbols[batch["input_ids"]],
        "labels": symbols[labels.clamp(min=0)].where(labels >= 0, labels),
    }
    return {name: tensor.to(device) for name, tensor in named.items()}


def recall(model: Any, facts: Tensor, symbols: Tensor, device: str) -> dict[str, float]:
    """`recall`: share of facts whose value is the most probable token after its keys. `loss`: nats per fact. In evaluation."""
    import torch

    training = model.training
    model.eval()
    right = nats = 0.0
    with torch.no_grad():
        for part in facts.split(SCORED):
            tokens = symbols[part].to(device)  # (B, 3)
            logits = model(input_ids=tokens[:, :2], logits_to_keep=1, use_cache=False).logits[:, -1].float()  # (B, V)
            right += float((logits.argmax(-1) == tokens[:, 2]).sum())
            nats += float(torch.nn.functional.cross_entropy(logits, tokens[:, 2], reduction="sum"))
    model.train(training)
    return {"recall": right / len(facts), "loss": nats / len(facts)}
