"""Masks and overlaps: what a tile access may touch, and in which order, whatever way it is computed."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit(do_not_specialize=["m", "n", "source_stride", "target_stride", "step"])
def _windows(source_ptr, target_ptr, m, n, source_stride, target_stride, step, R: tl.constexpr, C: tl.constexpr):
    pid = tl.program_id(0)
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    mask = (r < m) & (c < n)
    x = tl.load(source_ptr + pid * step + r * source_stride + c, mask=mask)
    tl.store(target_ptr + pid * step + r * target_stride + c, x * 2 + 1, mask=mask)


@given(
    m=st.integers(1, 4),
    n=st.integers(1, 40),
    strides=st.tuples(st.integers(-50, 50), st.integers(0, 20)),
    offset=st.integers(-100, 100),
    step=st.integers(0, 60),
    upwards=st.booleans(),
    in_place=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_tile_is_read_before_it_is_written_however_its_rows_overlap(m, n, strides, offset, step, upwards, in_place):
    source_stride, target_stride = strides[0], (n + strides[1]) * (1 if upwards else -1)
    if in_place:
        source_stride, offset = target_stride, offset // 50
    memory = torch.arange(1000.0)
    expected = memory.numpy().copy()
    source, target = 450, 450 + offset
    for pid in range(3):
        rows = [source + pid * step + r * source_stride for r in range(m)]
        loaded = [expected[at : at + n].copy() for at in rows]
        for r, values in enumerate(loaded):
            at = target + pid * step + r * target_stride
            expected[at : at + n] = values * 2 + 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # programs in order
    try:
        _windows[(3,)](memory[source:], memory[target:], m, n, source_stride, target_stride, step, R=4, C=64)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(memory.numpy(), expected)


@given(m=st.integers(1, 4), n=st.integers(1, 40), stride=st.integers(0, 45))
@settings(max_examples=60, deadline=None)
def test_elements_that_rows_share_are_updated_once(m, n, stride):
    memory = torch.arange(300.0)
    expected = memory.clone()
    for r in range(m):
        expected[r * stride : r * stride + n] = 2 * torch.arange(300.0)[r * stride : r * stride + n] + 1
    _windows[(1,)](memory, memory, m, n, stride, stride, 0, R=4, C=64)
    assert torch.equal(memory, expected)


@triton.jit(do_not_specialize=["n"])
def _sum_and_difference(x_ptr, y_ptr, sum_ptr, difference_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x, y = tl.load(x_ptr + offsets, mask=mask), tl.load(y_ptr + offsets, mask=mask)
    total = x + y
    tl.store(sum_ptr + offsets, total, mask=mask)
    tl.store(difference_ptr + offsets, total - 2 * y, mask=mask)


@given(starts=st.lists(st.integers(0, 120), min_size=4, max_size=4), n=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_value_stored_twice_is_the_same_both_times_however_the_four_tensors_overlap(starts, n):
    memory = torch.arange(300.0) ** 2
    expected = memory.numpy().copy()
    x, y = (expected[at : at + n].copy() for at in starts[:2])
    for at, result in zip(starts[2:], (x + y, x - y), strict=True):
        expected[at : at + n] = result
    _sum_and_difference[(1,)](*(memory[at:] for at in starts), n, BLOCK=128)
    assert np.array_equal(memory.numpy(), expected)


@triton.jit(do_not_specialize=["m", "n", "stride"])
def _far_rows(x_ptr, y_ptr, m, n, stride, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    mask = (r < m) & (c < n)
    tl.store(y_ptr + r * stride + c, tl.load(x_ptr + r * stride + c, mask=mask) + 1, mask=mask)


@pytest.mark.parametrize("stride", [2**30, 2**40, 2**62, -(2**62)])
def test_strides_whose_multiples_wrap_do_not_hide_an_overlap(stride):
    memory = torch.arange(100.0)
    _far_rows[(1,)](memory, memory[3:], 1, 50, stride, R=8, C=64)
    assert torch.equal(memory, torch.cat([torch.arange(3.0), torch.arange(50.0) + 1, torch.arange(53.0, 100.0)]))


@triton.jit(do_not_specialize=["start", "bound"])
def _every_predicate(x_ptr, out_ptr, on_ptr, start, bound, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    index = lane + start
    for k in tl.static_range(16):
        limit = bound.to(tl.uint32) if k % 8 >= 6 else bound
        at = index.to(tl.uint32) if k % 8 >= 6 else index
        first, second = (limit, at) if k >= 8 else (at, limit)
        if k % 8 == 0 or k % 8 == 6:
            mask = first < second
        elif k % 8 == 1 or k % 8 == 7:
            mask = first <= second
        elif k % 8 == 2:
            mask = first > second
        elif k % 8 == 3:
            mask = first >= second
        elif k % 8 == 4:
            mask = first == second
        else:
            mask = (first < second) & (lane < 30) & (bound < 1000)
        x = tl.load(x_ptr + lane, mask=mask, other=-3.0)
        tl.store(out_ptr + k * BLOCK + lane, x * 2, mask=mask)
        tl.store(on_ptr + k * BLOCK + lane, x == -3.0)


_INT32 = st.sampled_from([-(2**31), -(2**31) + 20, -40, -1, 0, 1, 15, 31, 40, 2**31 - 70, 2**31 - 1]) | st.integers(
    -50, 50
)


@given(start=_INT32.filter(lambda start: start < 2**31 - 64), bound=_INT32)
@settings(max_examples=60, deadline=None)
def test_every_comparison_of_an_index_with_a_bound_masks_the_right_lanes(start, bound):
    x = torch.randn(64)
    out, off = torch.full((16, 64), float("nan")), torch.full((16, 64), 2, dtype=torch.int8)
    _every_predicate[(1,)](x, out, off, start, bound, BLOCK=64)
    index = (start + np.arange(64)).astype(np.int32)
    for k in range(16):
        limit = np.array(bound, np.int32)
        at = index
        if k % 8 >= 6:
            at, limit = at.astype(np.uint32), limit.astype(np.uint32)
        first, second = (limit, at) if k >= 8 else (at, limit)
        compare = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.less, np.less, np.less_equal)
        on = compare[k % 8](first, second)
        if k % 8 == 5:
            on &= (np.arange(64) < 30) & (bound < 1000)
        assert np.array_equal(out[k].numpy(), np.where(on, x.numpy() * 2, np.nan), equal_nan=True), k
        assert np.array_equal(off[k].numpy(), ~on), k


@pytest.fixture(scope="module")
def last_page():
    """Bytes of a page, writable, after and before pages that may not be touched."""
    size = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * size)
    base = torch.frombuffer(memory, dtype=torch.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    outer = (base.data_ptr(), base.data_ptr() + 2 * size)
    assert all(protect(at, size, 0) == 0 for at in outer)
    yield base[size : 2 * size]
    assert all(protect(at, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0 for at in outer)


@triton.jit(do_not_specialize=["n"])
def _increase(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + 1, mask=mask)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32, torch.float64])
def test_memory_beyond_a_mask_is_not_touched(dtype, last_page):
    page = last_page.view(dtype)
    for n in range(66):
        tail = page[len(page) - n :]
        page.copy_(torch.arange(len(page)))
        expected = page.clone()
        expected[len(page) - n :] += 1
        _increase[(1,)](tail, tail, n, BLOCK=128)
        assert torch.equal(page, expected)


@triton.jit(do_not_specialize=["m", "n", "x_stride", "y_stride"])
def _turn(
    x_ptr, y_ptr, sum_ptr, last_ptr, m, n, x_stride, y_stride, WAY: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * C + tl.arange(0, C)
    inside = (r[:, None] < m) & (c[None, :] < n)
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=inside, other=1)
    if WAY == "trans":
        turned = tl.trans(inside)
        tl.store(y_ptr + c[:, None] * y_stride + r[None, :], tl.trans(x + x), mask=turned)
    elif WAY == "store":
        tl.store(y_ptr + c[None, :] * y_stride + r[:, None], x + x, mask=inside)
    else:  # load
        y_inside = (c[:, None] < n) & (r[None, :] < m)
        z = tl.load(x_ptr + r[None, :] * x_stride + c[:, None], mask=y_inside, other=1)
        tl.store(y_ptr + c[:, None] * y_stride + r[None, :], z + z, mask=y_inside)
        # The same tile again, along its rows, after the store.
        tl.store(last_ptr + c[:, None] * y_stride + r[None, :], z + tl.trans(x), mask=y_inside)
        x = tl.trans(z)
    tl.store(sum_ptr + tl.program_id(1) * m + r, tl.sum(x.to(tl.float32), 1), mask=r < m)


@pytest.mark.parametrize("way", ["trans", "store", "load"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float64])
@given(m=st.integers(1, 40), n=st.integers(1, 40), padding=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_tiles_are_turned(way, dtype, m, n, padding):
    x = torch.randint(-60, 60, (m, n + padding)).to(dtype)[:, :n]
    y, last = (torch.full((n, m + padding), 99).to(dtype) for _ in range(2))
    programs = (triton.cdiv(m, 16), triton.cdiv(n, 32))
    sums = torch.full((programs[1], m), float("nan"))
    before = x.clone()
    _turn[programs](x, y, sums, last, m, n, x.stride(0), y.stride(0), WAY=way, R=16, C=32)
    assert torch.equal(x, before)
    doubled = torch.full((n, m + padding), 99).to(dtype)
    doubled[:, :m] = (x + x).T
    assert torch.equal(y, doubled)
    assert torch.equal(last, doubled if way == "load" else torch.full_like(last, 99))
    padded = torch.ones(m, 32 * programs[1])
    padded[:, :n] = x
    assert torch.equal(sums, padded.reshape(m, -1, 32).sum(2).T)


@triton.jit(do_not_specialize=["n", "stride"])
def _stride(x_ptr, y_ptr, n, stride, EVERY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in tl.static_range(6):
        at = i * (k - 2)
        if k == 2:
            at = i * stride
        if EVERY:
            tl.store(y_ptr + k * 1024 + at, tl.load(x_ptr + at) + k)
        else:
            tl.store(y_ptr + k * 1024 + at, tl.load(x_ptr + at, mask=i < n) + k, mask=i < n)


@given(n=st.integers(0, 64), stride=st.sampled_from([-5, -1, 1, 4, 7]), every=st.booleans())
@settings(max_examples=30, deadline=None)
def test_elements_a_constant_step_apart_are_read_and_written(n, stride, every):
    x, y = torch.randn(1024), torch.full((6, 1024), float("nan"))
    expected = y.numpy().copy()
    _stride[(1,)](x[500:], y[:, 500:], n, stride, EVERY=every, BLOCK=64)
    for k, step in enumerate((-2, -1, stride, 1, 2, 3)):
        at = 500 + np.arange(64 if every else n) * step
        expected[k, at] = x.numpy()[at] + np.float32(k)
    assert np.array_equal(y.numpy(), expected, equal_nan=True)


@triton.jit(do_not_specialize=["n"])
def _indirect(from_ptr, to_ptr, on_ptr, x_ptr, y_ptr, n, MASKS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if MASKS == 0:
        tl.store(y_ptr + tl.load(to_ptr + i), tl.load(x_ptr + tl.load(from_ptr + i)))
    elif MASKS == 1:
        x = tl.load(x_ptr + tl.load(from_ptr + i, mask=i < n), mask=i < n)
        tl.store(y_ptr + tl.load(to_ptr + i, mask=i < n), x, mask=i < n)
    else:
        on = tl.load(on_ptr + i, mask=i < n, other=0) != 0
        x = tl.load(x_ptr + tl.load(from_ptr + i, mask=on), mask=on)
        tl.store(y_ptr + tl.load(to_ptr + i, mask=on), x, mask=on)
        tl.store(y_ptr + 500 + i, tl.load(x_ptr + i, mask=on), mask=on)


@given(
    n=st.integers(0, 64), masks=st.integers(0, 2), runs=st.booleans(), density=st.sampled_from([0.1, 0.5, 0.95, 1.0])
)
@settings(max_examples=40, deadline=None)
def test_elements_at_any_addresses_are_read_and_written(n, masks, runs, density):
    x, y = torch.randn(500), torch.full((600,), float("nan"))
    # Lanes that are off point far outside.
    source, target = (torch.full((64,), 2**40) for _ in range(2))
    count = 64 if masks == 0 else n
    on = torch.rand(count) < density if masks == 2 else torch.ones(count, dtype=torch.bool)
    for tile in (source, target):
        order = torch.arange(7, 7 + count) if runs else torch.randperm(500)[:count]
        tile[:count] = torch.where(on, order, 2**40)
    expected = y.numpy().copy()
    chosen = np.flatnonzero(on.numpy())
    expected[target[chosen].numpy()] = x.numpy()[source[chosen].numpy()]
    if masks == 2:
        expected[500 + chosen] = x.numpy()[chosen]
    flags = torch.full((64,), 77, dtype=torch.int8)
    flags[:count] = on
    _indirect[(1,)](source, target, flags, x, y, n, MASKS=masks, BLOCK=64)
    assert np.array_equal(y.numpy(), expected, equal_nan=True)
