"""Element-wise operations, casts and memory accesses of ordinary Triton kernels, against torch in float64."""

import ctypes
import mmap

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.language.extra import libdevice

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "floordiv":
        z = x // y
    elif OP == "mod":
        z = x % y
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "min":
        z = tl.minimum(x, y)
    elif OP == "less":
        z = x < y
    elif OP == "where":
        z = tl.where(x > y, x, -y)
    elif OP == "and":
        z = x & y
    elif OP == "xor":
        z = x ^ y
    tl.store(out_ptr + offsets, z, mask=mask)


def binary(x, y, op, dtype=None, block=128):
    out = torch.full(x.shape, 77, dtype=dtype or x.dtype)
    guard = out.clone()
    _binary[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), OP=op, BLOCK=block)
    assert x.numel() == 0 or not torch.equal(out, guard), "the kernel wrote nothing"
    return out


FLOAT_REFERENCE = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "where": lambda x, y: torch.where(x > y, x, -y),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", FLOAT_REFERENCE)
def test_float_arithmetic_is_correctly_rounded(op, dtype, rng):
    x, y = (torch.randn(1000, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = FLOAT_REFERENCE[op](x.double(), y.double()).to(dtype)
    torch.testing.assert_close(binary(x, y, op), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "floordiv", "mod", "max", "min", "and", "xor"])
def test_integer_arithmetic_wraps_and_divides_towards_zero(op, dtype, rng):
    limit = torch.iinfo(dtype)
    x = torch.randint(limit.min, limit.max, (300,), generator=rng, dtype=dtype)
    y = torch.randint(-50, 50, (300,), generator=rng, dtype=dtype)
    y[y == 0] = 7
    x[:3], y[:3] = limit.min, torch.tensor([-1, 1, 2], dtype=dtype)
    if op in ("floordiv", "mod"):  # by Python's integers: torch itself traps on the first quotient, which wraps
        quotients = [
            abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
        if op == "mod":
            values = [a - b * q for a, b, q in zip(x.tolist(), y.tolist(), quotients, strict=True)]
        else:
            values = [limit.min if q > limit.max else q for q in quotients]
        expected = torch.tensor(values, dtype=dtype)
    else:
        expected = {
            "add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum,
            "and": torch.bitwise_and, "xor": torch.bitwise_xor,
        }[op](x, y)  # fmt: skip
    torch.testing.assert_close(binary(x, y, op), expected, rtol=0, atol=0)


def test_comparisons_write_bools(rng):
    x, y = (torch.randn(200, generator=rng) for _ in range(2))
    assert torch.equal(binary(x, y, "less", dtype=torch.bool), x < y)


def test_maximum_and_minimum_prefer_the_number_to_nan():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 1.0, nan, -0.0, inf])
    y = torch.tensor([2.0, nan, nan, 0.0, -inf])
    torch.testing.assert_close(binary(x, y, "max"), torch.tensor([2.0, 1.0, nan, 0.0, inf]), equal_nan=True)
    torch.testing.assert_close(binary(x, y, "min"), torch.tensor([2.0, 1.0, nan, -0.0, -inf]), equal_nan=True)
    assert torch.signbit(binary(x, y, "min")[3])
    assert not torch.signbit(binary(x, y, "max")[3])


@triton.jit
def _propagate(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_propagates_nan_where_asked():
    nan = float("nan")
    x, y, out = torch.tensor([nan, 1.0, 3.0, 4.0]), torch.tensor([2.0, nan, 1.0, 9.0]), torch.zeros(4)
    _propagate[(1,)](x, y, out, N=4)
    torch.testing.assert_close(out, torch.tensor([nan, nan, 3.0, 9.0]), equal_nan=True)


@triton.jit
def _cast(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask).to(out_ptr.dtype.element_ty), mask=mask)


def cast(x, dtype):
    out = torch.full(x.shape, 1, dtype=dtype)
    _cast[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_float_casts_round_to_nearest_even_once(source, target, rng):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65519.9, 65520.0, 1e-8, 3.4e38, 6e-8])
    scale = torch.randint(-20, 16, (2000,), generator=rng).double().exp2()
    drawn = torch.randn(2000, generator=rng, dtype=torch.float64) * scale
    ties = 1 + torch.arange(64).double() * 2.0**-9  # halfway between bfloat16 neighbours every other time
    beyond = ties + 2.0**-40  # a second rounding would make ties of these
    x = torch.cat([special.double(), drawn, ties, beyond, 1 + torch.arange(64).double() * 2.0**-11 + 2.0**-40]).to(
        source
    )
    torch.testing.assert_close(cast(x, target), _round_once(x.double(), target), rtol=0, atol=0, equal_nan=True)


def _round_once(x, target):
    """torch rounds double to half through float; this rounds once, by hand, from exact arithmetic in float64."""
    if target in (torch.float32, torch.float64):
        return x.to(target)
    mantissa, smallest = (10, -14) if target is torch.float16 else (7, -126)
    exponent = torch.frexp(x).exponent - 1
    unit = torch.ldexp(torch.ones_like(x), exponent.clamp(min=smallest) - mantissa)
    rounded = torch.where(torch.isfinite(x), torch.round(x / unit) * unit, x)
    return rounded.to(torch.float32).to(target)


@pytest.mark.parametrize("target", [torch.int32, torch.int64, torch.int8])
def test_floats_become_integers_by_truncation(target):
    x = torch.tensor([0.0, 0.9, -0.9, 1.5, -1.5, 100.99, -128.0, 127.0])
    assert torch.equal(cast(x, target), x.trunc().to(target))


@pytest.mark.parametrize("source", [torch.int32, torch.int64])
@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.bfloat16])
def test_integers_become_the_nearest_float(source, target):
    limit = torch.iinfo(source)
    x = torch.tensor([0, 1, -1, 257, 258, 259, 2**24 + 1, limit.max, limit.min, 123456789], dtype=source)
    # numpy's int64 -> float64 is correctly rounded, and all of these are exact in float64 but the largest.
    assert torch.equal(
        cast(x, target), x.to(torch.float64).to(torch.float32 if target is torch.bfloat16 else target).to(target)
    )


@given(n=st.integers(0, 700), block=st.sampled_from([1, 4, 32, 256]), offset=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_masked_tails_touch_nothing_else(n, block, offset):
    memory = torch.arange(1000, dtype=torch.float32)
    before = memory.clone()
    x, out = memory[offset : offset + n], torch.full((n + 8,), -1.0)
    if n:
        _binary[(triton.cdiv(n, block),)](x, x, out, n, OP="add", BLOCK=block)
    assert torch.equal(out[:n], 2 * x)
    assert torch.equal(out[n:], torch.full((8,), -1.0))
    assert torch.equal(memory, before)


@triton.jit
def _strided(x_ptr, out_ptr, rows, cols, x_row, x_col, o_row, o_col, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    mask = (r < rows) & (c < cols)
    x = tl.load(x_ptr + r * x_row + c * x_col, mask=mask, other=5.0)
    tl.store(out_ptr + r * o_row + c * o_col, x * 2 + 1, mask=mask)


@given(rows=st.integers(1, 20), cols=st.integers(1, 33), transpose_in=st.booleans(), transpose_out=st.booleans())
@settings(max_examples=40, deadline=None)
def test_strided_tiles_of_any_shape(rows, cols, transpose_in, transpose_out):
    x = torch.randn((cols, rows) if transpose_in else (rows, cols))
    x = x.T if transpose_in else x
    out = torch.full((cols + 1, rows + 2) if transpose_out else (rows + 1, cols + 2), float("nan"))
    view = out.T if transpose_out else out
    _strided[(1,)](x, view, rows, cols, *x.stride(), *view.stride(), R=32, C=64)
    torch.testing.assert_close(view[:rows, :cols], x * 2 + 1, rtol=0, atol=0)
    assert view[rows:].isnan().all()
    assert view[:, cols:].isnan().all()


@triton.jit
def _gather(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    index = tl.load(index_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, tl.load(x_ptr + index, mask=mask), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_indirect_loads_of_every_width(dtype, rng):
    x = torch.randn(500, generator=rng).mul(10).to(dtype)
    index = torch.randint(0, 500, (100,), generator=rng)
    out = torch.zeros(100, dtype=dtype)
    _gather[(1,)](x, index, out, 100, BLOCK=128)
    assert torch.equal(out, x[index])


@triton.jit
def _functions(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    one = libdevice.tanh(x) + libdevice.pow(tl.abs(x), x) + libdevice.log1p(tl.abs(x)) + tl.floor(x) + tl.ceil(x)
    two = tl.sigmoid(x) + libdevice.expm1(x) + libdevice.atan(x) + tl.sqrt(tl.abs(x)) + tl.fma(x, x, x) + tl.cos(x)
    tl.store(out_ptr + offsets, one + two, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_math_and_libdevice_functions(dtype, rng):
    x = torch.randn(300, generator=rng, dtype=torch.float64).to(dtype)
    out = torch.zeros_like(x)
    _functions[(1,)](x, out, 300, BLOCK=512)
    d = x.double()
    expected = d.tanh() + d.abs().pow(d) + d.abs().log1p() + d.floor() + d.ceil()
    expected = expected + d.sigmoid() + d.expm1() + d.atan() + d.abs().sqrt() + d * d + d + d.cos()
    # Each of the eleven terms is good to 2 ulp of at most 2^5, the sums to half of one.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=11 * 2.5 * 32 * EPS[dtype])


@triton.jit
def _row_sums(x_ptr, out_ptr, rows, stride, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    row, d = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, 1), mask=row < rows)


@pytest.mark.parametrize("width", [1, 6, 8, 15, 16, 17, 24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_masked_off_memory_has_no_influence(width, dtype, rng):
    # What LLVM 22 got wrong with its own masked loads: the upper half of a mask that is a constant.
    memory = torch.full((4000,), float("nan"), dtype=dtype)
    rows = memory[1000 : 1000 + 33 * (width + 3)].view(33, width + 3)[:, 2 : 2 + width]
    rows.copy_(torch.randint(-8, 8, (33, width), generator=rng))
    out = torch.full((33,), float("nan"), dtype=dtype)
    _row_sums[(2,)](rows, out, 33, rows.stride(0), D=width, R=32, BLOCK=triton.next_power_of_2(max(width, 16)))
    assert torch.equal(out, rows.sum(1))


def test_masked_off_memory_need_not_exist():
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, 3 * page) as memory:
        handle = (ctypes.c_char * (3 * page)).from_buffer(memory)
        start = ctypes.addressof(handle)
        for guard in (start, start + 2 * page):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
        try:
            for n in (1, 5, 13, 100):
                for first in (0, page // 4 - n):
                    x = torch.frombuffer(memory, dtype=torch.float32, count=n, offset=page + 4 * first)
                    x.fill_(3.0)
                    _binary[(triton.cdiv(n, 32) + 1,)](x, x, x, n, OP="mul", BLOCK=32)
                    _gather[(1,)](x, torch.arange(n), x, n, BLOCK=128)
                    assert torch.equal(x, torch.full((n,), 9.0))
                    del x
        finally:
            for guard in (start, start + 2 * page):
                libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 3)
            del handle


@triton.jit
def _hash(out_ptr, start, N: tl.constexpr):
    index = start + tl.arange(0, N)
    hashed = index * 1103515245 + 12345
    tl.store(out_ptr + tl.arange(0, N), hashed.to(tl.int64) * 2 + index.to(tl.int64))


@pytest.mark.parametrize("start", [0, 7, 2**31 - 20])
def test_index_arithmetic_wraps_where_its_value_is_used(start):
    out = torch.zeros(64, dtype=torch.int64)
    _hash[(1,)](out, start, N=64)
    index = (start + torch.arange(64)).to(torch.int32)
    hashed = (index.long() * 1103515245 + 12345).to(torch.int32)
    assert torch.equal(out, hashed.long() * 2 + index.long())


@triton.jit
def _long_chain(x_ptr, out_ptr, LENGTH: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    for k in tl.static_range(LENGTH):
        x = x * 3 + k
        x = x ^ (x >> 7)
    tl.store(out_ptr + offsets, x)


def test_a_chain_of_a_thousand_operations(rng):
    x = torch.randint(-(2**31), 2**31, (32,), generator=rng).to(torch.int32)
    out = torch.zeros_like(x)
    _long_chain[(1,)](x, out, LENGTH=250, N=32)
    for k in range(250):
        x = x * 3 + k
        x = x ^ (x >> 7)
    assert torch.equal(out, x)


@triton.jit
def exp(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.exp(tl.load(x_ptr + offsets)))


def test_a_kernel_may_be_called_like_a_function_of_libm(rng):
    x = torch.randn(32, generator=rng, dtype=torch.float64)
    out = torch.zeros_like(x)
    exp[(1,)](x, out, N=32)
    torch.testing.assert_close(out, x.exp(), rtol=1e-15, atol=0)


@triton.jit
def _classify(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    kinds = (
        libdevice.isnan(x).to(tl.int32) + 2 * libdevice.isinf(x).to(tl.int32) + 4 * libdevice.finitef(x).to(tl.int32)
    )
    tl.store(out_ptr + offsets, kinds)


def test_floats_are_classified():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -3.0e38, 1e-45, 1.0, -1.0])
    out = torch.zeros(8, dtype=torch.int32)
    _classify[(1,)](x, out, N=8)
    assert out.tolist() == [1, 2, 2, 4, 4, 4, 4, 4]


@triton.jit
def _cancelling(x_ptr, out_ptr, value_ptr, start, N: tl.constexpr):
    index = tl.arange(0, N)
    row = (index + start).to(tl.int64) - (index + 1).to(tl.int64)
    tl.store(out_ptr + index, tl.load(x_ptr + row * 4 + index))
    tl.store(value_ptr + index, row * 3)


@pytest.mark.parametrize("start", [1, 11, 100])
def test_widened_indices_may_cancel(start):
    x, out, value = torch.arange(1000.0), torch.zeros(64), torch.zeros(64, dtype=torch.int64)
    _cancelling[(1,)](x, out, value, start, N=64)
    assert torch.equal(out, x[4 * (start - 1) :][:64])
    assert (value == 3 * (start - 1)).all()


@triton.jit
def _fused(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 2.0**-133), (torch.float16, 2.0**-24)], ids=str)
def test_fused_products_and_sums_of_half_precision_are_rounded_once(dtype, least):
    eps = EPS[dtype]
    # The product is half-way between two numbers, and what is added decides.
    z = torch.tensor([least, -least, 0.0, float("inf")], dtype=dtype)
    out = torch.zeros(4, dtype=dtype)
    _fused[(1,)](torch.full((4,), 1.5, dtype=dtype), torch.full((4,), 1 + eps, dtype=dtype), z, out, N=4)
    assert out.tolist() == [1.5 + 2 * eps, 1.5 + eps, 1.5 + 2 * eps, float("inf")]
