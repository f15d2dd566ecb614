from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from trialist.kernels import scan, scan_cpu, scan_torch
from trialist.kernels.scan import gated_scan, linear_scan

needs_compiler = pytest.mark.skipif(not scan_cpu.available(), reason="no C compiler: the C kernels cannot be built")
BACKENDS = ["reference", "torch", pytest.param("c", marks=needs_compiler)]
B, T, D = 3, 7, 133  # more channels than one task of the C kernel takes


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(dtype: torch.dtype = torch.float32, steps: int = T) -> tuple[Tensor, Tensor, Tensor]:
    a, b, h0 = (
        draw(B, steps, D, dtype=dtype).sigmoid(),
        draw(B, steps, D, seed=1, dtype=dtype),
        draw(B, D, seed=2, dtype=dtype),
    )
    return a.requires_grad_(), b.requires_grad_(), h0.requires_grad_()


def loop(a: Tensor, b: Tensor, h0: Tensor, order: range) -> Tensor:
    """The definition, number by number, in float64."""
    a, b, h0 = (x.detach().double() for x in (a, b, h0))
    h = torch.empty_like(b)
    for row in range(len(a)):
        for channel in range(a.shape[2]):
            state = float(h0[row, channel])
            for t in order:
                state = float(a[row, t, channel]) * state + float(b[row, t, channel])
                h[row, t, channel] = state
    return h


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_equals_the_loop_over_numbers(backend: str, reverse: bool) -> None:
    a, b, h0 = inputs()
    expected = loop(a, b, h0, range(T)[::-1] if reverse else range(T))
    found = linear_scan(a, b, h0, reverse=reverse, backend=backend)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference", "log_scan"])
def test_scan_gradients_hold_against_finite_differences_in_float64(backend: str, given: bool, reverse: bool) -> None:
    a, b, h0 = draw(2, 5, 3).double().sigmoid(), draw(2, 5, 3, seed=1).double().exp(), draw(2, 3, seed=2).double().exp()
    tensors = [x.requires_grad_() for x in ((a, b, h0) if given else (a, b))]
    assert torch.autograd.gradcheck(lambda *x: linear_scan(*x, reverse=reverse, backend=backend), tensors)


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", [True, False])
def test_gradients_of_the_c_scan_equal_those_of_autograd(given: bool, reverse: bool) -> None:
    found, expected = (
        torch.autograd.grad(
            linear_scan(a, b, h0 if given else None, reverse=reverse, backend=backend),
            [a, b, h0] if given else [a, b],
            draw(B, T, D, seed=3).to(a.dtype),
        )
        for backend, (a, b, h0) in (("c", inputs()), ("reference", tuple(x.detach().double().requires_grad_() for x in inputs())))
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 12, 29])
def test_scan_in_blocks_equals_the_scan_step_by_step(steps: int) -> None:
    a, b, h0 = (x.detach() for x in inputs(steps=steps))
    for start in (h0, None):
        torch.testing.assert_close(scan_torch.scan_blocks(a, b, start), linear_scan(a, b, start, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_memory_the_scan_returns_its_input_and_with_all_of_it_the_running_sum(backend: str) -> None:
    b, h0 = draw(2, 6, 5), draw(2, 5, seed=1)
    assert torch.equal(linear_scan(torch.zeros_like(b), b, h0, backend=backend), b)
    constant = torch.full_like(b, 0.25)
    summed = linear_scan(torch.ones_like(b), constant, torch.ones(2, 5), backend=backend)
    assert torch.equal(summed, (1 + 0.25 * torch.arange(1, 7))[None, :, None].expand(2, 6, 5))


@pytest.mark.parametrize("backend", [*BACKENDS, "log_scan"])
def test_any_split_of_time_with_carried_state_gives_the_same_states(backend: str) -> None:
    a, b = draw(2, 11, 5).sigmoid(), draw(2, 11, 5, seed=1).exp()
    whole = linear_scan(a, b, backend=backend)
    for cut in (1, 4, 10):
        first = linear_scan(a[:, :cut], b[:, :cut], backend=backend)
        second = linear_scan(a[:, cut:], b[:, cut:], first[:, -1], backend=backend)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("c", marks=needs_compiler)])
def test_direct_scan_keeps_float32_precision_at_lengths_where_the_log_space_scan_loses_it(backend: str) -> None:
    gate, b = draw(1, 2048, 3), draw(1, 2048, 3, seed=1).exp()
    upstream = draw(1, 2048, 3, seed=2)

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        a = gate.to(dtype).sigmoid().requires_grad_()
        return torch.autograd.grad(linear_scan(a, b.to(dtype), backend=backend), a, upstream.to(dtype))[0].double()

    exact = gradient("torch", torch.float64)
    error, error_of_logs = (
        float((gradient(name, torch.float32) - exact).norm() / exact.norm()) for name in (backend, "log_scan")
    )
    assert error < 1e-6 < 1e-4 < error_of_logs


def test_log_space_scan_agrees_with_the_direct_one_up_to_256_steps() -> None:
    a, b = draw(2, 256, 4).sigmoid(), draw(2, 256, 4, seed=1).exp()
    torch.testing.assert_close(
        linear_scan(a, b, backend="log_scan"), linear_scan(a, b, backend="torch"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_are_carried_and_returned_in_float32(backend: str) -> None:
    a, b, h0 = (x.detach().bfloat16() for x in inputs(steps=16))
    found = linear_scan(a, b, h0, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loop(a, b, h0, range(16)).float(), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_threads_and_strides_change_no_bit() -> None:
    both = draw(B, 100, 2 * D)  # as much as the kernel shares among threads
    a, b = both.sigmoid().chunk(2, -1)
    expected = linear_scan(a.contiguous(), b.contiguous(), backend="c")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(linear_scan(a, b, backend="c"), expected)
            transposed = a.transpose(0, 1).contiguous().transpose(0, 1), b.transpose(1, 2).contiguous().transpose(1, 2)
            assert torch.equal(linear_scan(*transposed, backend="c"), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernel flushes denormals with SSE only")
def test_faded_states_and_gradients_are_zero_and_not_denormal() -> None:
    a = torch.full((1, 200, 4), 0.5, requires_grad=True)
    b = torch.zeros(1, 200, 4, requires_grad=True)
    states = linear_scan(a, b, torch.ones(1, 4), backend="c")
    _, d_b = torch.autograd.grad(states[:, -1].sum(), (a, b))
    for faded in (states, d_b):
        assert not ((faded > 0) & (faded < torch.finfo(torch.float32).tiny)).any()
        assert (faded == 0).any()


def gated_loop(gate, candidate, h0, forget, activation, padding_mask, reset):  # type: ignore[no-untyped-def]
    """The definition of the gated recurrence, step by step in float64, differentiable."""
    h, states = h0, []
    for t in range(gate.shape[1]):
        x = candidate[:, t]
        new = {"tanh": x.tanh(), "identity": x, "g": torch.where(x >= 0, x + 0.5, 1 / (1 + (-x).exp()))}[activation]
        take = 1 / (1 + (-gate[:, t]).exp())
        z = take if forget is None else take / (take + 1 / (1 + (-forget[:, t]).exp()))
        last = h if reset is None else torch.where(reset[:, t, None], torch.zeros_like(h), h)
        step = (1 - z) * last + z * new
        h = step if padding_mask is None else torch.where(padding_mask[:, t, None], step, h)
        states.append(h)
    return torch.stack(states, 1)


MASKS = {
    "plain": (False, False),
    "padded": (True, False),
    "packed": (False, True),
    "padded-and-packed": (True, True),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("activation", "gates"), [("g", 1), ("g", 2), ("identity", 1), ("identity", 2), ("tanh", 1), ("tanh", 2)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_scan_and_its_gradients_equal_the_loop(
    backend: str, activation: str, gates: int, masks: tuple[bool, bool]
) -> None:
    tensors = [3 * draw(B, T, D), 2 * draw(B, T, D, seed=1), draw(B, D, seed=2)]
    if gates == 2:
        tensors.append(3 * draw(B, T, D, seed=4))
    padding_mask = torch.ones(B, T, dtype=torch.bool)
    padding_mask[1, :3] = padding_mask[2, -2:] = False
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 0] = reset[0, 4] = reset[1, 2] = reset[2, 3] = True  # (1, 2) is padding too, and padding wins
    chosen = padding_mask if masks[0] else None, reset if masks[1] else None
    upstream = draw(B, T, D, seed=3)

    ours = [x.clone().requires_grad_() for x in tensors]
    second = ours[3] if gates == 2 else None
    found = gated_scan(
        *ours[:3], forget=second, activation=activation, padding_mask=chosen[0], reset=chosen[1], backend=backend
    )
    exact = [x.double().requires_grad_() for x in tensors]
    expected = gated_loop(*exact, *([] if gates == 2 else [None]), activation, *chosen)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(found, ours, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "log_scan"])
def test_gates_far_open_and_far_shut_stay_finite(backend: str) -> None:
    gate = torch.tensor([-200.0, -60.0, 0.0, 60.0, 80.0])[None, :, None].requires_grad_()
    candidate = torch.tensor([300.0, -300.0, 0.0, -60.0, 1e4])[None, :, None].requires_grad_()
    states = gated_scan(gate, candidate, backend=backend)
    torch.testing.assert_close(states[0, -2:, 0], torch.tensor([1.25 * 8.7565e-27, 1e4 + 0.5]), rtol=1e-4, atol=1e-30)
    for gradient in torch.autograd.grad(states.sum(), (gate, candidate)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gates_far_open_and_far_shut_divide_as_their_odds(backend: str) -> None:
    """z = (1 + e^-f) / (2 + e^-f + e^-k), where either exponential may be too large for a number."""
    gate, forget = (x.flatten() for x in torch.meshgrid(*[torch.tensor([-200.0, -30.0, 0.5, 60.0])] * 2, indexing="ij"))
    exact = (1 + (-forget.double()).exp()) / (2 + (-forget.double()).exp() + (-gate.double()).exp())
    tensors = [x[None, None].clone().requires_grad_() for x in (gate, forget)]
    one = torch.ones(1, 1, 16)
    found = gated_scan(tensors[0], one, forget=tensors[1], activation="identity", backend=backend)
    torch.testing.assert_close(found[0, 0], exact.float(), rtol=1e-5, atol=1e-30)
    for gradient in torch.autograd.grad(found.sum(), tensors):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("gates", [1, 2])
def test_log_space_gated_scan_takes_gates_whose_sigmoid_is_0_or_1(gates: int) -> None:
    gate = torch.tensor([110.0, -3.0, -110.0, 2.0])[None, :, None].requires_grad_()
    forget = torch.tensor([-120.0, 1.0, 3.0, 0.0])[None, :, None] if gates == 2 else None
    candidate, h0 = draw(1, 4, 1), torch.ones(1, 1)
    exact = gated_scan(
        gate.double(), candidate.double(), h0.double(), forget=None if forget is None else forget.double(), backend="reference"
    )  # fmt: skip
    found = gated_scan(gate, candidate, h0, forget=forget, backend="log_scan")
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.autograd.grad(found.sum(), gate)[0]).all()


def test_log_space_gated_scan_has_finite_gradients_through_padding() -> None:
    gate, candidate = draw(2, 5, 3).requires_grad_(), draw(2, 5, 3, seed=1).requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :3] = False
    arguments = {"padding_mask": mask}
    gradients = [
        torch.autograd.grad(gated_scan(gate, candidate, backend=backend, **arguments).sum(), (gate, candidate))
        for backend in ("log_scan", "torch")
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_auto_says_once_which_backend_it_took(caplog) -> None:
    scan._say.cache_clear()
    with caplog.at_level("INFO", logger=scan.__name__):
        for _ in range(2):
            linear_scan(torch.rand(1, 2, 3), torch.rand(1, 2, 3))
        linear_scan(torch.rand(1, 2, 3).double(), torch.rand(1, 2, 3).double())
    assert [record.getMessage().split()[-1] for record in caplog.records] == ["'c'", "'torch'"]


@pytest.mark.parametrize("reverse", [False, True])
def test_second_derivatives_of_the_scan_in_pytorch_hold_against_finite_differences(reverse: bool) -> None:
    tensors = [
        x.double().requires_grad_() for x in (draw(2, 4, 3).sigmoid(), draw(2, 4, 3, seed=1), draw(2, 3, seed=2))
    ]
    assert torch.autograd.gradgradcheck(lambda *x: linear_scan(*x, reverse=reverse, backend="torch"), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", pytest.param("c", marks=needs_compiler)])
def test_operators_describe_themselves_to_the_compiler_as_they_are(backend: str) -> None:
    """Shapes, strides, schema and derivative, as `torch.compile` takes them on trust."""
    a, b, h0 = (x.detach()[:, :, :5].requires_grad_() if x.dim() == 3 else x.detach()[:, :5] for x in inputs())
    operator = scan_cpu.linear_scan_cpu if backend == "c" else scan_torch.linear_scan_torch
    torch.library.opcheck(operator, (a, b, h0, True))
    if backend == "c":
        torch.library.opcheck(scan_cpu.gated_scan_cpu, (a, b, b.clone(), h0, None, True))


def test_a_state_in_float64_is_not_cut() -> None:
    a, b, h0 = torch.rand(1, 2, 3), torch.rand(1, 2, 3), torch.rand(1, 3).double()
    assert linear_scan(a, b, h0).dtype == gated_scan(a, b, h0).dtype == torch.float64


@needs_compiler
def test_second_derivatives_through_the_c_kernel_are_refused_with_the_way_out() -> None:
    a, b, _ = inputs()
    (first,) = torch.autograd.grad(linear_scan(a, b, backend="c").pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: linear_scan(x, x[:, :2]), "must have the same shape"),
        (lambda x: linear_scan(x[:, :0], x[:, :0]), "no time step"),
        (lambda x: linear_scan(x, x, x[:, 0, :2]), r"wanted \(B, D\) = \(2, 3\)"),
        (lambda x: linear_scan(x, x, backend="cuda"), "choose one of auto"),
        (lambda x: linear_scan(x.double(), x, backend="c"), "computes in float32"),
        (lambda x: linear_scan(x, -x, backend="log_scan"), "b must be at least 0"),
        (lambda x: linear_scan(0 * x, x, backend="log_scan"), "a must be above 0"),
        (lambda x: linear_scan(x, x, -x[:, 0], backend="log_scan"), "h0 must be at least 0"),
        (lambda x: linear_scan(x, x.to(torch.complex64)), "b is torch.complex64; give real floating point"),
        (lambda x: linear_scan(x.long(), x), "a is torch.int64"),
        (lambda x: gated_scan(x, x, forget=x[:, :2]), "gate .* and forget .* must have the same shape"),
        (lambda x: gated_scan(x, x, activation="relu"), "choose one of g, identity, tanh"),
        (lambda x: gated_scan(x, x, activation="tanh", backend="log_scan"), "positive states"),
        (lambda x: gated_scan(x, x, reset=x[..., 0] > 0, backend="log_scan"), "cannot start a row anew"),
        (lambda x: gated_scan(x, x, padding_mask=x[..., 0]), r"padding_mask is torch.float32 of shape \(2, 4\)"),
        (lambda x: gated_scan(x, x, reset=x[:, 0] > 0), r"reset is torch.bool of shape \(2, 3\)"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused_with_what_was_wanted(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.rand(2, 4, 3) + 0.1)
