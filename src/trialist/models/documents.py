"""Whether a model keeps packed documents apart: tried out, not looked up."""

from __future__ import annotations

import torch
from torch import nn

from trialist.models.scoring import selected_logprobs


def keeps_documents_apart(model: nn.Module, token: int, device: torch.device) -> bool:
    """Whether documents score the same packed behind another as they do alone, in a batch of two rows.

    The packed difference is held against that of the same tokens run on as one document, which a model that ignores the
    restart cannot tell apart: one with recurrent layers, one that counts positions itself, or an attention kernel that
    reads restarts in batches of one row only. Call it in eval mode without gradients.
    token: a token id, for a model whose configuration does not tell its vocabulary.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or token + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 12), generator=generator).to(device)
    first = (5, 8)  # where the second document of each row begins
    restarting = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in first]).to(device)
    everything = torch.ones_like(tokens)
    try:
        packed = selected_logprobs(model, tokens, position_ids=restarting, labels=tokens)
    except TypeError:  # a model without positions takes no position ids
        return False
    joined = selected_logprobs(model, tokens, everything)
    leak = difference = 0.0
    for row, start in enumerate(first):
        second = slice(row, row + 1), slice(start, None)
        alone = selected_logprobs(model, tokens[second], everything[second])
        leak = max(leak, float((joined[second] - alone).abs().max()))
        difference = max(difference, float((packed[second] - alone).abs().max()))
    return difference <= max(0.05 * leak, 1e-6)
