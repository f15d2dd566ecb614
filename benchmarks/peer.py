"""A PEER layer, forward and backward, against PEER-pytorch, the mixture of experts of Doge (transformers) and our own gathered
formula: time and peak memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_memory
from benchmarks.timer import Limit, Row, compare, threads
from trialist.kernels.expert_lookup_cpu import available
from trialist.models import PEER

SHAPES = ((64, 128, 4, 8, 64, 8, 256), (128, 256, 8, 16, 128, 4, 256), (256, 256, 8, 16, 128, 4, 256))
"""Sub-keys a half, width, heads, experts a head, key width, batch, time"""
THEIRS = "PEER-pytorch (non_competing_scores=False)"
DOGE = "Doge's mixture (one head)"
"""As many experts a token, chosen by one head whose router knows all keys; its shared dense expert is one neuron here"""
DOGE_SIDE = 64
"""Sub-keys up to which it is measured: it sorts all experts for every token, forward and backward"""
MILLION = ("1024", "256", "8", "16", "128", "2", "1024")


def rows() -> list[Row]:
    found = []
    for shape in SHAPES:
        for count in sorted({1, min(2, os.cpu_count() or 1)}):
            with threads(count):
                found += _rows(shape, count)
    return [*found, _memory(), _million(), _million_in_fit()]


def _rows(shape: tuple[int, ...], count: int) -> list[Row]:
    side, width, heads, top_k, key_dim, batch, length = shape
    x, grad = _inputs(batch, length, width)
    layers = {"PEER, C": _ours(shape, "c")} if available() else {}
    layers |= {
        "PEER, embedding_bag": _ours(shape, "embedding_bag"),
        "PEER, gathered with einsum": _ours(shape, "einsum"),
        THEIRS: _theirs(shape),
        **({DOGE: _doge(shape)} if side <= DOGE_SIDE else {}),
    }
    tokens, entries = batch * length, batch * length * heads * top_k
    # 2 products of gathered rows forward, 4 backward; projection and scores of the sub-keys; the rows are read thrice
    # and their gradients written once, as float32
    products = 6 * 2.0 * entries * width + tokens * heads * key_dim * 2.0 * (3 * width + side)
    limit = Limit(flops=products, bytes=4.0 * (2 * 2 * entries * width + 2 * side**2 * width))
    work = (
        f"forward + backward, {side}² experts of width {width}, {heads} heads x {top_k}, {tokens} tokens, float32, "
        f"{count} thread{'s' * (count > 1)}"
    )
    result = compare({name: _both_ways(layer, x, grad) for name, layer in layers.items()}, work=work, limit=limit)
    first = next(iter(layers))
    found = [
        result.row(name, THEIRS, at_most=1 / 4 if name == first else None)
        for name in layers
        if name.endswith(("C", "bag"))
    ]
    others = ["PEER, gathered with einsum", *([DOGE] if DOGE in layers else [])]
    return [*found, *(result.row(first, other) for other in others)]


def _memory() -> Row:
    """Peak memory of one step of the middle shape."""
    sizes = tuple(map(str, SHAPES[1]))
    ours, theirs = (peak_memory("benchmarks.peer", kind, *sizes) for kind in ("ours", "theirs"))
    return Row(
        what="PEER, peak memory",
        work=f"forward + backward, {SHAPES[1][0]}² experts of width {SHAPES[1][1]}, {SHAPES[1][5] * SHAPES[1][6]} tokens",
        measured=f"{ours:.0f} MB",
        against=f"{THEIRS}: {theirs:.0f} MB",
        ratio=f"{ours / theirs:.2f}",
    )


def _million() -> Row:
    """Peak memory of training steps of a million experts, sparse gradients and RowAdagrad, layer and optimizer included."""
    megabytes = peak_memory("benchmarks.peer", "million", *MILLION)
    return Row(
        what="PEER, a million experts",
        work="2 training steps (RowAdagrad, sparse gradients), width 256, 8 heads x 16, 2048 tokens",
        measured=f"{megabytes / 1024:.2f} GiB in all",
        target="at most 24 GiB",
        met=megabytes / 1024 <= 24,
    )


def _million_in_fit() -> Row:
    """The same with the optimizer that the package trains with: a decoder whose second feed-forward holds the experts."""
    megabytes = peak_memory("benchmarks.peer", "fit", *MILLION)
    return Row(
        what="PEER, a million experts in a decoder",
        work="2 steps of fit (AdamW, dense gradients), 2 layers of width 256, 8 heads x 16, 2048 tokens",
        measured=f"{megabytes / 1024:.2f} GiB in all",
        target="at most 24 GiB",
        met=megabytes / 1024 <= 24,
    )


def _inputs(batch: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, length, width, generator=generator) for _ in range(2))
    return x.requires_grad_(), grad


def _ours(shape: tuple[int, ...], backend: str, sparse_grad: bool = False) -> nn.Module:
    side, width, heads, top_k, key_dim, _, _ = shape
    torch.manual_seed(0)
    return PEER(width, side**2, heads, top_k, key_dim, backend=backend, sparse_grad=sparse_grad)


def _theirs(shape: tuple[int, ...]) -> nn.Module:
    from PEER_pytorch import PEER as TheirPEER

    side, width, heads, top_k, key_dim, _, _ = shape
    torch.manual_seed(0)
    layer = TheirPEER(
        width,
        heads=heads,
        num_experts=side**2,
        num_experts_per_head=top_k,
        dim_key=key_dim // 2,
        non_competing_scores=False,
    )
    with torch.no_grad():
        layer.weight_down_embed.weight.mul_(width**-0.5)  # its initial experts are 16 times too large
    return layer


def _doge(shape: tuple[int, ...]) -> nn.Module:
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeCDMoE

    side, width, heads, top_k, _, _, _ = shape
    torch.manual_seed(0)
    config = DogeConfig(hidden_size=width, intermediate_size=1, num_experts=side**2, num_experts_per_tok=heads * top_k)
    return DogeCDMoE(config)


def _both_ways(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    def both_ways() -> object:
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y  # Doge's also returns the scores of its router
        return torch.autograd.grad(y, [x, *layer.parameters()], grad)

    return both_ways


def measured(kind: str, *sizes: str) -> Callable[[], object]:
    """The work whose peak memory is measured in a process of its own."""
    shape = tuple(map(int, sizes))
    _, width, _, _, _, batch, length = shape
    if kind in ("million", "fit"):
        return functools.partial(_train_million if kind == "million" else _fit_million, shape)
    x, grad = _inputs(batch, length, width)
    return _both_ways(_ours(shape, "auto") if kind == "ours" else _theirs(shape), x, grad)


def _train_million(shape: tuple[int, ...]) -> None:
    from trialist.optimizers import RowAdagrad

    layer = _ours(shape, "auto", sparse_grad=True)
    x, target = (tensor.detach() for tensor in _inputs(*shape[5:], shape[1]))
    tables = {id(table) for table in (*layer.down, *layer.up)}
    experts = RowAdagrad([p for p in layer.parameters() if id(p) in tables], lr=0.05)
    rest = torch.optim.AdamW([p for p in layer.parameters() if id(p) not in tables], 1e-3)
    for _ in range(2):
        (layer(x) - target).square().mean().backward()
        for optimizer in (experts, rest):
            optimizer.step()
            optimizer.zero_grad()


def _fit_million(shape: tuple[int, ...]) -> None:
    from trialist.models import ModularDecoderConfig, ModularDecoderForCausalLM
    from trialist.objectives import CrossEntropy
    from trialist.optimizers import adamw
    from trialist.training import fit

    side, width, heads, top_k, key_dim, batch, length = shape
    config = ModularDecoderConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4,
        ffn_types=["swiglu", "peer"],
        peer={"num_experts": side**2, "num_heads": heads, "top_k": top_k, "key_dim": key_dim},
    )  # fmt: skip
    model = ModularDecoderForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (batch, length), generator=generator)
    fit(model, lambda _: {"input_ids": tokens, "labels": tokens}, CrossEntropy(), adamw(model, 1e-3), budget={"steps": 2},
        progress=False)  # fmt: skip
