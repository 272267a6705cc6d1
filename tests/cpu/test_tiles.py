"""Operations on whole tiles: reductions, scans, products, transposition and reshaping, against torch in float64."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st


@triton.jit
def _reduce(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, OP: tl.constexpr):
    r, c = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + r * N + c)
    if OP == "sum":
        y = tl.sum(x, AXIS)
    elif OP == "max":
        y = tl.max(x, AXIS)
    elif OP == "min":
        y = tl.min(x, AXIS)
    elif OP == "argmax":
        y = tl.argmax(x, AXIS)
    elif OP == "cumsum":
        y = tl.cumsum(x, AXIS)
    elif OP == "cumsum_reverse":
        y = tl.cumsum(x, AXIS, reverse=True)
    if OP == "cumsum" or OP == "cumsum_reverse":
        tl.store(out_ptr + r * N + c, y)
    elif AXIS == 0:
        tl.store(out_ptr + tl.arange(0, N), y)
    else:
        tl.store(out_ptr + tl.arange(0, M), y)


EXTENTS = [1, 2, 4, 16, 32, 128]


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "cumsum", "cumsum_reverse"])
@given(m=st.sampled_from(EXTENTS), n=st.sampled_from(EXTENTS), axis=st.sampled_from([0, 1]), ties=st.booleans())
@settings(max_examples=8, deadline=None)
def test_reductions_and_scans_along_either_axis(op, m, n, axis, ties):
    x = torch.randint(0, 3, (m, n)).float() if ties else torch.randn(m, n)
    d = x.double()
    if op.startswith("cumsum"):
        expected = d.cumsum(axis) if op == "cumsum" else d.flip(axis).cumsum(axis).flip(axis)
        # A partial sum of k terms carries at most k roundings of its own size.
        bound = d.abs().cumsum(axis) if op == "cumsum" else d.abs().flip(axis).cumsum(axis).flip(axis)
        bound = bound * x.shape[axis] * 2.0**-24
    elif op == "sum":
        expected, bound = d.sum(axis), d.abs().sum(axis) * x.shape[axis] * 2.0**-24
    else:
        # The first of equal values wins, as Triton's tie break says.
        expected = {"max": d.amax, "min": d.amin, "argmax": lambda a: _first_argmax(d, a)}[op](axis)
        bound = torch.zeros_like(expected, dtype=torch.float64)
    out = torch.full(expected.shape, -9, dtype=torch.int32 if op == "argmax" else torch.float32)
    _reduce[(1,)](x, out, M=m, N=n, AXIS=axis, OP=op)
    assert ((out.double() - expected.double()).abs() <= bound).all()


def _first_argmax(x, axis):
    return (x == x.amax(axis, keepdim=True)).double().argmax(axis)


@triton.jit
def _row_stats(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + row * stride + offsets, mask=mask, other=0.0)
    mean = tl.sum(x) / n
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred) / n
    tl.store(out_ptr + row * stride + offsets, centred * tl.rsqrt(variance + 1e-5), mask=mask)


@given(rows=st.integers(1, 40), n=st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_a_layernorm_of_any_width(rows, n):
    x, out = torch.randn(rows, n), torch.full((rows, n), float("nan"))
    _row_stats[(rows,)](x, out, n, n, BLOCK=512)
    expected = torch.nn.functional.layer_norm(x.double(), (n,), eps=1e-5)
    # A width of one has no variance, so that 1 / sqrt(eps) magnifies nothing but an exact zero.
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@triton.jit
def _matmul(
    a_ptr, b_ptr, c_ptr, m, n, k, a0, a1, b0, b1, c0, c1,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    a_tile = a_ptr + rows[:, None] * a0 + inner[None, :] * a1
    b_tile = b_ptr + inner[:, None] * b0 + cols[None, :] * b1
    for start in range(0, k, BK):
        a = tl.load(a_tile, mask=(rows[:, None] < m) & (inner[None, :] < k - start), other=0.0)
        b = tl.load(b_tile, mask=(inner[:, None] < k - start) & (cols[None, :] < n), other=0.0)
        acc = tl.dot(a, b, acc)
        a_tile += BK * a1
        b_tile += BK * b0
    mask = (rows[:, None] < m) & (cols[None, :] < n)
    tl.store(c_ptr + rows[:, None] * c0 + cols[None, :] * c1, acc.to(c_ptr.dtype.element_ty), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@example(m=70, n=70, k=1, blocks=(16, 16, 16), transposed=(False, False))
@given(
    m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 70),
    blocks=st.sampled_from([(16, 16, 16), (32, 8, 4), (1, 64, 32), (64, 1, 16), (2, 2, 1)]),
    transposed=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_a_matmul_of_any_shape_block_and_layout(dtype, m, n, k, blocks, transposed):
    a = torch.randn((k, m) if transposed[0] else (m, k)).to(dtype)
    b = torch.randn((n, k) if transposed[1] else (k, n)).to(dtype)
    a, b = a.T if transposed[0] else a, b.T if transposed[1] else b
    c = torch.full((m, n), float("nan"), dtype=dtype)
    bm, bn, bk = blocks
    grid = (triton.cdiv(m, bm), triton.cdiv(n, bn))
    _matmul[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), BM=bm, BN=bn, BK=bk)
    expected = a.double() @ b.double()
    # Products are exact or rounded once, sums rounded k times in float32, the result once in its own type, where
    # numbers below the normal ones are as far apart as the least of those.
    limits = torch.finfo(dtype)
    rounding = expected.abs().clamp(min=limits.smallest_normal) * limits.eps / 2
    bound = (a.double().abs() @ b.double().abs()) * (k + 1) * 2.0**-24 + rounding
    assert ((c.double() - expected).abs() <= bound).all()


@triton.jit
def _permute(x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    i, j, k = tl.arange(0, A), tl.arange(0, B), tl.arange(0, C)
    x = tl.load(x_ptr + i[:, None, None] * B * C + j[None, :, None] * C + k[None, None, :])
    y = tl.permute(x * 2, (2, 0, 1))
    flat = tl.reshape(y, (A * B * C,))
    tl.store(out_ptr + tl.arange(0, A * B * C), flat)


@given(shape=st.tuples(*[st.sampled_from([1, 2, 8, 32])] * 3))
@settings(max_examples=12, deadline=None)
def test_permutation_and_reshape_of_three_axes(shape):
    x = torch.randn(shape)
    out = torch.full((x.numel(),), float("nan"))
    _permute[(1,)](x, out, *shape)
    assert torch.equal(out, (2 * x).permute(2, 0, 1).reshape(-1))


@triton.jit
def _outer(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, M), tl.arange(0, N)
    x, y = tl.exp(tl.load(x_ptr + r)), tl.exp(tl.load(y_ptr + c))
    grid = tl.broadcast_to(x[:, None], (M, N)) * y[None, :]
    tl.store(out_ptr + r[:, None] * N + c[None, :], grid + tl.sum(grid, 1)[:, None])


@given(m=st.sampled_from(EXTENTS), n=st.sampled_from(EXTENTS))
@settings(max_examples=12, deadline=None)
def test_broadcasts_combine_with_reductions(m, n):
    x, y, out = torch.randn(m), torch.randn(n), torch.full((m, n), float("nan"))
    _outer[(1,)](x, y, out, M=m, N=n)
    product = x.double().exp()[:, None] * y.double().exp()
    # All terms are positive: n + 3 roundings and 2 x 2 ulp of exp, relative.
    torch.testing.assert_close(out.double(), product + product.sum(1, keepdim=True), rtol=(n + 8) * 2.0**-23, atol=0)


@triton.jit
def _batched(a_ptr, b_ptr, c_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, m, n, k = tl.arange(0, B)[:, None, None], tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i * M * K + m[None, :, None] * K + k[None, None, :])
    b = tl.load(b_ptr + i * K * N + k[None, :, None] * N + n[None, None, :])
    tl.store(c_ptr + i * M * N + m[None, :, None] * N + n[None, None, :], tl.dot(a, b))


def test_batched_products(rng):
    a, b = torch.randn(4, 16, 32, generator=rng), torch.randn(4, 32, 8, generator=rng)
    c = torch.full((4, 16, 8), float("nan"))
    _batched[(1,)](a, b, c, B=4, M=16, N=8, K=32)
    bound = (a.double().abs() @ b.double().abs()) * 33 * 2.0**-24
    assert ((c.double() - a.double() @ b.double()).abs() <= bound).all()
