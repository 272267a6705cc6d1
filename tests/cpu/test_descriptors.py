"""Tensor descriptors that a kernel makes: windows, atomic reductions, rows gathered and scattered, against torch.

Those that are passed to a kernel are launched in `test_stock`.
"""

import operator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from windows import window

STRIDE = 64  # of rows; Triton wants a multiple of 16 bytes, whatever the number of columns


@triton.jit
def _show(x, out, rows, columns, stride, row, column, M: tl.constexpr, N: tl.constexpr, PADDING: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, columns], [stride, 1], [M, N], padding_option=PADDING)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], source.load([row, column]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    corner=st.tuples(st.integers(-20, 45), st.integers(-20, 45)),
    extents=st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([8, 32])),
    padding=st.sampled_from(["zero", "nan"]),
)
@settings(max_examples=10, deadline=None)
def test_a_descriptor_loads_its_window_and_padding_beyond(dtype, shape, corner, extents, padding):
    x = torch.randn(shape[0], STRIDE).to(dtype)[:, : shape[1]]
    out = torch.full(extents, -9.0, dtype=dtype)
    _show[(1,)](x, out, *shape, x.stride(0), *corner, *extents, PADDING=padding)
    expected = window(x, corner, extents, 0.0 if padding == "zero" else float("nan"))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _change(out, value, rows, columns, stride, row, column, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    target = tl.make_tensor_descriptor(out, [rows, columns], [stride, 1], [M, N])
    tile = tl.load(value + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "store":
        target.store([row, column], tile)
    elif OP == "add":
        target.atomic_add([row, column], tile)
    elif OP == "min":
        target.atomic_min([row, column], tile)
    elif OP == "max":
        target.atomic_max([row, column], tile)
    elif OP == "and":
        target.atomic_and([row, column], tile)
    elif OP == "or":
        target.atomic_or([row, column], tile)
    else:
        target.atomic_xor([row, column], tile)


CHANGES = {
    "store": lambda old, new: new, "add": operator.add, "min": torch.minimum, "max": torch.maximum,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    corner=st.tuples(st.integers(-4, 20), st.integers(-4, 20)),
    seed=st.integers(0, 999),
)
@settings(max_examples=6, deadline=None)
def test_a_descriptor_changes_what_lies_within_the_tensor_and_nothing_else(change, shape, corner, seed):
    generator = torch.Generator().manual_seed(seed)
    around = torch.randint(-99, 99, (3, shape[0], STRIDE), dtype=torch.int32, generator=generator)
    value = torch.randint(-99, 99, (4, 8), dtype=torch.int32, generator=generator)
    expected = around.clone()
    for m in range(4):
        for n in range(8):
            row, column = corner[0] + m, corner[1] + n
            if 0 <= row < shape[0] and 0 <= column < shape[1]:
                expected[1, row, column] = CHANGES[change](around[1, row, column], value[m, n])
    _change[(1,)](around[1], value, *shape, STRIDE, *corner, M=4, N=8, OP=change)
    assert torch.equal(around, expected)


@triton.jit
def _gather(x, index, out, rows, columns, stride, column, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [rows, columns], [stride, 1], [1, N])
    tile = source.gather(tl.load(index + tl.arange(0, M)), column)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tile)


@triton.jit
def _scatter(x, index, out, rows, columns, stride, column, M: tl.constexpr, N: tl.constexpr):
    target = tl.make_tensor_descriptor(out, [rows, columns], [stride, 1], [1, N])
    tile = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    target.scatter(tile, tl.load(index + tl.arange(0, M)), column)


@given(rows=st.integers(1, 30), columns=st.integers(1, 40), column=st.integers(-3, 40), seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_rows_are_gathered_by_number_and_those_beyond_are_zero(rows, columns, column, seed):
    index = torch.randint(-2, rows + 2, (8,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    x, out = torch.randn(rows, STRIDE)[:, :columns], torch.full((8, 16), -9.0)
    _gather[(1,)](x, index, out, rows, columns, STRIDE, column, M=8, N=16)
    expected = torch.cat([window(x, (row, column), (1, 16), 0.0) for row in index.tolist()])
    assert torch.equal(out, expected)


@given(rows=st.integers(8, 30), columns=st.integers(1, 40), column=st.integers(-3, 40), seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_rows_are_scattered_by_number_and_those_beyond_are_dropped(rows, columns, column, seed):
    index = (torch.randperm(rows + 4, generator=torch.Generator().manual_seed(seed)) - 2)[:8].int()
    x, around = torch.randn(8, 16), torch.zeros(3, rows, STRIDE)
    expected = around.clone()
    for m, row in enumerate(index.tolist()):
        for n in range(16):
            if 0 <= row < rows and 0 <= column + n < columns:
                expected[1, row, column + n] = x[m, n]
    _scatter[(1,)](x, index, around[1], rows, columns, STRIDE, column, M=8, N=16)
    assert torch.equal(around, expected)


@triton.jit
def _sum_of_depths(x, out, depth, rows, columns, stride, M: tl.constexpr, N: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [depth, rows, columns], [rows * stride, stride, 1], [1, M, N])
    target = tl.make_tensor_descriptor(out, [rows, columns], [stride, 1], [M, N])
    row = tl.program_id(0) * M
    for column in range(0, columns, N):
        total = tl.zeros((M, N), tl.float32)
        for k in range(depth):
            total += source.load([k, row, column]).reshape(M, N)
        target.store([row, column], total)


@given(depth=st.integers(0, 3), rows=st.integers(1, 20), columns=st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_descriptors_of_three_axes_are_read_around_loops(depth, rows, columns):
    x, out = torch.randint(-9, 9, (depth, rows, STRIDE)).float(), torch.full((rows, STRIDE), -99.0)
    _sum_of_depths[(triton.cdiv(rows, 8),)](x, out, depth, rows, columns, STRIDE, M=8, N=16)
    assert torch.equal(out[:, :columns], x.sum(0)[:, :columns])
    assert out[:, columns:].eq(-99).all()
