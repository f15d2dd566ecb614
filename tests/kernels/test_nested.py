"""Bit-planes, and the products of the C kernel against a loop in float64."""

from __future__ import annotations

import logging

import pytest
import torch

from trialist.kernels import nested, nested_cpu
from trialist.kernels.nested import dequantize, nested_linear, pack_planes, unpack_codes
from trialist.kernels.nested_cpu import ISAS

needs_compiler = pytest.mark.skipif(not nested.available(), reason="no C compiler")
FLOATS = ("scalar", "avx2", "avx512")
"""Instructions that multiply float32"""


def drawn(N, K, P, b, dtype=torch.float16, seed=0):
    """Codes (N, K), their planes, a table for b bits, and the matrix by a loop over the definition, float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << P, (N, K), generator=generator, dtype=torch.uint8)
    table = torch.randn(N, 1 << b, generator=generator).to(dtype)
    W = torch.tensor([[float(table[r, int(codes[r, k]) >> (P - b)]) for k in range(K)] for r in range(N)])
    return codes, pack_planes(codes, P), table, W.double().reshape(N, K)


def usable(isa: str) -> None:
    if min(ISAS.index(isa), 2 if "emulated" in isa else 3) > nested_cpu.best():
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("K", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("P", [1, 3, 8])
def test_codes_come_back_from_planes_whole_and_in_their_first_bits(K, P):
    codes, planes, _, _ = drawn(3, K, P, 1)
    assert planes.shape == (P, 3, -(-K // 64))
    assert torch.equal(unpack_codes(planes, K), codes)
    for b in range(1, P + 1):
        assert torch.equal(unpack_codes(planes, K, b), codes >> (P - b))


def test_a_bit_of_a_plane_stands_where_the_layout_says():
    codes = torch.zeros(2, 130, dtype=torch.uint8)
    codes[1, 66] = 0b100
    planes = pack_planes(codes, 3)
    assert planes[0, 1, 1] == 1 << 2
    assert int((planes != 0).sum()) == 1


def test_the_last_bit_of_a_word_is_the_sign_of_its_integer():
    planes = pack_planes(torch.tensor([[0] * 63 + [1]], dtype=torch.uint8), 1)
    assert int(planes) == -(2**63)


@needs_compiler
@pytest.mark.parametrize("isa", ISAS[:3])
@pytest.mark.parametrize("b", [1, 2, 4, 5, 6, 8])
def test_the_kernel_looks_up_the_matrix_exactly(isa, b):
    usable(isa)
    for dtype in nested.TABLES:
        _, planes, table, W = drawn(3, 150, 8, b, dtype)
        found = nested_cpu.dequantize(planes, table, 150, b, torch.float32, None, ISAS.index(isa))
        assert torch.equal(found.double(), W)
        brain = nested_cpu.dequantize(planes, table, 150, b, torch.bfloat16, slice(1, 3), ISAS.index(isa))
        assert torch.equal(brain, W[1:].bfloat16())
    assert torch.equal(dequantize(planes, table, 150, torch.float64, backend="reference"), W)


@needs_compiler
@pytest.mark.parametrize("isa", FLOATS)
@pytest.mark.parametrize(("b", "dtype"), [(b, nested.TABLES[b % 2]) for b in range(1, 9)] + [(7, torch.float16)])
@pytest.mark.parametrize("K", [1, 70, 576, 1100])
def test_products_equal_the_definition_to_the_rounding_of_their_sums(isa, b, dtype, K):
    usable(isa)
    _, planes, table, W = drawn(3, K, 8, b, dtype, seed=K)
    for M in (1, 2, 3, 5, 8, 11):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
        y = nested_linear(x, planes, table, backend="c", isa=isa)
        bound = 4e-6 * (x.double().abs() @ W.abs().T)  # float32 sums in another order
        assert ((y.double() - x.double() @ W.T).abs() <= bound + 1e-30).all()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS[3:])
@pytest.mark.parametrize("b", range(1, 9))
@pytest.mark.parametrize("K", [70, 576, 1100])
def test_products_of_bfloat16_stay_within_its_rounding(isa, b, K):
    usable(isa)
    _, planes, table, W = drawn(3, K, 8, b, nested.TABLES[b % 2], seed=K)
    for M in (1, 3, 4):
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
        y = nested_linear(x, planes, table, backend="c", isa=isa)
        bound = 2**-7 * (x.double().abs() @ W.abs().T)  # of the table, of the product, of the result
        assert ((y.double() - x.double() @ W.T).abs() <= bound).all()


@pytest.mark.parametrize("backend", nested.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_with_a_bias_and_further_dimensions(backend, dtype):
    if backend == "c" and not nested.available():
        pytest.skip("no C compiler")
    _, planes, table, W = drawn(5, 130, 4, 3)
    x = torch.randn(2, 3, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.arange(5.0).to(dtype)
    y = nested_linear(x, planes, table, bias, backend=backend)
    expected = x.double() @ W.T + bias.double()
    assert y.dtype == dtype
    assert y.shape == (2, 3, 5)
    error = (y.double() - expected).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (x.double().abs() @ W.abs().T + bias.double())).all()


@needs_compiler
def test_bits_of_a_result_do_not_depend_on_the_number_of_threads():
    _, planes, table, _ = drawn(300, 300, 4, 4)
    x, threads = torch.randn(2, 300), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(nested_linear(x, planes, table, backend="c"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("M", [2, 11])
def test_the_gradient_of_the_input_is_that_of_the_matrix(M):
    _, planes, table, W = drawn(5, 70, 4, 3)
    x = torch.randn(M, 70, requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    weigh = torch.randn(M, 5)
    (nested_linear(x, planes, table, bias) * weigh).sum().backward()
    torch.testing.assert_close(x.grad, weigh @ W.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.grad, weigh.sum(0))


@needs_compiler
@pytest.mark.slow
def test_the_operator_is_one_that_the_compiler_can_trust():
    _, planes, table, _ = drawn(5, 70, 4, 3)
    x = torch.randn(3, 70, requires_grad=True)
    torch.library.opcheck(nested_cpu.nested_product, (x, planes, table, ""))


def test_nothing_comes_of_no_rows():
    _, planes, table, _ = drawn(5, 70, 4, 3)
    assert nested_linear(torch.empty(0, 70), planes, table).shape == (0, 5)


@needs_compiler
def test_the_choice_and_the_instructions_are_said_once(caplog):
    _, planes, table, _ = drawn(5, 70, 4, 3)
    nested._say.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            nested_linear(torch.randn(1, 70), planes, table)
        nested_linear(torch.randn(1, 70).double(), planes, table)
    assert caplog.text.count(f"backend 'c' with {nested.instructions()}") == 1
    assert caplog.text.count("backend 'reference', which builds the matrix at every call") == 1


def test_inputs_that_do_not_fit_are_refused_with_their_shapes():
    _, planes, table, _ = drawn(5, 70, 4, 3)
    with pytest.raises(ValueError, match=r"do not fit 129 inputs: wanted int64 \(P, N, 3\)"):
        nested_linear(torch.randn(1, 129), planes, table)
    with pytest.raises(ValueError, match=r"\(5, 32\)"):
        nested_linear(torch.randn(1, 70), planes, torch.zeros(5, 32).half())
    with pytest.raises(ValueError, match="backend 'c' takes float32"):
        nested_linear(torch.randn(1, 70).double(), planes, table, backend="c")
    with pytest.raises(ValueError, match="codes of 2 bits lie in"):
        pack_planes(torch.full((1, 3), 4, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="'mkl' is unknown"):
        nested_linear(torch.randn(1, 70), planes, table, backend="mkl")
