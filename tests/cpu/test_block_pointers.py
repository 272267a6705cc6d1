"""`tl.make_block_ptr` and `tl.advance`, in the releases of Triton that have them; 3.9 has no more.

Expected values are torch's, of the window that a block shows of a tensor.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import RELEASE, known_if
from windows import window

pytestmark = pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")

KNOWN, REFUSAL = RELEASE < (3, 9), "Block pointers have been removed"


@triton.jit
def _show(
    x, out, rows, columns, row_stride, column_stride, row, column,
    M: tl.constexpr, N: tl.constexpr, PADDING: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    block = tl.make_block_ptr(x, (rows, columns), (row_stride, column_stride), (row, column), (M, N), ORDER)
    tile = tl.load(block, boundary_check=(0, 1), padding_option=PADDING)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tile)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corner=st.tuples(st.integers(-20, 45), st.integers(-20, 45)),
    extents=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([1, 8, 32])),
    turned=st.booleans(),
    padding=st.sampled_from(["zero", "nan"]),
)
@settings(max_examples=20, deadline=None)
def test_a_block_shows_its_window_and_padding_beyond(shape, corner, extents, turned, padding):
    x = torch.randn(shape[::-1]).T if turned else torch.randn(shape)
    out = torch.full(extents, -9.0)
    order = (0, 1) if turned else (1, 0)
    with known_if(KNOWN, REFUSAL):
        _show[(1,)](x, out, *shape, *x.stride(), *corner, *extents, PADDING=padding, ORDER=order)
        expected = window(x, corner, extents, 0.0 if padding == "zero" else float("nan"))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _put(out, rows, columns, row, column, M: tl.constexpr, N: tl.constexpr):
    block = tl.make_block_ptr(out, (rows, columns), (columns, 1), (row, column), (M, N), (1, 0))
    tl.store(block, tl.full((M, N), 7.0, tl.float32), boundary_check=(0, 1))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corner=st.tuples(st.integers(-20, 45), st.integers(-20, 45)),
    extents=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([1, 8, 32])),
)
@settings(max_examples=15, deadline=None)
def test_a_block_writes_what_lies_within_the_tensor_and_nothing_else(shape, corner, extents):
    around = torch.zeros(3, *shape)  # a store out of bounds would show in the first or the last
    (top, bottom), (left, right) = ((max(at, 0), at + n) for at, n in zip(corner, extents, strict=True))
    expected = around.clone()
    expected[1, top : max(bottom, 0), left : max(right, 0)] = 7.0
    with known_if(KNOWN, REFUSAL):
        _put[(1,)](around[1], *shape, *corner, *extents)
        assert torch.equal(around, expected)


@triton.jit
def _matmul(a, b, out, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    left = tl.make_block_ptr(a, (m, k), (k, 1), (row, 0), (BM, BK), (1, 0))
    right = tl.make_block_ptr(b, (k, n), (n, 1), (0, column), (BK, BN), (1, 0))
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, k, BK):
        # Triton pads with zero where a load that is checked names no padding.
        total = tl.dot(tl.load(left, boundary_check=(0, 1)), tl.load(right, boundary_check=(0, 1)), total)
        left = tl.advance(left, (0, BK))
        right = moved_down(right, BK)
    result = tl.make_block_ptr(out, (m, n), (n, 1), (row, column), (BM, BN), (1, 0))
    tl.store(result, total.to(out.dtype.element_ty), boundary_check=(0, 1))


@triton.jit
def moved_down(block, BK: tl.constexpr):
    return tl.advance(block, (BK, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 70))
@settings(max_examples=6, deadline=None)
def test_blocks_are_advanced_around_a_loop(dtype, m, n, k):
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype)
    with known_if(KNOWN, REFUSAL):
        _matmul[(triton.cdiv(m, 16), triton.cdiv(n, 16))](a, b, out, m, n, k, BM=16, BN=16, BK=32)
        expected = a.double() @ b.double()
        # k roundings in float32, and one of the result.
        bound = (a.double().abs() @ b.double().abs()) * (k + 1) * 2.0**-24
        info = torch.finfo(dtype)  # below its smallest normal number the steps are absolute
        assert ((out.double() - expected).abs() <= bound + expected.abs() * info.eps + info.tiny * info.eps).all()


@triton.jit
def _flat_and_deep(x, flat, deep, rows, columns, N: tl.constexpr):
    line = tl.make_block_ptr(x, (2 * rows * columns,), (1,), (3,), (N,), (0,))
    tl.store(flat + tl.arange(0, N), tl.load(tl.advance(line, (N,)), boundary_check=(0,), padding_option="zero"))
    cube = tl.make_block_ptr(x, (2, rows, columns), (rows * columns, columns, 1), (0, 1, 2), (2, 4, N), (2, 1, 0))
    at = tl.arange(0, 2)[:, None, None] * 4 * N + tl.arange(0, 4)[None, :, None] * N + tl.arange(0, N)[None, None, :]
    # Both of the first axis' elements are there, so that it need not be checked.
    tl.store(deep + at, tl.load(cube, boundary_check=(1, 2), padding_option="zero"))


@given(rows=st.integers(1, 8), columns=st.integers(1, 20))
@settings(max_examples=8, deadline=None)
def test_blocks_have_one_axis_or_three(rows, columns):
    x = torch.randn(2, rows, columns)
    flat, deep = torch.full((8,), -9.0), torch.full((2, 4, 8), -9.0)
    with known_if(KNOWN, REFUSAL):
        _flat_and_deep[(1,)](x, flat, deep, rows, columns, N=8)
        assert torch.equal(flat, window(x.reshape(-1), (11,), (8,), 0.0))
        assert torch.equal(deep, window(x, (0, 1, 2), (2, 4, 8), 0.0))
