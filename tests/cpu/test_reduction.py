"""Reductions and scans with any combine function, and functions mapped over elements, against numpy in float64."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _farther(a, b):
    """The number farther from zero; the larger of two equally far."""
    if tl.abs(a) > tl.abs(b):
        return a
    if tl.abs(a) < tl.abs(b):
        return b
    return tl.maximum(a, b)


@triton.jit
def _farther_by_condition(a, b):
    result = a
    if tl.abs(a) == tl.abs(b):
        result = tl.maximum(a, b)
    else:
        if tl.abs(b) > tl.abs(a):
            result = b
    return result


@triton.jit(noinline=True)
def _plus(a, b):
    return a + b


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _fold(x, AXIS: tl.constexpr, OP: tl.constexpr, KEEP: tl.constexpr):
    if OP == "farther":
        y = tl.reduce(x, AXIS, _farther, keep_dims=KEEP)
    elif OP == "farther_by_condition":
        y = tl.reduce(x, AXIS, _farther_by_condition, keep_dims=KEEP)
    elif OP == "plus":
        y = tl.reduce(x, AXIS, _plus, keep_dims=KEEP)
    elif OP == "any":
        y = tl.reduce(x > 3, AXIS, _either, keep_dims=KEEP).to(x.dtype)
    elif OP == "sum":
        y = tl.sum(x, AXIS, keep_dims=KEEP)
    elif OP == "max":
        y = tl.max(x, AXIS, keep_dims=KEEP)
    elif OP == "argmin":
        y = tl.argmin(x, AXIS, keep_dims=KEEP).to(x.dtype)
    return y


@triton.jit
def _reduce_4d(
    x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, AXIS: tl.constexpr,
    OP: tl.constexpr, SIZE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    x = tl.reshape(tl.load(x_ptr + tl.arange(0, A * B * C * D)), (A, B, C, D))
    y = _fold(x, AXIS, OP, KEEP)
    tl.store(out_ptr + tl.arange(0, SIZE), tl.reshape(y, (SIZE,)))


def _farther_of(x, axis):
    farthest = np.abs(x).max(axis, keepdims=True)
    return np.where(np.abs(x) == farthest, x, -np.inf).max(axis)


EXPECTED = {
    "farther": _farther_of,
    "farther_by_condition": _farther_of,
    "plus": np.sum,
    "any": lambda x, axis: (x > 3).any(axis),
    "sum": np.sum,
    "max": np.max,
    "argmin": np.argmin,
}


@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=4, max_size=4),
    st.sampled_from([1, 32]),
    st.integers(0, 3),
    st.sampled_from(sorted(EXPECTED)),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.int32, torch.int64]),
)
@settings(max_examples=25, deadline=None)
def test_any_axis_of_a_tile_of_rank_four_is_reduced_by_any_function(shape, factor, axis, op, keep, dtype):
    shape[axis] *= factor
    x = torch.randint(-9, 10, tuple(shape)).to(dtype)
    expected = EXPECTED[op](x.double().numpy(), axis=axis).reshape(-1)
    out = torch.full((expected.size,), -99, dtype=dtype)
    _reduce_4d[(1,)](x, out, *shape, AXIS=axis, OP=op, SIZE=expected.size, KEEP=keep)
    assert np.array_equal(out.double().numpy(), expected)


@triton.jit
def _reduce_all(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr, _fold(x, None, OP, False))
    tl.store(out_ptr + 1 + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], _fold(x, None, OP, True))


@pytest.mark.parametrize("shape", [(1, 1), (4, 64), (16, 1)])
@pytest.mark.parametrize("op", ["farther", "sum"])
def test_without_an_axis_all_elements_are_reduced_to_one(op, shape):
    x = torch.randint(-9, 10, shape).float()
    out = torch.full((2,), float("nan"))
    _reduce_all[(1,)](x, out, *shape, OP=op)
    assert out.tolist() == [EXPECTED[op](x.numpy().reshape(-1), axis=0)] * 2


@triton.jit
def _reduce_masked(
    x_ptr, along_ptr, all_ptr, kept_ptr, m, n, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, OP: tl.constexpr,
    ALL: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r, c = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    if COLUMNS:
        at = r + c * m
    else:
        at = r * n + c
    mask = (r < m) & (c < n)
    x = tl.load(x_ptr + at, mask=mask, other=-1)
    tl.store(along_ptr + tl.arange(0, SIZE), _fold(x, AXIS, OP, False))
    tl.store(all_ptr, _fold(tl.load(x_ptr + at, mask=mask, other=-1) * 2, None, ALL, False))
    tl.store(kept_ptr + at, tl.cumsum(x, AXIS), mask=mask)


@given(
    st.sampled_from([(1, 16), (4, 256), (32, 8), (8, 8), (64, 64), (2, 1024)]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0, 1]),
    st.sampled_from(["farther", "sum", "max", "argmin"]),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_masked_tiles_of_rows_or_columns_are_reduced_with_what_stands_for_the_rest(shape, a, b, axis, op, columns):
    m, n = int(a * shape[0]), int(b * shape[1])
    x = torch.randint(-9, 10, (m, n), dtype=torch.int32)
    source = x.T.contiguous() if columns else x.contiguous()
    padded = np.full(shape, -1)
    padded[:m, :n] = x
    expected = EXPECTED[op](padded, axis=axis)
    along, total = torch.full(expected.shape, -99, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kept = torch.full_like(source, -99)
    of_all = "sum" if op == "argmin" else op  # which Triton has along an axis only
    _reduce_masked[(1,)](
        source, along, total, kept, m, n, *shape, AXIS=axis, OP=op, ALL=of_all, SIZE=expected.size, COLUMNS=columns
    )
    assert np.array_equal(along.numpy(), expected)
    assert total.item() == EXPECTED[of_all](2 * padded.reshape(-1), axis=0)
    assert torch.equal(kept.T if columns else kept, x.cumsum(axis, dtype=torch.int32))


@triton.jit
def _welford(mean_a, m2_a, count_a, mean_b, m2_b, count_b):
    count = count_a + count_b
    if count == 0:
        return mean_a, m2_a, count
    delta = mean_b - mean_a
    share = count_b / count
    return mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share, count


@triton.jit
def _variance(x_ptr, mean_ptr, var_ptr, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, BLOCK)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    x = tl.load(x_ptr + rows * n + at, mask=(at < n) & (rows >= 0), other=0.0)
    count = tl.where((at < n) & (rows >= 0), 1.0, 0.0)
    if AXIS == 0:
        x, count = tl.trans(x), tl.trans(count)
    mean, m2, total = tl.reduce((x, tl.zeros_like(x), count), AXIS, _welford)
    tl.store(mean_ptr + tl.arange(0, ROWS), mean)
    tl.store(var_ptr + tl.arange(0, ROWS), m2 / total)


@pytest.mark.parametrize(("n", "axis"), [(1, 1), (37, 0), (37, 1), (64, 1)])
def test_mean_and_variance_by_welfords_method_in_one_reduction_of_three_tiles(n, axis):
    x = torch.randn(4, n) * 3 + 100
    mean, var = torch.full((4,), float("nan")), torch.full((4,), float("nan"))
    _variance[(1,)](x, mean, var, n, BLOCK=64, ROWS=4, AXIS=axis)
    d = x.double()
    # The mean carries some roundings of its own size (100), and so does each deviation (3) from it.
    assert (mean - d.mean(1)).abs().max() <= 20 * 100 * 2.0**-24
    assert (var - d.var(1, correction=0)).abs().max() <= 20 * 20 * 2.0**-24 + 2 * 100 * 3 * 2.0**-24


@triton.jit
def _recur(decay_a, value_a, decay_b, value_b):
    return decay_a * decay_b, decay_b * value_a + value_b


@triton.jit
def _keep_first(a, b):
    if a != 0:
        return a
    return b


@triton.jit
def _scan_4d(
    x_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, AXIS: tl.constexpr,
    OP: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, A * B * C * D)
    x = tl.reshape(tl.load(x_ptr + at), (A, B, C, D))
    if OP == "cumsum":
        y = tl.cumsum(x, AXIS, reverse=REVERSE)
    elif OP == "cumprod":
        y = tl.cumprod(x, AXIS, reverse=REVERSE)
    elif OP == "keep_first":
        y = tl.associative_scan(x, AXIS, _keep_first, reverse=REVERSE)
    elif OP == "recur":
        _, y = tl.associative_scan((x * 0 + 2, x), AXIS, _recur, reverse=REVERSE)
    tl.store(out_ptr + at, tl.reshape(y, (A * B * C * D,)))


STEPS = {
    "cumsum": lambda total, x: total + x,
    "cumprod": lambda total, x: total * x,
    "keep_first": lambda total, x: np.where(total != 0, total, x),
    "recur": lambda total, x: 2 * total + x,
}


def _scanned(x, axis, step, reverse):
    """An inclusive scan, one slice after the other."""
    slices = np.moveaxis(x[...], axis, 0)
    slices = slices[::-1] if reverse else slices
    out = [slices[0]]
    for each in slices[1:]:
        out.append(step(out[-1], each))
    return np.moveaxis(np.stack(out[::-1] if reverse else out), 0, axis)


@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=4, max_size=4),
    st.sampled_from([1, 16]),
    st.integers(0, 3),
    st.sampled_from(sorted(STEPS)),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
)
@settings(max_examples=25, deadline=None)
def test_any_axis_is_scanned_in_order_by_any_function_in_either_direction(shape, factor, axis, op, reverse, dtype):
    shape[axis] *= factor
    # The functions that are not commutative show the order; integers wrap, so that the expected values are exact.
    x = torch.randint(0, 4, tuple(shape)).to(dtype)
    if dtype in (torch.int16, torch.uint8) and op == "cumprod":
        x %= 2  # Triton multiplies narrow integers in their own type, numpy in 64 bits
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(_scanned(x.numpy().astype(np.int64), axis, STEPS[op], reverse)).to(dtype)
    out = torch.full_like(x, 99)
    _scan_4d[(1,)](x, out, *shape, AXIS=axis, OP=op, REVERSE=reverse)
    assert torch.equal(out, expected)


@triton.jit
def _collatz(n):
    """Steps that `n` takes to 1, and the largest number on the way."""
    steps = 0
    largest = n
    while n > 1:
        if n % 2 == 0:
            n = n // 2
        else:
            n = 3 * n + 1
        largest = tl.maximum(largest, n)
        steps += 1
    return steps, largest


@triton.jit
def _branching(x, positive):
    if positive:
        return x * 2
    return x - 1


@triton.jit
def _fetch(pointer, wanted):
    if wanted:
        return tl.load(pointer)
    return -1.0


@triton.jit
def _mapped(n_ptr, x_ptr, steps_ptr, largest_ptr, out_ptr, fetched_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    steps, largest = tl.map_elementwise(_collatz, tl.load(n_ptr + at))
    tl.store(steps_ptr + at, steps)
    tl.store(largest_ptr + at, largest)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.map_elementwise(_branching, x, x > 0))
    # Every other address is not there at all.
    there = at % 2 == 0
    tl.store(fetched_ptr + at, tl.map_elementwise(_fetch, x_ptr + tl.where(there, at, at.to(tl.int64) << 40), there))


@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_function_with_loops_returns_and_loads_is_mapped_over_elements(size):
    n, x = torch.arange(1, size + 1, dtype=torch.int32), torch.randn(size)
    steps, largest = (torch.full((size,), -1, dtype=torch.int32) for _ in range(2))
    out, fetched = torch.full((size,), float("nan")), torch.full((size,), float("nan"))
    _mapped[(1,)](n, x, steps, largest, out, fetched, SIZE=size)
    for k in range(size):
        path = [k + 1]
        while path[-1] > 1:
            path.append(path[-1] // 2 if path[-1] % 2 == 0 else 3 * path[-1] + 1)
        assert (int(steps[k]), int(largest[k])) == (len(path) - 1, max(path))
    assert torch.equal(out, torch.where(x > 0, x * 2, x - 1))
    assert torch.equal(fetched, torch.where(torch.arange(size) % 2 == 0, x, torch.tensor(-1.0)))


@triton.jit
def _exchange(a, b, c, d):
    return b + c, a + d


@triton.jit
def _mapped_in_pairs(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    (out,) = tl.map_elementwise(_exchange, tl.load(x_ptr + at), tl.load(y_ptr + at), pack=2)
    tl.store(out_ptr + at, out)


def test_a_mapped_function_may_take_neighbours_together():
    x, y, out = torch.randn(32), torch.randn(32), torch.full((32,), float("nan"))
    _mapped_in_pairs[(1,)](x, y, out, SIZE=32)
    exchanged = x.reshape(16, 2).flip(1).reshape(32)
    assert torch.equal(out, exchanged + y)


@triton.jit
def _sums_before_and_after(x_ptr, out_ptr, DOUBLINGS: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    before = tl.sum(x)
    for _ in tl.static_range(DOUBLINGS):
        x = x + x  # twice the same operand: as many paths as there are numbers of so many bits
    after = tl.sum(x)
    tl.store(out_ptr, before)
    tl.store(out_ptr + 1, after)


@pytest.mark.parametrize("doublings", [1, 31, 40])
def test_a_tile_is_doubled_again_and_again_between_two_sums(doublings):
    x, out = torch.arange(64, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    _sums_before_and_after[(1,)](x, out, DOUBLINGS=doublings, N=64)
    assert out.tolist() == [2016.0, 2016.0 * 2**doublings]
