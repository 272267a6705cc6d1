"""The estimate of a program's work, and the number of threads that follows from it."""

from __future__ import annotations

import json

import pytest
import torch
import triton
import triton.language as tl
from test_native import VISIT, assemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esper_triton.cpu import elf, work
from esper_triton.cpu.native import NOTE_SECTION, LoadedCode, NativeKernel


@triton.jit
def straight(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def leaves_early(x, n, BLOCK: tl.constexpr):
    if tl.program_id(0) >= n:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) * 2)


@triton.jit
def exponential(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.exp(tl.load(x + i, mask=i < n) * 2), mask=i < n)


@triton.jit
def four_times(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.range(0, 4):
        tl.store(x + k * BLOCK + i, tl.load(x + k * BLOCK + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def n_times(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.range(0, n):
        tl.store(x + k * BLOCK + i, tl.load(x + k * BLOCK + i) * 2)


@triton.jit
def until(x, n, BLOCK: tl.constexpr):
    while tl.atomic_add(x, 1.0) < n:
        pass


@triton.jit
def product(x, n, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tile = tl.load(x + i * BLOCK + j)
    tl.store(x + i * BLOCK + j, tl.dot(tile, tile))


@triton.jit(noinline=True)
def called(x, n):
    tl.store(x, n)


@triton.jit
def calls(x, n, BLOCK: tl.constexpr):
    called(x, n)


def estimate(kernel, block: int = 64) -> int | None:
    signature = {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    compiled = triton.compile(ASTSource(kernel, signature, {(2,): block}), GPUTarget("cpu", "native", 1))
    note = json.loads(elf.section(compiled.asm["o"], NOTE_SECTION))
    assert note["work"] == compiled.metadata.work
    return compiled.metadata.work


def test_work_grows_with_the_block_and_with_what_is_done_to_its_elements():
    small, large = estimate(straight, 64), estimate(straight, 1024)
    assert 64 * 5 < small < 64 * 40 + 1000
    assert 10 * small > large > 5 * small  # 16 times the elements, and what a program costs anyway
    assert estimate(exponential, 1024) > large + 8 * 1024
    assert estimate(product, 32) > 32**3


def test_loops_count_as_often_as_they_run():
    once, four = estimate(straight, 1024), estimate(four_times, 1024)
    assert 2 * once < four < 5 * once  # index arithmetic is hoisted out of the loop


def test_a_return_ahead_of_the_end_leaves_the_work_known():
    assert estimate(leaves_early, 1024) > 1024


@pytest.mark.parametrize("kernel", [n_times, until, calls])
def test_what_cannot_be_counted_is_unknown(kernel):
    assert estimate(kernel) is None


def visitor(amount: int | None) -> NativeKernel:
    """Notes for each program which thread ran it; says that a program does so much."""
    note = json.dumps({"cpu": "generic", "features": [], "work": amount}).encode()
    escaped = "".join(f"\\{byte:02x}" for byte in note)
    text = f'@note = constant [{len(note)} x i8] c"{escaped}", section "{NOTE_SECTION}", !exclude !{{}}\n'
    return NativeKernel(LoadedCode.load(assemble(VISIT + text), symbol="visit"), ["*i64", "*i64"])


@pytest.mark.parametrize("through", ["launch", "launcher"])
@pytest.mark.parametrize(
    ("amount", "programs", "threads"),
    [
        (None, 2, 2),  # unknown: on as many as there are
        (None, 1, 1),
        (work.THREAD_GRAIN, 2, 3),
        (work.THREAD_GRAIN // 10, 9, 1),  # not enough for one more
        (work.THREAD_GRAIN // 10, 10, 2),
        (work.THREAD_GRAIN // 10, 29, 3),
        (0, 1000, 1),
    ],
)
def test_threads_are_woken_for_enough_work_alone(through, amount, programs, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        kernel = visitor(amount)
        visits, numbers = torch.zeros(programs, dtype=torch.int64), torch.full((programs,), -1)
        if through == "launch":
            kernel.launch((programs, 1, 1), [visits, numbers])
        else:
            kernel.launcher()(programs, 1, 1, visits, numbers)
    finally:
        torch.set_num_threads(before)
    assert visits.tolist() == [1] * programs
    assert set(numbers.tolist()) == set(range(min(threads, programs)))
