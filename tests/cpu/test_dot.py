"""Products of tiles against float64 and int64: every type, any extents, transposed operands, accumulators."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

SHOWN = {
    "as it is": lambda x: x,
    "turned": lambda x: x.T,
    "doubled": lambda x: 2 * x,
    "doubled and turned": lambda x: 2 * x.T,
}


@triton.jit
def _product(
    a_ptr, b_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TURN_A: tl.constexpr, TURN_B: tl.constexpr, ADD: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if TURN_A:
        a = tl.trans(tl.load(a_ptr + k[:, None] * M + m[None, :]))
    else:
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    if TURN_B:
        b = tl.trans(tl.load(b_ptr + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    place = m[:, None] * N + n[None, :]
    if ADD:
        c = tl.load(c_ptr + place)
        product = tl.dot(a, b, c, input_precision=PRECISION, out_dtype=OUT)
    else:
        product = tl.dot(a, b, input_precision=PRECISION, out_dtype=OUT)
    tl.store(out_ptr + place, product)


EXTENTS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
# Operands, result.
TYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
    (torch.int8, torch.int32),
]
TRITON = {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64, torch.int32: tl.int32}


def _drawn(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=dtype)


def _exact(x):
    return x.double() if x.dtype.is_floating_point else x.long()


def _check(result, a, b, c):
    """Integers exactly; floats within K roundings of the sum of magnitudes, and one of the result."""
    expected = _exact(a) @ _exact(b) + _exact(c)
    if not result.dtype.is_floating_point:
        assert torch.equal(result.long(), expected)
        return
    work = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32).eps / 2
    magnitudes = _exact(a).abs() @ _exact(b).abs() + _exact(c).abs()
    bound = magnitudes * (a.shape[-1] + 2) * work + expected.abs() * torch.finfo(result.dtype).eps / 2
    assert ((result.double() - expected).abs() <= bound + torch.finfo(result.dtype).tiny).all()


@pytest.mark.parametrize("types", TYPES, ids=str)
@given(
    m=EXTENTS, n=EXTENTS, k=EXTENTS, turned=st.tuples(st.booleans(), st.booleans()), add=st.booleans(),
    precision=st.sampled_from(["ieee", "tf32", "tf32x3"]), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_a_product_is_within_the_roundings_of_its_sum(types, m, n, k, turned, add, precision, seed):
    operand, result = types
    a, b = _drawn((m, k), operand, seed), _drawn((k, n), operand, seed + 1)
    c = _drawn((m, n), result, seed + 2) if add else torch.zeros((m, n), dtype=result)
    if result == torch.int32:
        c //= 2  # no sum overflows
    out = torch.full_like(c, 77)
    inputs = [a.T.contiguous() if turned[0] else a, b.T.contiguous() if turned[1] else b, c]
    copies = [x.clone() for x in inputs]
    _product[(1,)](*inputs, out, m, n, k, *turned, add, TRITON[result], precision)
    _check(out, a, b, c)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("right", FP8, ids=str)
@pytest.mark.parametrize("left", FP8, ids=str)
@given(m=EXTENTS, n=EXTENTS, k=EXTENTS, turned=st.booleans(), seed=st.integers(0, 2**32))
@settings(max_examples=3, deadline=None)
def test_8_bit_floats_of_either_kind_are_multiplied_exactly(left, right, m, n, k, turned, seed):
    a, b = _drawn((m, k), left, seed), _drawn((k, n), right, seed + 1)
    out, zero = torch.full((m, n), float("nan")), torch.zeros(m, n)
    _product[(1,)](a, b.T.contiguous() if turned else b, zero, out, m, n, k, False, turned, True, tl.float32, "ieee")
    _check(out, a, b, zero)


@pytest.mark.parametrize("n", [4, 16, 64])
def test_integer_products_wrap_in_32_bits(n):
    a, b = torch.full((2, 16), -128, dtype=torch.int8), torch.full((16, n), -128, dtype=torch.int8)
    c, out = torch.full((2, n), 2**31 - 1, dtype=torch.int32), torch.zeros((2, n), dtype=torch.int32)
    _product[(1,)](a, b, c, out, 2, n, 16, False, False, True, tl.int32, "ieee")
    assert (out == 2**31 - 1 + 16 * 2**14 - 2**32).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_infinite_and_largest_elements_and_those_that_are_no_numbers(dtype):
    a, b = _drawn((16, 32), dtype, 1), _drawn((32, 32), dtype, 2)
    largest = torch.finfo(dtype).max
    a[1, 4], a[2, 7], a[3, 31], b[5, 6], b[8, 9] = float("inf"), -float("inf"), float("nan"), float("inf"), float("nan")
    a[4, 10] = a[5, 11] = b[10, 12] = largest
    a[6], b[:, 13] = 0, 2.0**-7
    out = torch.full((16, 32), 77.0)
    _product[(1,)](a, b, out, out, 16, 32, 32, False, False, False, tl.float32, "ieee")
    expected = a.double() @ b.double()
    beyond = expected.abs() > torch.finfo(torch.float32).max
    expected[beyond] = expected[beyond].sign() * float("inf")
    bound = 34 * 2.0**-24 * (a.double().abs() @ b.double().abs())
    finite = expected.isfinite()
    assert finite.any()
    assert ((out.double() - expected).abs() <= bound)[finite].all()
    assert torch.equal(out[~finite].nan_to_num(7.0), expected[~finite].float().nan_to_num(7.0))


@pytest.mark.parametrize("shape", [(128, 8, 8), (16, 128, 8), (8, 64, 256)], ids=str)
def test_tiles_larger_than_any_block_of_registers(shape):
    m, n, k = shape
    a, b = _drawn((m, k), torch.float32, 1), _drawn((k, n), torch.float32, 2)
    out = torch.full((m, n), float("nan"))
    _product[(1,)](a, b, out, out, m, n, k, False, False, False, tl.float32, "ieee")
    _check(out, a, b, torch.zeros(m, n))


@triton.jit
def _batched(a_ptr, b_ptr, out_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, m, n, k = tl.arange(0, B)[:, None, None], tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i * M * K + m[None, :, None] * K + k[None, None, :])
    b = tl.trans(tl.load(b_ptr + i * K * N + n[None, :, None] * K + k[None, None, :]), 0, 2, 1)
    tl.store(out_ptr + i * M * N + m[None, :, None] * N + n[None, None, :], tl.dot(a, b, out_dtype=tl.float32))


@given(b=st.sampled_from([1, 2, 4]), m=EXTENTS, n=EXTENTS, k=EXTENTS)
@settings(max_examples=6, deadline=None)
def test_batches_of_products_with_transposed_right_operands(b, m, n, k):
    x, y = _drawn((b, m, k), torch.float16, b), _drawn((b, n, k), torch.float16, b + 1)
    out = torch.full((b, m, n), float("nan"))
    _batched[(1,)](x, y, out, b, m, n, k)
    _check(out, x, y.mT, torch.zeros(b, m, n))


@triton.jit
def _operands_with_other_uses(a_ptr, b_ptr, out_ptr, sums_ptr, N: tl.constexpr, TURN: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    product = tl.dot(a, tl.trans(b) if TURN else b)
    product = tl.dot(product, b, product)
    tl.store(out_ptr + i * N + j, product + a)
    tl.store(sums_ptr + tl.arange(0, N), tl.sum(b, 1) + tl.sum(tl.reshape(b * 2, (N, N)), 0))


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("n", [4, 32, 64])
def test_operands_of_products_have_other_uses(n, turn):
    a, b = _drawn((n, n), torch.float32, 1), _drawn((n, n), torch.float32, 2)
    out, sums = torch.full((n, n), float("nan")), torch.full((n,), float("nan"))
    _operands_with_other_uses[(1,)](a, b, out, sums, n, turn)
    x, y = a.double(), b.double()
    product = x @ (y.T if turn else y)
    torch.testing.assert_close(out.double(), product @ y + product + x, rtol=1e-5, atol=n * n * 1e-6)
    torch.testing.assert_close(sums.double(), y.sum(1) + 2 * y.sum(0), rtol=1e-5, atol=n * 1e-5)


@triton.jit
def _shown(x, HOW: tl.constexpr):
    if HOW == "turned":
        return tl.trans(x)
    if HOW == "doubled":
        return x * 2
    if HOW == "doubled and turned":
        return tl.trans(x * 2)
    return x


@triton.jit
def _related_operands(
    x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, N: tl.constexpr
):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * R + j * C)
    tl.store(out_ptr + i * N + j, tl.dot(_shown(x, LEFT), _shown(x, RIGHT)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", SHOWN)
@pytest.mark.parametrize("left", SHOWN)
def test_both_operands_are_made_of_one_tile(left, right, dtype):
    x = (torch.arange(32 * 32) * 7 % 19 - 9).reshape(32, 32).to(dtype)  # whole numbers: every sum is exact
    for rows, columns, tile in ((32, 1, x), (1, 32, x.T)):
        out = torch.zeros(32, 32)
        _related_operands[(1,)](x, out, rows, columns, left, right, N=32)
        assert torch.equal(out.double(), SHOWN[left](tile.double()) @ SHOWN[right](tile.double()))


@triton.jit
def _rescaled(
    a_ptr, b_ptr, s_ptr, out_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WAY: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    acc = tl.full((M, N), 1.0, tl.float32)
    before = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + step * M * K + m[:, None] * K + k[None, :])
        scale = tl.load(s_ptr + step * M + m)
        if WAY == "plain":
            acc = tl.dot(a, b, acc)
        elif WAY == "scaled":
            acc = tl.dot(a, b, acc * scale[:, None])
        elif WAY == "both":
            before = acc
            acc = tl.dot(a, b, acc)
        elif WAY == "twice":
            acc = tl.dot(a, b, acc)
            acc = tl.dot(a, b, acc * scale[:, None])
        elif WAY == "square":
            acc = tl.dot(acc, b, acc)
        elif WAY == "after":
            acc = tl.dot(a, b, acc) + acc
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc + before)


@pytest.mark.parametrize("way", ["plain", "scaled", "both", "twice", "square", "after"])
def test_accumulators_are_carried_around_loops(way):
    m, n, k, steps = 16, 32, 32 if way == "square" else 8, 3
    a, s = _drawn((steps, m, k), torch.float32, 1), _drawn((steps, m), torch.float32, 3)
    b = _drawn((k, n), torch.float32, 2) / 4
    out = torch.full((m, n), float("nan"))
    _rescaled[(1,)](a, b, s, out, steps, m, n, k, way)
    acc, before, y = torch.ones(m, n, dtype=torch.float64), torch.zeros(m, n, dtype=torch.float64), b.double()
    for x, scale in zip(a.double(), s.double()[:, :, None], strict=True):
        match way:
            case "plain":
                acc = acc + x @ y
            case "scaled":
                acc = acc * scale + x @ y
            case "both":
                before, acc = acc, acc + x @ y
            case "twice":
                acc = (acc + x @ y) * scale + x @ y
            case "square":
                acc = acc + acc @ y
            case "after":
                acc = acc + x @ y + acc
    torch.testing.assert_close(out.double(), acc + before, rtol=1e-5, atol=1e-4)


@triton.jit
def _scaled(
    a_ptr, sa_ptr, b_ptr, sb_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, GROUP: tl.constexpr,
    AM: tl.constexpr, AK: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, s = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // GROUP)
    a = tl.load(a_ptr + tl.arange(0, AM)[:, None] * AK + tl.arange(0, AK)[None, :])
    b = tl.load(b_ptr + tl.arange(0, BK)[:, None] * BN + tl.arange(0, BN)[None, :])
    place = m[:, None] * N + n[None, :]
    c = tl.load(c_ptr + place)
    sa = tl.load(sa_ptr + m[:, None] * (K // GROUP) + s[None, :]) if SCALE_A else None
    sb = tl.load(sb_ptr + n[:, None] * (K // GROUP) + s[None, :]) if SCALE_B else None
    out = tl.dot_scaled(a, sa, A, b, sb, B, c, lhs_k_pack=AK != K or A != "e2m1", rhs_k_pack=BK != K or B != "e2m1")
    tl.store(out_ptr + place, out)


# The sixteen values of E2M1, from the specification's table.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
ELEMENTS = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _drawn_in_format(shape, format, axis, seed):
    """Elements as they lie in memory, packed along `axis` where two share a byte, and their values."""
    if format != "e2m1":
        x = _drawn(shape, ELEMENTS[format], seed)
        return x, x.double()
    codes = torch.randint(16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    first, second = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return first | second << 4, E2M1[codes.int()]


@given(
    m=st.sampled_from([1, 2, 16, 32]), n=st.sampled_from([2, 8, 32]), k=st.sampled_from([32, 64, 128]),
    formats=st.tuples(*[st.sampled_from(["e2m1", *ELEMENTS])] * 2), packed_along_k=st.tuples(*[st.booleans()] * 2),
    scaled=st.tuples(*[st.booleans()] * 2), e4m3_scales=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_microscaled_products(m, n, k, formats, packed_along_k, scaled, e4m3_scales, seed):
    if m == 1 and not packed_along_k[0]:
        m = 2  # two rows share a byte
    a, x = _drawn_in_format((m, k), formats[0], 1 if packed_along_k[0] else 0, seed)
    b, y = _drawn_in_format((k, n), formats[1], 0 if packed_along_k[1] else 1, seed + 1)
    group = 16 if e4m3_scales else 32
    generator = torch.Generator().manual_seed(seed)
    scales = []
    for rows in (m, n):
        if e4m3_scales:
            scale = torch.rand((rows, k // group), generator=generator).to(torch.float8_e4m3fn)
            scales.append((scale, scale.double()))
        else:
            code = torch.randint(117, 138, (rows, k // group), generator=generator, dtype=torch.uint8)
            scales.append((code, 2.0 ** (code.double() - 127)))
    c = _drawn((m, n), torch.float32, seed + 2)
    out = torch.full((m, n), float("nan"))
    _scaled[(1,)](a, scales[0][0], b, scales[1][0], c, out, m, n, k, *formats, *scaled, group, *a.shape, *b.shape)
    if scaled[0]:
        x = x * scales[0][1].repeat_interleave(group, 1)
    if scaled[1]:
        y = y * scales[1][1].T.repeat_interleave(group, 0)
    _check(out, x, y, c)


def test_the_ends_of_the_range_of_scales():
    codes = torch.tensor([[0], [1], [127], [254], [255]], dtype=torch.uint8).repeat(4, 1)[:16]
    a, b = torch.ones(16, 32, dtype=torch.bfloat16), torch.ones(32, 8, dtype=torch.bfloat16) / 32
    c, out = torch.zeros(16, 8), torch.full((16, 8), 77.0)
    _scaled[(1,)](a, codes, b, codes, c, out, 16, 8, 32, "bf16", "bf16", True, False, 32, 16, 32, 32, 8)
    powers = torch.tensor([2.0**-127, 2.0**-126, 1.0, 2.0**127, float("nan")]).repeat(4)[:16]
    torch.testing.assert_close(out, powers[:, None].expand(16, 8), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _wrapped_matmul(
    a_ptr, b_ptr, c_ptr, m, n, k, a0, a1, b0, b1, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    a_tile = a_ptr + (rows % m)[:, None] * a0 + inner[None, :] * a1
    b_tile = b_ptr + inner[:, None] * b0 + (cols % n)[None, :] * b1
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(tl.cdiv(k, BK)):
        a = tl.load(a_tile, mask=inner[None, :] < k - start * BK, other=0.0)
        b = tl.load(b_tile, mask=inner[:, None] < k - start * BK, other=0.0)
        acc = tl.dot(a, b, acc)
        a_tile += BK * a1
        b_tile += BK * b0
    tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc, mask=(rows[:, None] < m) & (cols[None, :] < n))


@given(
    m=st.integers(1, 150), n=st.integers(1, 150), k=st.integers(1, 150),
    blocks=st.sampled_from([(32, 32, 32), (64, 64, 64), (16, 128, 64)]), turned=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_a_matmul_whose_indices_wrap_around_at_the_edges(m, n, k, blocks, turned):
    a, b = _drawn((m, k), torch.float32, m), _drawn((k, n), torch.float32, n)
    x, y = a.T.contiguous().T if turned[0] else a, b.T.contiguous().T if turned[1] else b
    out = torch.full((m, n), float("nan"))
    grid = (triton.cdiv(m, blocks[0]), triton.cdiv(n, blocks[1]))
    _wrapped_matmul[grid](x, y, out, m, n, k, *x.stride(), *y.stride(), *blocks)
    _check(out, a, b, torch.zeros(m, n))


@triton.jit
def _remainders(x_ptr, out_ptr, start, divisor, SIZE: tl.constexpr):
    wrapped = (start + tl.arange(0, SIZE)) % divisor
    for step in range(2):
        x = tl.load(x_ptr + (wrapped + step).to(tl.int64))
        tl.store(out_ptr + step * SIZE + tl.arange(0, SIZE), x)


@given(start=st.integers(-100, 100), divisor=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_elements_at_remainders_of_indices(start, divisor):
    x, out = torch.arange(202.0), torch.full((2, 64), float("nan"))
    _remainders[(1,)](x[100:], out, start, divisor, 64)
    remainders = torch.fmod(start + torch.arange(64), divisor)
    assert torch.equal(out, x[100 + remainders + torch.arange(2)[:, None]])
