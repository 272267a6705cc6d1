"""What is fetched ahead: seen by writing a mark in place of the fetch, at the same distance from every element."""

import pytest
import torch
import triton
import triton.language as tl
from llvmlite import ir

from esper_triton.cpu import compiler
from esper_triton.cpu.lowering import ahead
from esper_triton.cpu.lowering.elementwise import I64

_ROWS, _N = 6, 128
_AWAY = 4 * _ROWS * _N  # bytes from an element to its mark


@pytest.fixture(autouse=True, scope="module")
def _marks():
    """Kernels that write 1.0 `_AWAY` bytes behind whatever they would fetch."""

    def mark(b, name, result, arguments):
        assert name.startswith("llvm.prefetch")
        place = b.gep(arguments[0], [ir.Constant(I64, _AWAY)], source_etype=ir.IntType(8))
        b.store(ir.Constant(ir.FloatType(), 1.0), place, align=4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "call", mark)
        compiler._lower.cache_clear()
        yield
    compiler._lower.cache_clear()


def _input() -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows, and behind them as much memory for marks, and as much again for those of rows past the end."""
    memory = torch.zeros(3, _ROWS, _N)
    memory[0] = torch.randn(_ROWS, _N, generator=torch.Generator().manual_seed(0))
    return memory[0], memory[1:].reshape(2 * _ROWS, _N)


def _marked_rows(marks: torch.Tensor) -> list[int]:
    """The rows of which every cache line is marked; no row may be marked in part."""
    lines = marks.reshape(len(marks), -1, 16).any(-1)
    assert torch.equal(lines.any(1), lines.all(1))
    return [int(row) for row in lines.all(1).nonzero().flatten()]


@triton.jit
def _softmax(x_ptr, out_ptr, n, N: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def _softmax_in_steps(x_ptr, out_ptr, n, start, stop, step, N: tl.constexpr, WAY: tl.constexpr):
    i = tl.arange(0, N)
    line = x_ptr + start * n
    lines = x_ptr + start * n + i
    for row in range(start, stop, step):
        if WAY == "counted":
            at = x_ptr + row * n + i
        elif WAY == "backwards":
            at = x_ptr + (stop - 1 - row) * n + i
        elif WAY == "carried":
            at = line + i
            line += step * n
        elif WAY == "carried as a tile":
            at = lines
            lines += step * n
        x = tl.load(at, mask=i < n, other=float("-inf"))
        e = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def _rows_by_a_list(x_ptr, list_ptr, out_ptr, n, rows, N: tl.constexpr):
    i = tl.arange(0, N)
    for row in range(rows):
        x = tl.load(x_ptr + tl.load(list_ptr + row) * n + i)
        tl.store(out_ptr + row * n + i, x - tl.sum(x, 0))


@triton.jit
def _sum_of_rows(x_ptr, out_ptr, n, rows, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for row in range(rows):
        total += tl.load(x_ptr + row * n + i)
    tl.store(out_ptr + i, total)


@triton.jit
def _turn(x_ptr, out_ptr, rows, columns, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * columns + c[None, :])
    tl.store(out_ptr + c[:, None] * rows + r[None, :], tl.trans(x))


def test_a_program_fetches_the_row_of_the_next():
    x, marks = _input()
    out = torch.empty_like(x)
    _softmax[(3,)](x, out, _N, N=_N)
    torch.testing.assert_close(out[:3], torch.softmax(x[:3], 1))
    assert _marked_rows(marks) == [1, 2, 3]


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 4, 1), (1, 5, 2), (2, 2, 1)])
@pytest.mark.parametrize("way", ["counted", "backwards", "carried", "carried as a tile"])
def test_a_step_fetches_the_row_of_the_next(way, start, stop, step):
    x, marks = _input()
    out = torch.zeros_like(x)
    _softmax_in_steps[(1,)](x, out, _N, start, stop, step, N=_N, WAY=way)
    rows = list(range(start, stop, step))
    sources = [stop - 1 - row if way == "backwards" else row for row in rows]
    torch.testing.assert_close(out[rows], torch.softmax(x[sources], 1))
    step = -step if way == "backwards" else step
    # Before the first row lies the input, which is not looked at.
    assert _marked_rows(marks) == sorted(row + step for row in sources if row + step >= 0)


def test_what_is_not_known_is_not_fetched():
    x, marks = _input()
    out = torch.empty_like(x)
    order = torch.tensor([3, 1, 2])
    _rows_by_a_list[(1,)](x, order, out, _N, 3, N=_N)
    torch.testing.assert_close(out[:3], x[order] - x[order].sum(1, keepdim=True))
    assert not marks.any()


def test_what_keeps_memory_busy_by_itself_fetches_nothing():
    x, marks = _input()
    out = torch.empty(_N)
    _sum_of_rows[(1,)](x, out, _N, _ROWS, N=_N)
    torch.testing.assert_close(out, x.sum(0))
    assert not marks.any()


@pytest.mark.parametrize("rows", [8, 4])
def test_a_tile_that_is_turned_is_fetched_in_its_own_order(rows):
    x, marks = (tensor.reshape(-1, 32) for tensor in _input())
    out = torch.empty(32, 2 * rows)
    _turn[(2,)](x, out, 2 * rows, 32, R=rows, C=32)
    assert torch.equal(out, x[: 2 * rows].T)
    assert _marked_rows(marks) == list(range(rows, 3 * rows))
