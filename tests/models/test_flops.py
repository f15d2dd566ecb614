from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trialist.models import count_parameters, flops_per_token


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gptneox"])
def test_count_equals_what_the_flop_counter_sees(family, name: str) -> None:
    model, ids = family(name, "eager"), torch.randint(3, 37, (2, 13))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    assert flops_per_token(model, 13) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.01)


def test_decoder_counts_two_per_matrix_weight_and_the_attention_terms(decoder) -> None:
    model = decoder("full_attention", "selective_attention", tie_word_embeddings=False)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert flops_per_token(model, 10) == 2 * matrices + 2 * (4 * 6 * 4 * 10)


def test_a_tied_head_still_computes(decoder) -> None:
    assert flops_per_token(decoder(), 9) == flops_per_token(decoder(tie_word_embeddings=False), 9)


def test_training_step_costs_three_forward_passes(family) -> None:
    model, ids = family("llama", "eager"), torch.randint(3, 37, (2, 13))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert 3 * flops_per_token(model, 13) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.01)


def test_a_weight_that_no_rule_covers_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(3, 4, 2))
    with pytest.raises(ValueError, match=r"FLOPs of 1\.weight"):
        flops_per_token(model, 5)


def test_count_parameters_counts_tied_weights_once_and_can_leave_out_frozen_ones(decoder) -> None:
    tied, untied = decoder(), decoder(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 37 * 24
    untied.lm_head.requires_grad_(False)
    assert count_parameters(untied, trainable=True) == count_parameters(tied)


def test_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        flops_per_token(transformers.LlamaModel(transformers.LlamaConfig(num_hidden_layers=0, vocab_size=5)), 0)
