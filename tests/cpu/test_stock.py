"""Launches with the arguments that a kernel's source has: tuples, descriptors, constexprs; and prepared launches."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from esper_triton.cpu import prepare
from esper_triton.cpu.driver import CPUDriver
from esper_triton.cpu.errors import LaunchError, UnsupportedOperation
from esper_triton.cpu.stock import stock_launcher


@pytest.fixture(autouse=True, scope="module")
def cpu():
    triton.runtime.driver.set_active(CPUDriver())
    yield
    triton.runtime.driver.reset_active()


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) * factor, mask=mask)


@triton.jit
def nested(pair, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(pair[0][0] + i) * pair[0][1] + pair[1])


@triton.jit
def double_tiles(source, out, M: tl.constexpr, N: tl.constexpr):
    row, column = tl.program_id(0) * M, tl.program_id(1) * N
    out.store([row, column], source.load([row, column]) * 2)


@triton.jit
def add_row(source, row, out, offset, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = source.load([tl.program_id(0), 0]).reshape(N)
    tl.store(out + tl.program_id(0) * N + i, tile + tl.load(row + i) + offset)


@given(st.integers(1, 200), st.floats(-4, 4, width=32), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_prepared_launch_does_what_the_stock_launch_does(n, factor, shifted):
    x = torch.randn(n + 1)[int(shifted) :][:n]
    kept, out = x.clone(), torch.full((n,), float("nan"))
    # Compiled for a number and pointers that are divisible by nothing, so good for all.
    PREPARED(triton.cdiv(n, 64), 1, 1, x, out, n, factor)
    assert torch.equal(out, kept * torch.tensor(factor))
    assert torch.equal(x, kept)


def compile_scale() -> triton.compiler.CompiledKernel:
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    return triton.compile(ASTSource(scale, signature, {(4,): 64}), GPUTarget("cpu", "native", 1))


PREPARED = prepare(compile_scale())


def test_constants_at_the_end_may_be_given_or_not():
    x, out = torch.arange(4.0), torch.empty(4)
    PREPARED(1, 1, 1, x, out, 4, 0.5)
    assert out.tolist() == [0.0, 0.5, 1.0, 1.5]
    PREPARED(1, 1, 1, x, out, 4, 2.0, 64)
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0]
    with pytest.raises(LaunchError, match="'scale' was given 3 arguments, expected 4 to 5: x, out, n, factor, BLOCK"):
        PREPARED(1, 1, 1, x, out, 4)
    with pytest.raises(LaunchError, match="'scale' was given 6 arguments, expected 4 to 5"):
        PREPARED(1, 1, 1, x, out, 4, 1.0, 64, 0)
    with pytest.raises(LaunchError, match="'scale' was given 2 arguments, expected a grid x, y, z first"):
        PREPARED(1, 1)


def test_a_kernel_is_prepared_from_a_launch_or_a_warmup():
    x, out = torch.arange(4.0), torch.empty(4)
    launched = scale[(1,)](x, out, 4, 3.0, BLOCK=8)
    prepare(launched, num_threads=1)(1, 1, 1, x, out, 4, 0.25)
    assert out.tolist() == [0.0, 0.25, 0.5, 0.75]
    warm = scale.warmup(x, out, 4, 3.0, BLOCK=16, grid=(1,))
    prepare(warm)(1, 1, 1, x, out, 4, 0.75)
    assert out.tolist() == [0.0, 0.75, 1.5, 2.25]
    with pytest.raises(LaunchError, match="on 0 threads"):
        prepare(warm, num_threads=0)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # CUDA's backend in 3.9
def test_a_kernel_for_another_device_is_not_prepared():
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "factor": "fp32", "BLOCK": "constexpr"}
    kernel = triton.compile(ASTSource(scale, signature, {(4,): 64}), GPUTarget("cuda", 80, 32))
    with pytest.raises(LaunchError, match="'scale' was compiled for cuda, expected cpu"):
        prepare(kernel)


def test_tuples_within_tuples_are_opened():
    x, out = torch.arange(8.0), torch.empty(8)
    for offset in (2, 3):
        kernel = nested[(1,)](((x, 3), offset), out, BLOCK=8)
        assert out.tolist() == [3.0 * k + offset for k in range(8)]
    launch = prepare(kernel)
    launch(1, 1, 1, ((x, 5), 7), out)
    assert out.tolist() == [5.0 * k + 7 for k in range(8)]
    with pytest.raises(LaunchError, match="'nested' was given a tuple of 1, expected a tuple of 2"):
        launch(1, 1, 1, ((x,), 7), out)
    with pytest.raises(LaunchError, match="'nested' was given 7, expected a tuple of 2"):
        launch(1, 1, 1, 7, out)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_descriptors_reach_the_kernel_with_their_shape_and_strides(rows, fours, extra):
    base = torch.randn(rows, 4 * (fours + extra))
    source, out = base[:, : 4 * fours], torch.full((rows, 4 * fours), float("nan"))
    kept = base.clone()
    block = [8, 16]
    grid = (triton.cdiv(rows, 8), triton.cdiv(4 * fours, 16))
    double_tiles[grid](
        TensorDescriptor.from_tensor(source, block), TensorDescriptor.from_tensor(out, block), *block, num_warps=4
    )
    assert torch.equal(out, source * 2)
    assert torch.equal(base, kept)


def test_descriptors_stand_among_other_arguments_and_pad_as_they_say():
    base, row = torch.randn(3, 4), torch.randn(8)
    for padding, beyond in (("zero", 0.0), ("nan", float("nan"))):
        out = torch.full((3, 8), -1.0)
        descriptor = TensorDescriptor.from_tensor(base, [1, 8], padding=padding)
        add_row[(3,)](descriptor, row, out, 10, N=8)
        expected = torch.full((3, 8), beyond)
        expected[:, :4] = base
        expected = expected + row + 10
        np.testing.assert_array_equal(out.numpy(), expected.numpy())


def test_what_is_no_descriptor_or_one_of_another_rank_is_refused():
    tile = torch.zeros(8, 16)
    descriptor = TensorDescriptor.from_tensor(tile, [8, 16])
    launch = prepare(double_tiles[(1, 1)](descriptor, descriptor, 8, 16))
    with pytest.raises(LaunchError, match="'double_tiles' was given 3, expected a tensor descriptor"):
        launch(1, 1, 1, 3, descriptor)
    flat = TensorDescriptor.from_tensor(tile[0], [16])
    with pytest.raises(LaunchError, match="a tensor descriptor of rank 1, expected 2: tensordesc<fp32"):
        launch(1, 1, 1, flat, descriptor)
    meta = types.SimpleNamespace(
        base=torch.zeros(8, 16, device="meta"), shape=[8, 16], strides=[16, 1], padding="zero", round_f32_to_tf32=False
    )
    with pytest.raises(LaunchError, match="'double_tiles' is a tensor on meta, expected cpu"):
        launch(1, 1, 1, meta, descriptor)


def test_a_descriptor_that_became_an_unknown_number_of_arguments_is_refused_by_name():
    source = types.SimpleNamespace(signature={"x": "tensordesc<fp32[8, 16]>"})
    with pytest.raises(UnsupportedOperation, match=r"descriptor as an argument .*'k'.*12 more arguments"):
        stock_launcher(source, types.SimpleNamespace(name="k", slots=21))
