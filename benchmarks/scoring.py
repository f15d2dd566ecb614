"""Log-probabilities of completions, forward and backward: scored positions only, against TRL's fused head and full logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare, threads
from trialist.models.flops import flops_per_token
from trialist.models.scoring import selected_logprobs

VOCABULARY, WIDTH, ROWS, LENGTH = 32_768, 256, 4, 256
SHARES = {"a fifth": 0.8, "all": 0.0}
"""Which part of a row is completion -> where the completion starts"""
OURS, FUSED, OF_DPO, FULL = "selected_logprobs", "TRL's fused head", "TRL's fused head as DPO calls it", "full logits"
DPO_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def contenders(share: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> a forward and backward pass that returns the log-probabilities (ROWS, LENGTH - 1)."""
    from trl.trainer.utils import add_fused_lm_head

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, int(SHARES[share] * LENGTH) :] = True
    labels = ids.masked_fill(~counts, -100)

    def ours(scored: LlamaForCausalLM) -> Tensor:
        return selected_logprobs(scored, ids, completion_mask=counts)

    def fused(scored: LlamaForCausalLM) -> Tensor:
        return scored(input_ids=ids, labels=labels, fused_lm_head=True).log_probs

    def full(scored: LlamaForCausalLM) -> Tensor:
        log_p = scored(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return log_p.gather(-1, ids[:, 1:, None])[..., 0] * counts[:, 1:]

    def both_ways(score: Callable[[LlamaForCausalLM], Tensor], outputs: tuple[str, ...] = ()) -> Callable[[], Tensor]:
        scored = model()
        if outputs:
            add_fused_lm_head(scored, outputs=outputs)
        return functools.partial(_forward_and_backward, score, scored)

    return {
        OURS: both_ways(ours),
        FUSED: both_ways(fused, ("log_probs",)),
        OF_DPO: both_ways(fused, DPO_OUTPUTS),
        FULL: both_ways(full),
    }


def _forward_and_backward(score: Callable[[LlamaForCausalLM], Tensor], scored: LlamaForCausalLM) -> Tensor:
    scored.zero_grad(set_to_none=True)
    log_probs = score(scored)
    log_probs.sum().backward()
    return log_probs.detach()


def rows() -> list[Row]:
    found = []
    for share in SHARES:
        runs = contenders(share)
        values = {name: run() for name, run in runs.items()}
        for name in runs:
            torch.testing.assert_close(values[name], values[FULL], rtol=1e-4, atol=1e-4)
        count = min(2, torch.get_num_threads())
        with threads(count):
            work = f"{ROWS} x {LENGTH} tokens, {share} scored, V={VOCABULARY:,} d={WIDTH}, fp32, {count} threads"
            result = compare(runs, work=work, limit=_limit(share))
        memory = {name: peak_memory("benchmarks.scoring", share, name) for name in runs}
        for peer, target in ((FUSED, 0.5 if share == "a fifth" else 1.0), (OF_DPO, None), (FULL, None)):
            row = result.row(OURS, peer, at_most=target)
            found.append(
                dataclasses.replace(
                    row,
                    measured=f"{row.measured}; {memory[OURS]:.0f} MB",
                    against=f"{row.against}; {memory[peer]:.0f} MB",
                )
            )
    return found


def _limit(share: str) -> Limit:
    """Products of all tokens through the body and of the scored ones through the head; weights and gradients moved."""
    tokens, head = ROWS * LENGTH, 2 * WIDTH * VOCABULARY
    scored = ROWS * (LENGTH - max(1, int(SHARES[share] * LENGTH)))
    body = flops_per_token(model(), LENGTH) - head
    size = sum(parameter.numel() for parameter in model().parameters())
    return Limit(flops=3 * (body * tokens + head * scored), bytes=4 * size * 3)


def measured(share: str, name: str) -> Callable[[], Tensor]:
    return contenders(share)[name]
