"""Tiles carried around a loop that are updated in the course of an earlier nest, against numpy with integers."""

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _rows(x_ptr, out_ptr, sums_ptr, steps, n, N: tl.constexpr, WAY: tl.constexpr):
    i = tl.arange(0, N)
    mask = i < n
    total = tl.zeros((N,), tl.int64)
    other = tl.zeros((N,), tl.int64) + 1
    for step in range(steps):
        at = step * n + i
        x = tl.load(x_ptr + at, mask=mask, other=0)
        if WAY == "reduced":
            tl.store(out_ptr + at, x - tl.sum(x, 0), mask=mask)
            total += x * 3
            other = other ^ x
        elif WAY == "stored":
            tl.store(out_ptr + at, x + 1, mask=mask)
            total += x
        elif WAY == "needs the reduction":
            least = tl.min(x, 0)
            total += x - least
            tl.store(out_ptr + at, x + least, mask=mask)
        elif WAY == "read before":
            tl.store(out_ptr + at, total, mask=mask)
            total += x * tl.max(x, 0)
        elif WAY == "read after":
            most = tl.max(x, 0)
            total, other = total + x, other + total
            tl.store(out_ptr + at, x + most, mask=mask)
        elif WAY == "under a condition":
            if step % 2 == 0:
                tl.store(out_ptr + at, x * 2, mask=mask)
            total += x
        elif WAY == "of indices, under a condition":
            if step % 2 == 0:
                tl.store(out_ptr + at, i.to(tl.int64), mask=mask)
            total += i.to(tl.int64)
        elif WAY == "in an inner loop":
            for k in range(step):
                tl.store(out_ptr + at, x + k, mask=mask)
            total += x
        elif WAY == "twice":
            tl.store(out_ptr + at, x + tl.sum(x, 0), mask=mask)
            total += x
            total = total * 2 & 0xFFFF
    tl.store(sums_ptr + i, total, mask=mask)
    tl.store(sums_ptr + n + i, other, mask=mask)


def _expected(memory: np.ndarray, x: slice, out: slice, steps: int, n: int, way: str) -> list[np.ndarray]:
    """Step by step, in `memory`, where the input and the output may overlap."""
    total, other = np.zeros(n, np.int64), np.ones(n, np.int64)
    for step in range(steps):
        row, place = memory[x][step * n :][:n].copy(), memory[out][step * n :][:n]
        match way:
            case "reduced":
                place[:] = row - row.sum()
                total, other = total + row * 3, other ^ row
            case "stored":
                place[:] = row + 1
                total = total + row
            case "needs the reduction":
                least = min(row.min(), 0)  # of the tile, which is zero where it is masked off
                total = total + row - least
                place[:] = row + least
            case "read before":
                place[:] = total
                total = total + row * max(row.max(), 0)
            case "read after":
                total, other = total + row, other + total
                place[:] = row + max(row.max(), 0)
            case "under a condition":
                if step % 2 == 0:
                    place[:] = row * 2
                total = total + row
            case "of indices, under a condition":
                if step % 2 == 0:
                    place[:] = np.arange(n)
                total = total + np.arange(n)
            case "in an inner loop":
                if step > 0:
                    place[:] = row + step - 1
                total = total + row
            case "twice":
                place[:] = row + row.sum()
                total = (total + row) * 2 & 0xFFFF
    return [total, other]


_WAYS = [
    "reduced", "stored", "needs the reduction", "read before", "read after", "under a condition",
    "of indices, under a condition", "in an inner loop", "twice",
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    way=st.sampled_from(_WAYS), steps=st.integers(0, 5), n=st.integers(1, 100),
    shift=st.sampled_from([None, 0, 1, -1, 60]), seed=st.integers(0, 99),
)  # fmt: skip
def test_early_updates_give_what_updates_at_the_end_of_a_step_give(way, steps, n, shift, seed):
    memory = torch.zeros(2000, dtype=torch.int64)
    start = 100
    memory[:1000] = torch.randint(-9, 10, (1000,), generator=torch.Generator().manual_seed(seed))
    there = 1200 if shift is None else start + shift  # apart from the input, or over it
    expected = memory.numpy().copy()
    sums = torch.zeros(2, n, dtype=torch.int64)
    x, out = memory[start : start + 5 * n], memory[there : there + 5 * n]
    _rows[(1,)](x, out, sums, steps, n, N=128, WAY=way)
    totals = _expected(expected, slice(start, None), slice(there, None), steps, n, way)
    np.testing.assert_array_equal(memory.numpy(), expected)
    np.testing.assert_array_equal(sums.numpy(), totals)


@triton.jit
def _columns(x_ptr, out_ptr, sums_ptr, steps, N: tl.constexpr):
    r, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.int64)
    for step in range(steps):
        x = tl.load(x_ptr + step * N * N + r * N + c)
        tl.store(out_ptr + step * N * N + c * N + r, x * 2)  # across the lanes of the sum
        total += x
    tl.store(sums_ptr + r * N + c, total)


def test_an_update_keeps_to_its_own_order_beside_a_store_in_another():
    x = torch.randint(-9, 10, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    out, sums = torch.zeros_like(x), torch.zeros(32, 32, dtype=torch.int64)
    _columns[(1,)](x, out, sums, 3, N=32)
    assert torch.equal(out, x.transpose(1, 2) * 2)
    assert torch.equal(sums, x.sum(0))
