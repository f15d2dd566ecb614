"""`selected_logprobs` against the head that TRL fuses with its loss: the same log-probabilities and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.conftest import VOCABULARY
from trialist.models import selected_logprobs

utils = pytest.importorskip("trl.trainer.utils", reason="the extra `trl` is not installed")


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_log_probabilities_and_gradients_are_those_of_trls_fused_head(
    family: Any, padded: tuple[Tensor, Tensor], name: str, tied: bool
) -> None:
    ids, mask = padded
    ids, mask = ids.flip(1), mask.flip(1)  # padding on the right, where both count positions alike
    scored = mask.bool() & (torch.arange(ids.shape[1]) >= torch.tensor([[4], [2], [9]]))
    weights = torch.randn(ids.shape[0], ids.shape[1] - 1, generator=torch.Generator().manual_seed(0))

    def gradients(model: Any, log_probs: Tensor) -> dict[str, Tensor]:
        (weights * log_probs).sum().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    ours, theirs = (family(name, tie_word_embeddings=tied) for _ in range(2))
    utils.add_fused_lm_head(theirs, outputs=("log_probs",))
    found = selected_logprobs(ours, ids, mask, scored)
    wanted = theirs(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~scored, -100), fused_lm_head=True
    ).log_probs
    wanted = wanted.masked_fill(~scored[:, 1:], 0.0)
    assert float(wanted.detach().min()) < -math.log(VOCABULARY) - 1  # so sharp that a shift would show
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found_gradients, wanted_gradients = gradients(ours, found), gradients(theirs, wanted)
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-3)
