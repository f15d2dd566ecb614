"""Guided decoding: one forward pass of all branches against transformers' classifier-free guidance, which takes two."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timer import Limit, Row, compare, threads
from trialist.decoding import ContrastiveGuidance, generate

SIZES = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT, PRINCIPLE, NEW, SCALE = 48, 16, 16, 1.5
REPEATS = 20


def rows() -> list[Row]:
    """The shape of SmolLM2-135M with a fifth of its layers and its whole vocabulary; greedy, so that tokens can be compared."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with threads(2):
        return [row for batch in (1, 4, 16) for row in _decoding(model, batch)]


def _decoding(model: LlamaForCausalLM, batch: int) -> list[Row]:
    generator = torch.Generator().manual_seed(batch)
    plain = torch.randint(3, SIZES["vocab_size"], (batch, PROMPT), generator=generator)
    context = torch.cat([torch.randint(3, SIZES["vocab_size"], (batch, PRINCIPLE), generator=generator), plain], 1)
    option = ContrastiveGuidance.classifier_free([context.tolist()], SCALE)
    fixed = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = functools.partial(generate, model, [option], plain, **fixed)
    theirs = functools.partial(model.generate, context, guidance_scale=SCALE, negative_prompt_ids=plain, **fixed)
    if not torch.equal(ours()[:, PROMPT:], theirs()[:, PROMPT + PRINCIPLE :]):
        raise AssertionError("the two guided decodings differ in their tokens")
    weights = sum(parameter.numel() for parameter in model.parameters())
    tokens = 2 * batch * NEW + batch * (2 * PROMPT + PRINCIPLE)
    head = SIZES["vocab_size"] * SIZES["hidden_size"]
    limit = Limit(flops=2 * (weights - head) * tokens + 2 * head * 2 * batch * NEW, bytes=4.0 * weights * NEW)
    names = {f"guided decoding, B={batch}": ours, f"two passes a step, transformers, B={batch}": theirs}
    work = (
        f"{NEW} tokens after a prompt of {PROMPT} with and without {PRINCIPLE} more, 6 layers of width 576, 49,152 tokens, "
        "float32, 2 threads"
    )
    return [compare(names, work, REPEATS, limit).row(*names, at_most=1 / 1.3)]
