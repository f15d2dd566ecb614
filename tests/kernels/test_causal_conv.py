from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trialist.kernels import causal_conv as module
from trialist.kernels.causal_conv import causal_conv

needs_compiler = pytest.mark.skipif(not module.available(), reason="no C compiler: the C kernel cannot be built")
BACKENDS = ["torch", pytest.param("c", marks=needs_compiler)]
B, T, D, K = 3, 9, 131, 4  # more channels than one task of the C kernel takes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop(x: Tensor, weight: Tensor, before: Tensor | None, age: Tensor | None) -> Tensor:
    """The definition, step by step in float64, differentiable."""
    past = x.new_zeros(len(x), len(weight) - 1, x.shape[2]) if before is None else before
    padded = torch.cat([past, x], 1)
    rows = []
    for row in range(len(x)):
        steps = []
        for t in range(x.shape[1]):
            most = len(weight) - 1 if age is None else min(len(weight) - 1, int(age[row, t]))
            steps.append(sum(weight[n] * padded[row, len(weight) - 1 + t - n] for n in range(most + 1)))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


@pytest.mark.parametrize("taps", [1, 2, K, 12])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_convolution_and_its_gradients_equal_the_loop(backend: str, limited: bool, taps: int) -> None:
    x, weight, grad = draw(B, T, D), draw(taps, D, seed=1), draw(B, T, D, seed=2)
    age = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4], [7, 8, 9, 10, 0, 1, 2, 3, 4], [2**40] * 9]) if limited else None
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    found, expected = causal_conv(*ours, age=age, backend=backend), loop(*exact, None, age)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found, ours, grad), torch.autograd.grad(expected, exact, grad.double())
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=2e-5)


def test_what_came_before_is_looked_at_as_far_as_age_allows() -> None:
    x, weight, before = draw(B, 2, D), draw(K, D, seed=1), draw(B, K - 1, D, seed=2)
    age = torch.tensor([[9, 9], [0, 1], [1, 2]])
    torch.testing.assert_close(causal_conv(x, weight, before, age), loop(x, weight, before, age))


@needs_compiler
def test_threads_and_strides_change_no_bit() -> None:
    x, weight = draw(B, D, 100).transpose(1, 2), draw(K, D, seed=1)  # as much as the kernel shares among threads
    expected = causal_conv(x.contiguous(), weight, backend="c")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(causal_conv(x, weight, backend="c"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weight": torch.ones(2, 4)}, r"do not fit weight \(2, 4\)"),
        ({"before": torch.ones(1, 2, 3)}, r"before \(1, 2, 3\)"),
        ({"age": torch.ones(1, 4)}, r"age \(1, 4\)"),
        ({"backend": "triton"}, "choose one of auto, torch, c"),
        ({"backend": "c", "before": torch.ones(1, 1, 3)}, "nothing before"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_what_was_wanted(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        causal_conv(**{"x": torch.ones(1, 5, 3), "weight": torch.ones(2, 3), **arguments})
