"""Volatile loads: read where they stand, each time anew, element by element as the mask says."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _wait_for_all(flags_ptr, ready_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_xchg(ready_ptr, 1)
    missing = N
    while missing > 0:
        missing = N - tl.sum(tl.load(flags_ptr + at, volatile=True))
    while tl.load(ready_ptr, volatile=True) != 2:
        pass
    tl.store(out_ptr, tl.load(flags_ptr + N))


@pytest.mark.parametrize("n", [1, 32])
def test_a_loop_sees_what_is_stored_while_it_waits(n):
    flags, ready, out = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    waiting = threading.Thread(target=lambda: _wait_for_all[(1,)](flags, ready, out, N=n), daemon=True)
    waiting.start()
    while ready.item() == 0:
        assert waiting.is_alive()
    flags[n] = 7  # a load after the loop, which must not have been done before
    for k in range(n):
        flags[k] = 1
    assert out.item() == 0
    ready[0] = 2
    waiting.join(60)
    assert not waiting.is_alive()
    assert out.item() == 7


@triton.jit
def _around_a_store(x_ptr, before_ptr, after_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    plain = tl.load(x_ptr + at)
    before = tl.load(x_ptr + at, volatile=True)
    tl.store(x_ptr + at, plain * 2)
    after = tl.load(x_ptr + at, volatile=True)
    tl.store(before_ptr + at, before)
    tl.store(x_ptr + at, after + 1)
    tl.store(after_ptr + at, after)


@pytest.mark.parametrize("n", [1, 8, 64])
def test_volatile_loads_keep_their_place_among_stores(n):
    x = torch.arange(1.0, n + 1)
    memory, before, after = x.clone(), torch.zeros(n), torch.zeros(n)
    _around_a_store[(1,)](memory, before, after, N=n)
    assert torch.equal(before, x)
    assert torch.equal(after, 2 * x)
    assert torch.equal(memory, 2 * x + 1)


@triton.jit(do_not_specialize=["rows", "columns", "stride"])
def _copy(x_ptr, other_ptr, out_ptr, rows, columns, stride, OTHER: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    mask = (r < rows) & (c < columns)
    if OTHER:
        x = tl.load(x_ptr + r * stride + c, mask=mask, other=tl.load(other_ptr + r * C + c), volatile=True)
    else:
        x = tl.load(x_ptr + r * stride + c, mask=mask, volatile=True)
    tl.store(out_ptr + r * C + c, x)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int8, torch.int16, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64],
    ids=str,
)
@given(rows=st.integers(0, 4), columns=st.integers(0, 33), pad=st.integers(0, 3), other=st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_what_a_mask_leaves_out_is_not_read(dtype, rows, columns, pad, other):
    stride = columns + pad
    x = (torch.arange(max(rows * stride, 1)) % 97).to(dtype)  # no longer than what the mask lets through
    instead = (torch.arange(4 * 64).reshape(4, 64) % 89 - 7).to(dtype)
    expected = instead.clone() if other else torch.zeros_like(instead)
    expected[:rows, :columns] = x[: rows * stride].reshape(rows, stride)[:, :columns]
    out = torch.ones_like(instead)
    _copy[(1,)](x, instead, out, rows, columns, stride, OTHER=other, R=4, C=64)
    assert torch.equal(out, expected)


@triton.jit
def _scalar(x_ptr, flag, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr, mask=flag, other=5, volatile=True))
    tl.load(x_ptr, volatile=True)


@pytest.mark.parametrize("flag", [True, False])
def test_a_masked_scalar_is_read_or_replaced(flag):
    out = torch.zeros(1, dtype=torch.int32)
    _scalar[(1,)](torch.tensor([3], dtype=torch.int32), flag, out)
    assert out.item() == (3 if flag else 5)
