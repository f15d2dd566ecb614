from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trialist.models import MinGRU, MinLSTM
from trialist.models.recurrent.gru import GRU
from trialist.models.recurrent.min_rnn import kept_log_odds

CELLS = {
    "min_gru": lambda: MinGRU(5, expansion=1.4),
    "min_gru-tanh-states": lambda: MinGRU(5, 6, activation="tanh", proj=False),
    "min_lstm": lambda: MinLSTM(5, 6),
    "min_lstm-identity": lambda: MinLSTM(5, activation="identity", bias=False),
    "gru": lambda: GRU(5, 6),
}
cells = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
minimal = pytest.mark.parametrize("kind", [MinGRU, MinLSTM])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_by_step(cell: nn.Module, x: Tensor, state: Tensor | None = None) -> Tensor:
    outputs = []
    for t in range(x.shape[1]):
        output, state = cell(x[:, t : t + 1], state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, sigmoid(x))


@minimal
def test_cell_computes_the_papers_formulas_with_its_weights(kind: type) -> None:
    cell = kind(3, 4).double()
    x, h = draw(2, 6, 3).double(), torch.zeros(2, 4, dtype=torch.float64)
    weights, biases = cell.in_proj.weight.split(4), cell.in_proj.bias.split(4)
    expected = []
    for t in range(6):
        parts = [x[:, t] @ weight.T + bias for weight, bias in zip(weights, biases)]
        if kind is MinGRU:
            z = sigmoid(parts[0])
            h = (1 - z) * h + z * g(parts[1])
        else:
            forget, take = sigmoid(parts[0]), sigmoid(parts[1])
            h = forget / (forget + take) * h + take / (forget + take) * g(parts[2])
        expected.append(h @ cell.out_proj.weight.T + cell.out_proj.bias)
    output, state = cell(x)
    torch.testing.assert_close(output, torch.stack(expected, 1))
    torch.testing.assert_close(state, h)


@cells
def test_any_split_of_time_with_carried_state_equals_the_whole(make) -> None:
    cell, x = make(), draw(3, 9, 5)
    whole, last = cell(x)
    torch.testing.assert_close(step_by_step(cell, x), whole)
    for cut in (1, 4, 8):
        first, state = cell(x[:, :cut])
        second, state = cell(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole)
        torch.testing.assert_close(state, last)


@cells
def test_padding_on_either_side_or_inside_leaves_outputs_and_state_unchanged(make) -> None:
    cell, x = make(), draw(1, 6, 5)
    alone, last = cell(x)
    places = torch.tensor([[2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 6, 7]])
    padded = torch.full((3, 8, 5), 7.0)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for row, place in enumerate(places):
        padded[row, place], mask[row, place] = x[0], True
    together, state = cell(padded, padding_mask=mask)
    for row, place in enumerate(places):
        torch.testing.assert_close(together[row, place], alone[0])
        torch.testing.assert_close(state[row], last[0])


@cells
def test_rows_of_padding_only_keep_the_state_they_had(make) -> None:
    cell = make()
    state = draw(2, cell.hidden_size).abs()
    mask = torch.tensor([[False, False], [True, True]])
    for rows in (slice(0, 2), slice(0, 1)):
        _, after = cell(draw(2, 2, 5)[rows], state[rows], padding_mask=mask[rows])
        assert torch.equal(after[0], state[0])


@cells
def test_packed_documents_give_what_each_gives_alone(make) -> None:
    cell, x = make(), draw(2, 8, 5)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[0, 3] = reset[0, 4] = reset[1, 0] = reset[1, 6] = True
    before = draw(2, cell.hidden_size, seed=1).abs()
    output, state = cell(x, before, reset=reset)
    for row, first, last in ((0, 0, 3), (0, 3, 4), (0, 4, 8), (1, 0, 6), (1, 6, 8)):
        start = before[row : row + 1] if (row, first) == (0, 0) else None
        alone, left = cell(x[row : row + 1, first:last], start)
        torch.testing.assert_close(output[row, first:last], alone[0])
        if last == 8:
            torch.testing.assert_close(state[row], left[0])


def test_gru_computes_what_nn_gru_computes() -> None:
    cell, x = GRU(5, 6), draw(2, 7, 5)
    expected, last = cell.rnn(x)
    output, state = cell(x)
    assert torch.equal(output, expected)
    assert torch.equal(state, last[0])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_min_lstm_with_equal_gates_takes_exactly_half(backend: str) -> None:
    cell, x = MinLSTM(3, 2, proj=False, activation="identity", backend=backend), 40 * draw(4, 1, 3)
    with torch.no_grad():
        cell.in_proj.weight[2:4] = cell.in_proj.weight[:2]
        cell.in_proj.bias[2:4] = cell.in_proj.bias[:2]
    assert torch.equal(cell(x)[0], 0.5 * cell.in_proj(x)[..., 4:])


def test_min_lstm_is_min_gru_whose_gate_is_the_log_of_input_over_forget() -> None:
    lstm = MinLSTM(3, 4, proj=False).double()
    x = draw(2, 6, 3).double()
    forget, take, candidate = lstm.in_proj(x).chunk(3, -1)
    gru = MinGRU(8, 4, proj=False, bias=False).double()  # reads its pre-activations from its input
    with torch.no_grad():
        gru.in_proj.weight.copy_(torch.eye(8))
    log_odds = (sigmoid(take) / sigmoid(forget)).log()
    torch.testing.assert_close(lstm(x)[0], gru(torch.cat([log_odds, candidate], -1))[0])


@minimal
def test_states_stay_between_the_first_state_and_the_candidates(kind: type) -> None:
    cell, x = kind(5, 6, proj=False, activation="identity"), 9 * draw(3, 40, 5)
    start = draw(3, 6, seed=1)
    states, _ = cell(x, start)
    candidates = torch.cat([start[:, None], cell.in_proj(x)[..., -6:]], 1)
    lowest, highest = candidates.cummin(1).values[:, 1:], candidates.cummax(1).values[:, 1:]
    assert ((states >= lowest - 1e-5) & (states <= highest + 1e-5)).all()


@pytest.mark.parametrize(("kind", "gates", "peer", "peer_gates"), [(MinGRU, 2, nn.GRU, 3), (MinLSTM, 3, nn.LSTM, 4)])
@pytest.mark.parametrize("alpha", [1, 2, 3, 4])
def test_parameter_counts_are_the_papers_share_of_gru_and_lstm(kind, gates, peer, peer_gates, alpha: int) -> None:
    count = sum(p.numel() for p in kind(6, expansion=alpha, proj=False, bias=False).parameters())
    theirs = sum(p.numel() for p in peer(6, 6 * alpha, bias=False).parameters())
    assert count == gates * 6 * 6 * alpha
    assert count / theirs == pytest.approx(gates / (peer_gates * (1 + alpha)))


@minimal
def test_log_space_scan_gives_the_same_layer_up_to_256_tokens(kind: type) -> None:
    direct, logs = kind(5, 6), kind(5, 6, backend="log_scan")
    logs.load_state_dict(direct.state_dict())
    x, state = draw(2, 256, 5), draw(2, 6).abs()
    torch.testing.assert_close(logs(x, state)[0], direct(x, state)[0], rtol=1e-4, atol=1e-4)


@cells
def test_bfloat16_autocast_and_bfloat16_weights_keep_the_state_in_float32(make) -> None:
    cell, x = make(), draw(2, 30, 5)
    exact = cell(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = cell(x)
        step_by_step(cell, x)
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, exact, rtol=0.05, atol=0.05)
    cell.bfloat16()
    output, state = cell(x.bfloat16())
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_gru_computes_in_the_precision_of_autocast_as_all_layers_do(monkeypatch) -> None:
    seen, kernel = [], torch.gru

    def spy(x: Tensor, *arguments, **named):
        seen.append(x.dtype)
        return kernel(x, *arguments, **named)

    monkeypatch.setattr(torch, "gru", spy)
    cell, x, mask = GRU(5, 6), draw(2, 4, 5), torch.tensor([[False, True, True, True], [True] * 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cell(x)
        output, _ = cell(x, padding_mask=mask)
    output.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert cell.rnn.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize(("kind", "peer"), [(MinGRU, "minGRU"), (MinLSTM, "minLSTM")])
def test_the_layer_of_min_gru_pytorch_gives_the_same_states_and_gradients(kind: type, peer: str) -> None:
    module = pytest.importorskip(f"minGRU_pytorch.{peer}", reason="the extra `bench` is not installed")
    ours, theirs = kind(5, proj=False, bias=False), getattr(module, peer)(5)
    hidden, *gates = next(theirs.parameters()).detach().split(5)  # theirs begins with the candidate, ours ends with it
    with torch.no_grad():
        ours.in_proj.weight.copy_(torch.cat([*gates, hidden]))
    x, upstream = draw(2, 12, 5), draw(2, 12, 5, seed=1)
    found, expected = ours(x)[0], theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(found, ours.in_proj.weight, upstream)
    (its,) = torch.autograd.grad(expected, tuple(theirs.parameters()), upstream)
    hidden, *gates = its.split(5)
    torch.testing.assert_close(mine, torch.cat([*gates, hidden]), rtol=1e-4, atol=1e-4)


def test_min_gru_pytorch_puts_a_carried_state_of_min_lstm_through_g_again() -> None:
    """Why equality with the peer stops at the first state."""
    module = pytest.importorskip("minGRU_pytorch.minLSTM", reason="the extra `bench` is not installed")
    theirs = module.minLSTM(5)
    x = draw(2, 12, 5)
    whole = theirs(x)
    _, state = theirs(x[:, :6], return_next_prev_hidden=True)
    assert (theirs(x[:, 6:], state) - whole[:, 6:]).abs().max() > 0.05


@minimal
def test_gate_bias_sets_how_much_of_the_old_state_a_zero_input_keeps(kind: type) -> None:
    cell = kind(5, 3, proj=False, activation="identity", gate_bias_init=(2.0, 50.0))
    state = torch.ones(1, 3)
    kept = cell(torch.zeros(1, 1, 5), state)[1]
    torch.testing.assert_close(kept, torch.tensor([[0.5, 0.9, 0.98]]))
    third = kind(5, 3, proj=False, activation="identity", gate_bias_init=1.5)(torch.zeros(1, 1, 5), state)[1]
    torch.testing.assert_close(third, torch.full((1, 3), 1 / (1 + torch.tensor(-1.5).exp())))


def test_a_zero_gate_bias_forgets_half_of_the_state_at_every_token() -> None:
    assert torch.equal(kept_log_odds(0.0, 3), torch.zeros(3))
    state = MinGRU(5, 3)(torch.zeros(1, 4, 5), torch.full((1, 3), 16.0))[1]
    torch.testing.assert_close(state, torch.full((1, 3), 1.0 + 0.5 * (1 - 1 / 16)))  # a zero candidate is g(0) = 1/2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MinGRU(0), "input_size 0"),
        (lambda: MinGRU(4, 5, expansion=2.0), "not both"),
        (lambda: MinGRU(4, expansion=-1.0), "leaves no channel"),
        (lambda: MinGRU(4, activation="relu"), "choose one of g, identity, tanh"),
        (lambda: MinGRU(4, backend="triton"), "choose one of auto"),
        (lambda: MinLSTM(4, backend="log_scan", activation="tanh"), "needs positive states"),
        (lambda: MinGRU(4, gate_bias_init=(1.0, 9.0)), "1 < shortest <= longest"),
        (lambda: MinGRU(4, gate_bias_init=1.0, bias=False), "needs bias=True"),
        (lambda: MinGRU(4, gate_bias_init=float("nan")), "must be a finite number"),
        (lambda: MinGRU(4)(torch.zeros(2, 0, 4)), "at least one time step"),
        (lambda: MinGRU(4)(torch.zeros(2, 3, 4), torch.zeros(2, 5)), r"wanted torch.float32 \(B, d_h\) = \(2, 4\)"),
        (lambda: GRU(4, 4)(torch.zeros(2, 3, 4), torch.zeros(2, 4).bfloat16()), "state is torch.bfloat16"),
        (lambda: GRU(4, 5)(torch.zeros(2, 3, 4), padding_mask=torch.ones(2, 9).bool()), r"padding_mask .* of shape \(2, 9\)"),
        (lambda: GRU(4, 5)(torch.zeros(3, 6, 4), padding_mask=torch.ones(3, 6).long()), "padding_mask is torch.int64"),
        (lambda: GRU(4, 5)(torch.zeros(2, 3, 4), reset=torch.ones(2, 2).bool()), r"reset .* wanted bool \(B, T\) = \(2, 3\)"),
        (lambda: MinGRU(4, backend="log_scan")(torch.zeros(1, 2, 4), -torch.ones(1, 4)), "h0 must be at least 0"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused_with_what_was_wanted(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
