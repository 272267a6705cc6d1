"""What a program writes and reads happens in its order: aliased tensors, loop-carried values, branches."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _shift(x_ptr, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(x_ptr + offsets + BY, x + 1, mask=mask)


@pytest.mark.parametrize("by", [0, 1, 3, 16, 100])
def test_a_tile_is_loaded_whole_before_a_shifted_store(by):
    memory = torch.arange(400.0)
    expected = memory.clone()
    expected[by : by + 200] = memory[:200] + 1
    _shift[(1,)](memory, 200, BY=by, BLOCK=256)
    assert torch.equal(memory, expected)


@triton.jit
def _swap(a_ptr, b_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    a, b = tl.load(a_ptr + offsets, mask=mask), tl.load(b_ptr + offsets, mask=mask)
    tl.store(a_ptr + offsets, b, mask=mask)
    tl.store(b_ptr + offsets, a, mask=mask)


@pytest.mark.parametrize("gap", [0, 1, 17, 64])
def test_two_tensors_may_overlap(gap):
    memory = torch.arange(200.0)
    expected = memory.clone()
    a, b = memory[:64].clone(), memory[gap : gap + 64].clone()
    expected[:64] = b
    expected[gap : gap + 64] = a
    _swap[(1,)](memory, memory[gap:], 64, BLOCK=64)
    assert torch.equal(memory, expected)


@triton.jit
def _reverse(x_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(x_ptr + (N - 1 - offsets), tl.load(x_ptr + offsets))


def test_a_tensor_is_reversed_in_place():
    memory = torch.arange(128.0)
    _reverse[(1,)](memory, N=128)
    assert torch.equal(memory, torch.arange(128.0).flip(0))


@triton.jit
def _transpose_in_place(x_ptr, N: tl.constexpr):
    r, c = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(x_ptr + c * N + r, tl.load(x_ptr + r * N + c))


def test_a_square_is_transposed_in_place(rng):
    x = torch.randn(32, 32, generator=rng)
    memory = x.clone()
    _transpose_in_place[(1,)](memory, N=32)
    assert torch.equal(memory, x.T)


@triton.jit
def _same_address(x_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    pointers = x_ptr + offsets * 0
    tl.store(pointers, tl.load(pointers) + 1)


def test_lanes_that_share_an_address_all_load_before_any_stores():
    memory = torch.zeros(1)
    _same_address[(1,)](memory, N=64)
    assert memory.item() == 1


@triton.jit
def _load_across_store(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    before = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.full((N,), 9.0, tl.float32))
    after = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, before * 100 + after)


def test_loads_keep_their_side_of_a_store(rng):
    x = torch.randn(64, generator=rng)
    out = torch.zeros(64)
    _load_across_store[(1,)](x.clone(), torch.zeros(64), out, N=64)
    torch.testing.assert_close(out, x * 100 + x)
    aliased = x.clone()
    _load_across_store[(1,)](aliased, aliased, out, N=64)
    torch.testing.assert_close(out, x * 100 + 9.0)


@triton.jit
def _load_across_scalar_store(x_ptr, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    before = tl.load(x_ptr + offsets)
    tl.store(x_ptr, 5.0)
    tl.store(out_ptr + offsets, before)


def test_a_scalar_store_comes_after_the_loads_before_it():
    x, out = torch.arange(16.0) + 1, torch.zeros(16)
    _load_across_scalar_store[(1,)](x, out, N=16)
    assert torch.equal(out, torch.arange(16.0) + 1)
    assert x[0] == 5


@triton.jit
def _fibonacci(x_ptr, y_ptr, out_ptr, steps, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a, b = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    for _ in range(steps):
        a, b = b, a + b
    tl.store(out_ptr + offsets, a)


@triton.jit
def _rotate(x_ptr, out_ptr, steps, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a = tl.load(x_ptr + offsets)
    b, c = a + 100, a + 200
    for _ in range(steps):
        a, b, c = b, c, a
    tl.store(out_ptr + offsets, a)
    tl.store(out_ptr + N + offsets, b)
    tl.store(out_ptr + 2 * N + offsets, c)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10])
def test_carried_tiles_are_exchanged_at_once(steps, rng):
    x, y = (torch.randint(0, 5, (64,), generator=rng).float() for _ in range(2))
    out = torch.full((64,), float("nan"))
    _fibonacci[(1,)](x, y, out, steps, N=64)
    a, b = x, y
    for _ in range(steps):
        a, b = b, a + b
    assert torch.equal(out, a)
    rotated = torch.full((192,), float("nan"))
    _rotate[(1,)](x, rotated, steps, N=64)
    expected = [x, x + 100, x + 200]
    assert torch.equal(rotated, torch.cat(expected[steps % 3 :] + expected[: steps % 3]))


@triton.jit
def _walk(x_ptr, out_ptr, rows, stride, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pointers = x_ptr + offsets
    columns = offsets * 1
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        x = tl.load(pointers, mask=offsets < n, other=0.0)
        total += x * (columns + row).to(tl.float32)
        pointers += stride
        columns += 3
    tl.store(out_ptr + offsets, total, mask=offsets < n)
    tl.store(out_ptr + n + offsets, columns.to(tl.float32), mask=offsets < n)


@given(rows=st.integers(0, 9), n=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_pointers_and_indices_may_be_carried_around_a_loop(rows, n):
    x = torch.randn(max(rows, 1), n)
    out = torch.full((2 * n,), float("nan"))
    _walk[(1,)](x, out, rows, x.stride(0), n, BLOCK=64)
    columns = torch.arange(n).double()
    weights = torch.stack([columns + 4 * row for row in range(rows)]) if rows else torch.zeros(0, n).double()
    torch.testing.assert_close(out[:n].double(), (x[:rows].double() * weights).sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(out[n:], (columns + 3 * rows).float())


@triton.jit
def _branch(x_ptr, out_ptr, flag, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    scale = 1.0
    if flag > 0:
        x = tl.exp(x)
        scale = 2.0
        if flag > 1:
            x = x + 1
            tl.store(out_ptr + N + offsets, x)
    else:
        x = -x
    tl.store(out_ptr + offsets, x * scale)


@pytest.mark.parametrize("flag", [0, 5, 2])
def test_branches_yield_tiles_and_scalars(flag, rng):
    x = torch.randn(32, generator=rng)
    out = torch.full((64,), -7.0)
    _branch[(1,)](x, out, flag, N=32)
    if flag:
        torch.testing.assert_close(out[:32].double(), 2 * (x.double().exp() + 1), rtol=3e-7, atol=0)
        assert torch.equal(out[32:] * 2, out[:32])
    else:
        assert torch.equal(out[:32], -x)
        assert (out[32:] == -7).all()


@triton.jit
def _nested(x_ptr, out_ptr, outer, inner, N: tl.constexpr):
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    total = tl.zeros((N,), tl.float32)
    for i in range(outer):
        row = x * i
        for j in range(i, inner):
            if j % 2 == 0:
                total += row
            else:
                total -= row * 0.5
        row = row + 1
        total += row
    tl.store(out_ptr + offsets, total)


@given(outer=st.integers(0, 5), inner=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_loops_nest(outer, inner):
    x, out = torch.randn(16), torch.full((16,), float("nan"))
    _nested[(1,)](x, out, outer, inner, N=16)
    total = torch.zeros(16, dtype=torch.float64)
    for i in range(outer):
        row = x.double() * i
        for j in range(i, inner):
            total += row if j % 2 == 0 else -row * 0.5
        total += row + 1
    torch.testing.assert_close(out.double(), total, rtol=1e-5, atol=1e-5)


@triton.jit
def _reuse(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    index = offsets * 2
    shown = tl.reshape(index, (2, BLOCK // 2))
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if n > 10:
        y = tl.sum(tl.reshape(index, (2, BLOCK // 2)).to(tl.float32), 0)
        tl.store(out_ptr + tl.arange(0, BLOCK // 2), y)
    total = tl.sum(shown.to(tl.float32)) + tl.sum(x)
    tl.store(out_ptr + BLOCK, total)


@pytest.mark.parametrize("n", [4, 32])
def test_index_tiles_are_not_lost_in_a_branch_not_taken(n):
    x, out = torch.ones(32), torch.zeros(33)
    _reuse[(1,)](x, out, n, BLOCK=32)
    assert out[32] == 2 * sum(range(32)) + n
    index = 2 * torch.arange(32.0).reshape(2, 16)
    assert torch.equal(out[:16], index.sum(0) if n > 10 else torch.zeros(16))
