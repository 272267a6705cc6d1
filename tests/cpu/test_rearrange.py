"""Join, split, cat, gather, histogram, sort and flip, against numpy; what a kernel prints."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import RELEASE, known_if

EXTENTS = [1, 2, 4, 16, 64]


@triton.jit
def _join_split(x_ptr, y_ptr, joined_ptr, x_out, y_out, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    joined = tl.join(tl.load(x_ptr + at), tl.load(y_ptr + at))
    pair = tl.arange(0, 2)[None, None, :]
    tl.store(joined_ptr + at[:, :, None] * 2 + pair, joined)
    first, second = tl.split(joined * 2)
    tl.store(x_out + at, first)
    tl.store(y_out + at, second)


@given(m=st.sampled_from(EXTENTS), n=st.sampled_from(EXTENTS))
@settings(max_examples=8, deadline=None)
def test_two_tiles_are_joined_along_a_new_last_axis_and_split_again(m, n):
    x, y = torch.randn(m, n), torch.randn(m, n)
    joined, x_out, y_out = torch.zeros(m, n, 2), torch.zeros(m, n), torch.zeros(m, n)
    _join_split[(1,)](x, y, joined, x_out, y_out, M=m, N=n)
    assert torch.equal(joined, torch.stack([x, y], -1))
    assert torch.equal(x_out, 2 * x)
    assert torch.equal(y_out, 2 * y)


@triton.jit
def _cat(x_ptr, y_ptr, out_ptr, N: tl.constexpr, REORDER: tl.constexpr):
    at = tl.arange(0, N)
    both = tl.cat(tl.load(x_ptr + at), tl.load(y_ptr + at) + 1, can_reorder=REORDER)
    tl.store(out_ptr + tl.arange(0, 2 * N), both)


@pytest.mark.filterwarnings("ignore:tl.cat.can_reorder=True. is deprecated")  # from 3.9 on
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("n", [1, 4, 64])
def test_tiles_are_put_one_after_the_other(n, reorder):
    x, y, out = torch.randn(n), torch.randn(n), torch.zeros(2 * n)
    with known_if(reorder or RELEASE >= (3, 7), "always may reorder elements"):
        _cat[(1,)](x, y, out, N=n, REORDER=reorder)
        assert torch.equal(out, torch.cat([x, y + 1]))


@triton.jit
def _cat_along(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    both = tl.cat(tl.load(x_ptr + at), tl.load(y_ptr + at), dim=AXIS)
    tl.store(out_ptr + tl.arange(0, 2 * M * N), tl.reshape(both, (2 * M * N,)))


@given(m=st.sampled_from(EXTENTS), n=st.sampled_from(EXTENTS), axis=st.sampled_from([0, 1]))
@settings(max_examples=8, deadline=None)
def test_tiles_are_put_together_along_either_axis(m, n, axis):
    x, y, out = torch.randn(m, n), torch.randn(m, n), torch.zeros(2 * m * n)
    with known_if(RELEASE >= (3, 7), "unexpected keyword argument 'dim'"):
        _cat_along[(1,)](x, y, out, M=m, N=n, AXIS=axis)
        assert torch.equal(out, torch.cat([x, y], axis).reshape(-1))


@triton.jit
def _gather(x_ptr, index_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if AXIS == 0:
        at = tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :]
    else:
        at = tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + at, tl.gather(x, tl.load(index_ptr + at), AXIS))


@given(
    m=st.sampled_from(EXTENTS[:4]), n=st.sampled_from(EXTENTS[:4]), k=st.sampled_from(EXTENTS[:4]),
    axis=st.sampled_from([0, 1]), dtype=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_elements_are_gathered_along_either_axis(m, n, k, axis, dtype, seed):
    x = torch.randn(m, n)
    shape = (k, n) if axis == 0 else (m, k)
    index = torch.randint(0, x.shape[axis], shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    out = torch.zeros(shape)
    _gather[(1,)](x, index, out, M=m, N=n, K=k, AXIS=axis)
    assert torch.equal(out, torch.gather(x, axis, index.long()))


@triton.jit
def _histogram(x_ptr, out_ptr, n, N: tl.constexpr, BINS: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + tl.arange(0, BINS), tl.histogram(tl.load(x_ptr + at), BINS, mask=at < n))


@given(bins=st.sampled_from([1, 8, 64]), size=st.sampled_from([1, 16, 256]), data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_histogram_counts_what_the_mask_lets_through(bins, size, data):
    n = data.draw(st.integers(0, size))
    x = torch.randint(0, bins, (size,), dtype=torch.int32)
    out = torch.full((bins,), -1, dtype=torch.int32)
    _histogram[(1,)](x, out, n, N=size, BINS=bins)
    assert np.array_equal(out.numpy(), np.bincount(x[:n].numpy(), minlength=bins))


@triton.jit
def _sort(x_ptr, out_ptr, flipped_ptr, M: tl.constexpr, N: tl.constexpr, DESCENDING: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.sort(x, descending=DESCENDING))
    tl.store(flipped_ptr + at, tl.flip(x, 1))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 64), (4, 8), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_rows_are_sorted_and_flipped(descending, m, n, dtype):
    x = (torch.randn(m, n) * 50).to(dtype)
    out, flipped = torch.zeros_like(x), torch.zeros_like(x)
    _sort[(1,)](x, out, flipped, M=m, N=n, DESCENDING=descending)
    assert torch.equal(out, x.sort(-1, descending=descending).values)
    assert torch.equal(flipped, x.flip(-1))


@triton.jit
def _print(x_ptr, n, N: tl.constexpr):
    tl.device_print("n =", n)
    tl.device_print("bits", tl.load(x_ptr + tl.arange(0, N)).to(tl.int32), hex=True)
    tl.device_print("two", n + 1, tl.load(x_ptr))
    tl.device_print("here")


def test_a_kernel_prints_one_line_for_each_element(capfd):
    _print[(1, 2)](torch.tensor([1.5, -2.0]), -3, N=2)
    lines = capfd.readouterr().out.splitlines()
    expected = []
    for y in range(2):
        pid = f"pid (0, {y}, 0)"
        expected += [
            f"{pid} idx () n =: -3",
            f"{pid} idx (0) bits: 0x00000001",
            f"{pid} idx (1) bits: 0xfffffffe",
            f"{pid} idx () two: (operand 0) -2",
            f"{pid} idx () two: (operand 1) 1.500000",
            f"{pid} here",
        ]
    assert sorted(lines) == sorted(expected)
