"""Reductions that share a loop, and carried tiles that are updated in place, against numpy with integers."""

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed))


@triton.jit
def _statistics(x_ptr, y_ptr, out_ptr, m, n, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, M)[:, None] * n + tl.arange(0, N)[None, :]
    mask = (tl.arange(0, M)[:, None] < m) & (tl.arange(0, N)[None, :] < n)
    x = tl.load(x_ptr + at, mask=mask, other=0)
    y = tl.load(y_ptr + at, mask=mask, other=0)
    total = tl.sum(x, AXIS)
    squares = tl.sum(x * x, AXIS)  # with the first
    largest = tl.max(x - y, AXIS)  # with the first, by another function
    scaled = total * 3
    deviation = tl.sum(tl.abs(x * 2 - tl.expand_dims(scaled, AXIS)), AXIS)  # needs the first
    both = tl.sum(y * tl.expand_dims(largest, AXIS), AXIS)  # needs the third
    where = tl.arange(0, N if AXIS == 0 else M)
    for_each = out_ptr + where
    count = N if AXIS == 0 else M
    tl.store(for_each, total)
    tl.store(for_each + count, squares)
    tl.store(for_each + 2 * count, largest)
    tl.store(for_each + 3 * count, deviation)
    tl.store(for_each + 4 * count, both)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 16), n=st.integers(1, 128), axis=st.sampled_from([0, 1]), seed=st.integers(0, 99),
    block=st.sampled_from([(16, 128), (16, 1024)]),
)  # fmt: skip
def test_reductions_of_one_shape_give_what_each_gives_alone(m, n, axis, seed, block):
    x, y = _draw(seed, m, n), _draw(seed + 1000, m, n)
    count = block[1 - axis]
    out = torch.full((5, count), -999)
    _statistics[(1,)](x, y, out, m, n, M=block[0], N=block[1], AXIS=axis)
    a, b = np.zeros(block, np.int64), np.zeros(block, np.int64)
    a[:m, :n], b[:m, :n] = x.numpy(), y.numpy()
    total, largest = a.sum(axis), (a - b).max(axis)
    deviation = np.abs(a * 2 - np.expand_dims(total * 3, axis)).sum(axis)
    both = (b * np.expand_dims(largest, axis)).sum(axis)
    np.testing.assert_array_equal(out.numpy(), [total, (a * a).sum(axis), largest, deviation, both])


@triton.jit
def _many(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    a, b, c = tl.sum(x, 0), tl.sum(x * x, 0), tl.sum(x * 3, 0)
    d, e, f = tl.max(x, 0), tl.min(x, 0), tl.sum(x - 1, 0)
    g, h, i = tl.xor_sum(x, 0), tl.max(-x, 0), tl.sum(x + x, 0)
    tl.store(out_ptr, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, c)
    tl.store(out_ptr + 3, d)
    tl.store(out_ptr + 4, e)
    tl.store(out_ptr + 5, f)
    tl.store(out_ptr + 6, g)
    tl.store(out_ptr + 7, h)
    tl.store(out_ptr + 8, i)


def test_more_reductions_than_share_one_loop():
    x, out = _draw(3, 256), torch.zeros(9, dtype=torch.int64)
    _many[(1,)](x, out, N=256)
    v = x.numpy()
    expected = [v.sum(), (v * v).sum(), 3 * v.sum(), v.max(), v.min(), (v - 1).sum(), np.bitwise_xor.reduce(v)]
    np.testing.assert_array_equal(out.numpy(), [*expected, -v.min(), 2 * v.sum()])


@triton.jit
def _sums_around_a_store(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    before = tl.sum(tl.load(x_ptr + i), 0)
    tl.store(x_ptr + i, i)
    after = tl.sum(tl.load(x_ptr + i), 0)
    tl.store(out_ptr, before)
    tl.store(out_ptr + 1, after)


def test_a_store_comes_between_the_reductions_on_either_side_of_it():
    x, out = torch.full((64,), 5), torch.zeros(2, dtype=torch.int64)
    _sums_around_a_store[(1,)](x, out, N=64)
    assert out.tolist() == [5 * 64, 64 * 63 // 2]


@triton.jit
def _loops(x_ptr, out_ptr, steps, N: tl.constexpr, WAY: tl.constexpr):
    r, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + r * N + c)
    a, b = x, x + 1
    line = tl.sum(x, 1)
    for step in range(steps):
        if WAY == "fibonacci":
            a, b = b, (a + b) & 0xFFFF
        elif WAY == "apart":  # one grows of its own, the other of what the first was
            a, b = (a * 3 + step) & 0xFFFF, (b + a) & 0xFFFF
        elif WAY == "turned":  # read in another place than it is written
            a, b = (tl.trans(a) + b) & 0xFFFF, b ^ a
        elif WAY == "spread":  # a line is read along all rows of another tile
            a = (a + line[:, None]) & 0xFFFF
            line = (line + step) & 0xFF
        elif WAY == "reduced":  # read by an operation that comes before the end of the step
            total = tl.sum(a, 0)
            a = (a * 5 + b) & 0xFFFF
            b = (b + total[None, :]) & 0xFFFF
        elif WAY == "under a condition":
            if step % 2 == 0:
                b = (b + a) & 0xFFFF
            a = (a + 7) & 0xFFFF
        elif WAY == "chained":  # c of old b, b of new a
            a = (a + 1) & 0xFFFF
            b = (b * a) & 0xFFFF
    tl.store(out_ptr + r * N + c, a)
    tl.store(out_ptr + N * N + r * N + c, b + line[:, None])


def _expected(x: np.ndarray, steps: int, way: str) -> list[np.ndarray]:
    a, b, line = x, x + 1, x.sum(1)
    for step in range(steps):
        match way:
            case "fibonacci":
                a, b = b, a + b & 0xFFFF
            case "apart":
                a, b = a * 3 + step & 0xFFFF, b + a & 0xFFFF
            case "turned":
                a, b = a.T + b & 0xFFFF, b ^ a
            case "spread":
                a, line = a + line[:, None] & 0xFFFF, line + step & 0xFF
            case "reduced":
                a, b = a * 5 + b & 0xFFFF, b + a.sum(0)[None, :] & 0xFFFF
            case "under a condition":
                a, b = a + 7 & 0xFFFF, b + a & 0xFFFF if step % 2 == 0 else b
            case "chained":
                a = a + 1 & 0xFFFF
                b = b * a & 0xFFFF
    return [a, b + line[:, None]]


_WAYS = ["fibonacci", "apart", "turned", "spread", "reduced", "under a condition", "chained"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(way=st.sampled_from(_WAYS), steps=st.integers(0, 6), n=st.sampled_from([1, 4, 16, 64]), seed=st.integers(0, 99))
def test_carried_tiles_are_all_made_of_those_before_them(way, steps, n, seed):
    x = _draw(seed, n, n)
    out = torch.full((2, n, n), -999)
    _loops[(1,)](x, out, steps, N=n, WAY=way)
    np.testing.assert_array_equal(out.numpy(), _expected(x.numpy(), steps, way))


@triton.jit
def _normalise(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * n
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + i, mask=i < n, other=0)
    largest = tl.max(x, 0)
    tl.store(out_ptr + row + i, largest, mask=i < n)  # between two uses of what was loaded
    least = tl.min(tl.where(i < n, x, 99), 0)
    tl.store(out_ptr + row + i, (x - least) * largest, mask=i < n)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(1, 300), shift=st.sampled_from([None, -1, 0, 1, 40]), seed=st.integers(0, 99))
def test_what_was_loaded_is_what_it_was_whatever_is_stored_between_two_reductions(n, shift, seed):
    values = _draw(seed, n)
    memory = torch.zeros(n + 200, dtype=torch.int64)
    x = memory[100 : 100 + n]
    x.copy_(values)
    out = torch.zeros(n, dtype=torch.int64) if shift is None else memory[100 + shift : 100 + shift + n]
    _normalise[(1,)](x, out, n, BLOCK=512)
    assert torch.equal(out, (values - values.min()) * max(values.max(), torch.tensor(0 if n < 512 else -99)))
