"""A tiny Llama and batches of random tokens: unequal sizes, padding on the right, some tokens that do not count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def tiny_llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def batches() -> Callable[[int], dict[str, Tensor]]:
    """Three rows of eleven tokens; row r of batch i ends in (i + r) % 4 tokens of padding; prompts do not count."""

    def batch(index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        input_ids = torch.randint(VOCABULARY, (3, 11), generator=generator)
        padding = torch.tensor([(index + row) % 4 for row in range(3)])
        mask = (torch.arange(11) < 11 - padding[:, None]).long()
        labels = input_ids.masked_fill(mask == 0, -100)
        labels[:, : 1 + index % 3] = -100
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    return batch
