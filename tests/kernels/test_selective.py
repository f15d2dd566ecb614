from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trialist.kernels import selective, selective_cpu
from trialist.kernels.selective import selective_attention

needs_compiler = pytest.mark.skipif(not selective_cpu.available(), reason="no C compiler: the C kernel cannot be built")
BACKENDS = ["reference", "torch", pytest.param("c", marks=needs_compiler)]
FAST = BACKENDS[1:]


def draw(B: int, H: int, G: int, T: int, S: int, D: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def loops(query, key, value, allowed, bias, *, scaling, selector_head=0, protect=None, penalty=None):
    """The definition, entry by entry, in float64. allowed(b, h, i, j) -> bool; bias(b, h, i, j) -> float."""
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    q, k, v = (x.detach().double().tolist() for x in (query, key, value))
    output = torch.zeros(B, T, H, D, dtype=torch.float64)
    F = torch.zeros(B, S, dtype=torch.float64) if penalty is None else penalty.double().clone()
    for b in range(B):
        for i in range(T):
            own = S - T + i
            for h in range(H):
                logit = {}
                for j in range(S):
                    if allowed(b, h, i, j):
                        dot = sum(x * y for x, y in zip(q[b][h][i], k[b][h * G // H][j]))
                        logit[j] = dot * scaling + bias(b, h, i, j)
                if h == selector_head:
                    chosen = {j: max(x, 0.0) for j, x in logit.items() if j < own}
                    chosen = {j: x for j, x in chosen.items() if not (j == 0 if protect is None else protect[b, j])}
                weights = {j: math.exp(x - float(F[b, j])) for j, x in logit.items()}
                for j, w in weights.items():
                    share = w / sum(weights.values())
                    output[b, i, h] += share * torch.tensor(v[b][h * G // H][j], dtype=torch.float64)
            for j, x in chosen.items():
                F[b, j] += x
    return output, F


def gradients(output: Tensor, inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def masks(B: int, T: int, S: int) -> dict[str, Tensor | None]:
    causal = torch.ones(B, 1, T, S, dtype=torch.bool).tril(S - T)
    padded = causal.clone()
    padded[0, :, :, : S // 3] = False  # the first row's first queries have nothing to attend to
    document = (torch.arange(S) * 3) // S
    packed = causal & (document[:, None] == document)[S - T :]
    lowest = torch.zeros(B, 1, T, S).masked_fill(~padded, torch.finfo(torch.float32).min)
    distance = (torch.arange(S) - torch.arange(S - T, S)[:, None]) * 0.1
    return {
        "causal": None,
        "left padding": padded,
        "packed documents": packed,
        "one mask for all rows": causal[:1],
        "additive left padding": lowest,
        "additive with distances": (distance + lowest).masked_fill(~padded, -torch.inf),
        "additive in bfloat16": lowest.bfloat16().clamp(min=torch.finfo(torch.bfloat16).min),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(masks(1, 1, 1)))
def test_every_backend_equals_the_definition_written_as_loops(backend, name):
    q, k, v = draw(2, 4, 2, 7, 9, 3)
    mask = masks(2, 7, 9)[name]
    protect = torch.zeros(2, 9, dtype=torch.bool)
    protect[0, 3] = protect[1, 0] = True
    penalty = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))

    def allowed(b, h, i, j):
        entry = True if mask is None else mask[min(b, len(mask) - 1), 0, i, j]
        return j <= 2 + i and (bool(entry) if mask is None or mask.dtype == torch.bool else bool(entry > -1e30))

    def bias(b, h, i, j):
        return 0.0 if mask is None or mask.dtype == torch.bool else float(mask[b, 0, i, j])

    keywords = {"scaling": 0.8, "selector_head": 2, "protect": protect, "penalty": penalty}
    output, F = selective_attention(q, k, v, mask, backend=backend, **keywords)
    expected, expected_F = loops(q, k, v, allowed, bias, **keywords)
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=2e-5)  # float32 sums of some ten terms
    torch.testing.assert_close(F.double(), expected_F, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["causal", "left padding", "additive with distances"])
def test_gradients_equal_finite_differences_also_through_the_penalty(backend, name):
    inputs = draw(2, 4, 2, 6, 7, 3, dtype=torch.float64)
    mask = masks(2, 6, 7)[name]
    penalty = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def output(*qkv):
        return selective_attention(*qkv, mask, scaling=1.3, selector_head=3, penalty=penalty, backend=backend)[0]

    assert torch.autograd.gradcheck(output, inputs)


SIZES = [  # B, H, G, T, S, D
    (2, 4, 2, 1, 1, 5),
    (1, 3, 1, 7, 7, 128),
    (2, 4, 4, 33, 33, 16),
    (3, 2, 1, 100, 100, 33),
    (1, 6, 2, 64, 127, 80),
    (2, 4, 2, 130, 200, 12),
    (1, 2, 2, 65, 129, 64),
]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["causal", "left padding", "packed documents", "additive with distances"])
def test_output_and_gradients_equal_those_of_the_reference(backend, sizes, name):
    B, H, _, T, S, D = sizes
    inputs = draw(*sizes)
    mask = masks(B, T, S)[name]
    keywords = {"scaling": D**-0.5, "selector_head": H - 1, "penalty": torch.rand(B, S)}
    output, F = selective_attention(*inputs, mask, backend=backend, **keywords)
    expected, expected_F = selective_attention(*inputs, mask, backend="reference", **keywords)
    torch.testing.assert_close(output, expected, atol=5e-6, rtol=1e-5)  # float32, other order of summation
    torch.testing.assert_close(F, expected_F, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(output, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_inputs_with_transposed_memory_change_nothing(backend):
    inputs = draw(2, 4, 2, 37, 37, 10)
    strided = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs)
    mask = masks(2, 37, 37)["left padding"]
    wide = torch.stack([mask, ~mask], -1)[..., 0]  # last stride 2
    output = selective_attention(*inputs, mask, scaling=0.4, backend=backend)[0]
    again = selective_attention(*strided, wide, scaling=0.4, backend=backend)[0]
    assert torch.equal(output, again)
    assert all(map(torch.equal, gradients(output, inputs), gradients(again, strided)))


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_stays_within_its_rounding_of_float32(backend):
    inputs = draw(2, 4, 2, 70, 70, 16)
    low = tuple(x.detach().bfloat16().requires_grad_() for x in inputs)
    exact = tuple(x.detach().float().requires_grad_() for x in low)
    output, F = selective_attention(*low, scaling=0.25, backend=backend)
    expected, _ = selective_attention(*exact, scaling=0.25, backend="reference")
    assert (output.dtype, F.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.float(), expected, atol=4e-2, rtol=4e-2)  # 8 bits in the logits, then in weights
    for ours, theirs in zip(gradients(output, low), gradients(expected, exact)):
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", [1, 2, 40, 64, 99])
def test_two_chunks_with_a_handed_over_penalty_equal_one_call(backend, split):
    with torch.no_grad():
        q, k, v = draw(2, 4, 2, 100, 100, 8)
        protect = torch.zeros(2, 100, dtype=torch.bool)
        protect[:, :2] = True
        keywords = {"scaling": 0.5, "selector_head": 1, "backend": backend}
        full, full_F = selective_attention(q, k, v, protect=protect, **keywords)
        head, F = selective_attention(
            q[:, :, :split], k[:, :, :split], v[:, :, :split], protect=protect[:, :split], **keywords
        )
        F = torch.nn.functional.pad(F, (0, 100 - split))
        tail, F = selective_attention(q[:, :, split:], k, v, protect=protect, penalty=F, **keywords)
    torch.testing.assert_close(torch.cat([head, tail], 1), full, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(F, full_F, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selector_without_positive_logits_is_standard_attention(backend):
    q, k, v = draw(2, 3, 3, 66, 66, 8)
    with torch.no_grad():
        q[:, 1], k[:, 1] = -q[:, 1].abs(), k[:, 1].abs()
    output, F = selective_attention(q, k, v, scaling=0.5, selector_head=1, backend=backend)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5).transpose(1, 2)
    assert not F.any()
    torch.testing.assert_close(output, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_are_standard_attention_and_the_fourth_feels_the_third_select_the_second(backend):
    q, k, v = draw(1, 1, 1, 4, 4, 1)
    with torch.no_grad():
        for x in (q, k):
            x.fill_(1.0)
    output, F = selective_attention(q, k, v, scaling=1.0, backend=backend)
    tokens = v.detach().flatten()
    torch.testing.assert_close(output.flatten()[:3], torch.stack([tokens[:n].mean() for n in (1, 2, 3)]))
    weights = torch.tensor([1.0, math.exp(-1.0), 1.0, 1.0])  # only the third token chose the second, with logit 1
    torch.testing.assert_close(output.flatten()[3], (weights * tokens).sum() / weights.sum())
    assert F.tolist() == [[0.0, 2.0, 1.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", [62, 63, 64, 127])
@pytest.mark.parametrize("open_mask", [None, True], ids=["causal", "everything allowed"])
def test_a_token_selects_neither_itself_nor_the_future_wherever_tiles_end(backend, past, open_mask):
    S = past + 2
    query, key, value = torch.ones(1, 1, 2, 1), torch.ones(1, 1, S, 1), torch.ones(1, 1, S, 1)
    mask = None if open_mask is None else torch.ones(1, 1, 2, S, dtype=torch.bool)
    _, F = selective_attention(query, key, value, mask, scaling=1.0, backend=backend)
    assert F.tolist() == [[0.0] + [2.0] * (past - 1) + [1.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_tokens_do_not_change_earlier_outputs(backend):
    q, k, v = draw(1, 2, 1, 70, 70, 8)
    with torch.no_grad():
        before = selective_attention(q, k, v, scaling=0.5, backend=backend)[0]
        for x in (q, k, v):
            x[:, :, 50:] += 1.0
        after = selective_attention(q, k, v, scaling=0.5, backend=backend)[0]
    assert torch.equal(before[:, :50], after[:, :50])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("additive", [False, True])
def test_a_query_with_nothing_to_attend_to_gives_zeros_and_selects_nothing(backend, additive):
    inputs = draw(2, 2, 1, 9, 9, 4)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[0, :, 4] = False
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask
    output, F = selective_attention(*inputs, hidden, scaling=2.0, backend=backend)
    assert not output[0, 4].any()
    shown = selective_attention(*inputs, scaling=2.0, backend=backend)[1]
    row = (inputs[0][0, 0, 4] @ inputs[1][0, 0].T * 2.0).relu() * (torch.arange(9) < 4) * (torch.arange(9) > 0)
    torch.testing.assert_close(F[0], shown[0] - row, atol=1e-5, rtol=1e-5)
    found = gradients(output, inputs)
    assert all(gradient.isfinite().all() for gradient in found)
    assert not found[0][0, :, 4].any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_mask_per_head_is_honoured(backend):
    inputs = draw(1, 3, 1, 8, 8, 4)
    generator = torch.Generator().manual_seed(4)
    slopes = torch.randn(1, 3, 8, 8, generator=generator).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    output, F = selective_attention(*inputs, slopes, scaling=0.7, selector_head=1, backend=backend)
    expected, expected_F = loops(
        *inputs, lambda b, h, i, j: j <= i, lambda b, h, i, j: float(slopes[b, h, i, j]), scaling=0.7, selector_head=1
    )
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(F.double(), expected_F, atol=2e-6, rtol=1e-5)


def test_a_learned_mask_gets_its_gradient_from_the_automatic_choice():
    inputs = draw(1, 2, 2, 5, 5, 4)
    learned = torch.zeros(1, 2, 5, 5, requires_grad=True)
    mask = learned + torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    selective_attention(*inputs, mask, scaling=0.5)[0].square().sum().backward()
    assert learned.grad.any()
    with pytest.raises(ValueError, match="backend='reference'"):
        selective_attention(*inputs, mask, scaling=0.5, backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_dropout_scales_the_weights_it_keeps_and_their_gradient(backend):
    torch.manual_seed(0)
    q, k, _ = draw(1, 2, 2, 40, 40, 4)
    v = torch.eye(40).expand(1, 2, 40, 40)  # the output is the matrix of weights
    q, k = (torch.nn.functional.pad(x.detach(), (0, 36)).requires_grad_() for x in (q, k))
    plain = selective_attention(q, k, v, scaling=0.2, backend=backend, dropout=0.25)[0]
    dropped = selective_attention(q, k, v, scaling=0.2, backend=backend, dropout=0.25, training=True)[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    assert float(kept.sum() / (plain > 1e-20).sum()) == pytest.approx(0.75, abs=0.04)  # 1640 draws: 4 deviations
    for ours, theirs in zip(gradients(dropped, (q, k)), gradients(plain * kept / 0.75, (q, k))):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", FAST)
def test_results_do_not_depend_on_the_number_of_threads_or_on_the_repetition(backend):
    inputs = draw(2, 4, 2, 150, 150, 16)
    before = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 1, 2, 3) if backend == "c" else (1, 1):
            torch.set_num_threads(count)
            output, F = selective_attention(*inputs, scaling=0.25, backend=backend)
            seen.append((output, F, *gradients(output, inputs)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in seen[1:] for x, y in zip(seen[0], other))


@pytest.mark.parametrize("backend", FAST)
def test_checkpointing_recomputes_the_same_gradient(backend):
    inputs = draw(1, 2, 1, 20, 20, 8)

    def output(*qkv):
        return selective_attention(*qkv, scaling=0.3, backend=backend)[0]

    saved = torch.utils.checkpoint.checkpoint(output, *inputs, use_reentrant=False)
    assert all(map(torch.equal, gradients(saved, inputs), gradients(output(*inputs), inputs)))


@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused(backend):
    inputs = draw(1, 2, 1, 6, 6, 8)
    output, _ = selective_attention(*inputs, scaling=0.3, backend=backend)
    (first,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        first.sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_without_gradients_nothing_is_kept(backend):
    with torch.no_grad():
        output, F = selective_attention(*draw(1, 2, 1, 6, 6, 8), scaling=0.3, backend=backend)
    assert output.grad_fn is None
    assert not F.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_autocast_computes_in_its_dtype_and_keeps_the_penalty_in_float32(backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, F = selective_attention(*draw(1, 2, 1, 20, 20, 8), scaling=0.3, backend=backend)
    assert (output.dtype, F.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", FAST)
def test_compilation_sees_one_graph(backend):
    inputs = draw(2, 2, 1, 20, 20, 16)

    def output(*qkv):
        return selective_attention(*qkv, scaling=0.3, backend=backend)[0]

    compiled = torch.compile(output, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, output(*inputs))
    for ours, theirs in zip(gradients(compiled, inputs), gradients(output(*inputs), inputs)):
        torch.testing.assert_close(ours, theirs)


@needs_compiler
def test_the_operator_passes_the_checks_of_torch_library():
    q, k, v = draw(1, 2, 1, 5, 5, 16)
    arguments = (q, k, v, None, torch.zeros(1, 5, dtype=torch.bool), torch.zeros(1, 5), 0.25, 1)
    torch.library.opcheck(torch.ops.trialist.selective_attention.default, arguments)


def test_block_sums_equal_cumsum_in_both_directions():
    for T in (1, 2, 7, 16, 31):
        x = torch.randn(2, T, 3, dtype=torch.float64)
        torch.testing.assert_close(selective._before(x), x.cumsum(1) - x)
        torch.testing.assert_close(selective._before(x, reverse=True), x.flip(1).cumsum(1).flip(1) - x)


def test_x_transformers_agrees_where_it_has_no_cache():
    attend = pytest.importorskip("x_transformers.attend", reason="the peer of the bench extra is not installed")
    inputs = draw(2, 3, 3, 21, 21, 8)
    peer = attend.Attend(causal=True, selective=True, heads=3, scale=0.5)
    torch.testing.assert_close(
        selective_attention(*inputs, scaling=0.5)[0].transpose(1, 2), peer(*inputs)[0], atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selector_head": 4}, "selector_head 4"),
        ({"key": torch.zeros(2, 3, 6, 8), "value": torch.zeros(2, 3, 6, 8)}, "divides"),
        ({"key": torch.zeros(2, 2, 5, 8), "value": torch.zeros(2, 2, 5, 8)}, "5 columns for 6 queries"),
        ({"attention_mask": torch.zeros(2, 1, 6, 7)}, "broadcasts to"),
        ({"attention_mask": torch.zeros(2, 1, 6, 6, dtype=torch.int64)}, "int64"),
        ({"protect": torch.zeros(2, 5, dtype=torch.bool)}, "protect has shape"),
        ({"penalty": torch.zeros(2, 5)}, "penalty has shape"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"backend": "cuda"}, "reference, torch, c"),
        ({"backend": "c", "dropout": 0.5, "training": True}, "dropout"),
    ],
)
def test_bad_arguments_are_named(change, words):
    query, key, value = draw(2, 4, 2, 6, 6, 8)
    with pytest.raises(ValueError, match=words):
        selective_attention(**({"query": query, "key": key, "value": value, "scaling": 1.0} | change))


def remembered(query, key, mask, *, scaling, selector_head, protect, penalty, tau):
    """M of every query from its definition, in float64."""
    B, _, T, _ = query.shape
    M = torch.zeros(B, T, dtype=torch.float64)
    for i in range(T):
        part = None if mask is None else mask[:, :, :i, : key.shape[2]]
        F = penalty.double()
        if i:
            shorter = query[:, :, :i], key[:, :, : key.shape[2] - T + i]
            width = shorter[1].shape[2]
            part = None if part is None else part[..., :width]
            found = selective_attention(
                *(x.double() for x in (shorter[0], shorter[1], shorter[1])), part, scaling=scaling,
                selector_head=selector_head, protect=protect[:, :width], penalty=penalty[:, :width], backend="reference",
            )[1]  # fmt: skip
            F = torch.cat([found, F[:, width:]], 1)
        own = key.shape[2] - T + i
        for b in range(B):
            for j in range(own + 1):
                seen = True if mask is None else mask[min(b, len(mask) - 1), 0, i, j]
                if bool(seen) if mask is None or mask.dtype == torch.bool else bool(seen > -1e30):
                    M[b, i] += 1 - min(float(F[b, j]), tau) / tau
    return M


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(masks(1, 1, 1)))
def test_memory_is_the_sum_of_what_is_not_forgotten(backend, name):
    q, k, v = draw(2, 4, 2, 7, 9, 3)
    mask = masks(2, 7, 9)[name]
    protect = torch.zeros(2, 9, dtype=torch.bool)
    protect[0, 3] = protect[1, 0] = True
    options = {"scaling": 0.4, "selector_head": 2, "protect": protect, "penalty": torch.rand(2, 9) * 0.5, "tau": 1.3}
    plain = selective_attention(q, k, v, mask, backend=backend, **{**options, "tau": None})
    output, F, M = selective_attention(q, k, v, mask, backend=backend, **options)
    assert len(plain) == 2
    assert torch.equal(output, plain[0])
    assert torch.equal(F, plain[1])
    torch.testing.assert_close(M.double(), remembered(q, k, mask, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_of_the_memory_equal_finite_differences(backend):
    inputs = draw(2, 4, 2, 6, 7, 3, dtype=torch.float64)
    mask = masks(2, 6, 7)["left padding"]

    def both(*qkv):
        output, _, M = selective_attention(*qkv, mask, scaling=0.9, selector_head=1, tau=1.5, backend=backend)
        return output, M

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
@pytest.mark.parametrize("name", ["causal", "left padding", "additive with distances"])
def test_gradients_of_output_and_memory_equal_those_of_the_reference(backend, sizes, name):
    B, H, _, T, S, D = sizes
    inputs, mask = draw(*sizes), masks(B, T, S)[name]
    options = {"scaling": D**-0.5, "selector_head": H - 1, "penalty": torch.rand(B, S), "tau": 2.0}
    found = []
    for chosen in (backend, "reference"):
        output, _, M = selective_attention(*inputs, mask, backend=chosen, **options)
        alone = torch.autograd.grad(M.square().sum() / T, inputs[:2], retain_graph=True)
        found.append((M, *torch.autograd.grad(output.sum() + 0.1 * M.sum(), inputs), *alone))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_first_previous_and_own_token_are_remembered_where_everything_is_selected(backend):
    q, k, v = (x.detach().abs() + 1.0 for x in draw(1, 2, 2, 70, 70, 4))
    M = selective_attention(q, k, v, scaling=1.0, tau=1.0, backend=backend)[2]
    assert M.tolist() == [[1.0, 2.0] + [3.0] * 68]


def test_a_memory_without_a_positive_tau_is_refused():
    q, k, v = draw(1, 2, 2, 5, 5, 4)
    with pytest.raises(ValueError, match=r"tau is 0\.0; it must be above 0"):
        selective_attention(q, k, v, scaling=1.0, tau=0.0)
