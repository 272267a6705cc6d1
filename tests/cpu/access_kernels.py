"""One kernel for each way in which the CPU backend accesses memory; compiled by `test_explain`, seldom launched."""

import triton
import triton.language as tl


@triton.jit
def scalar(x_ptr, out_ptr, flag):
    x = tl.load(x_ptr)
    tl.store(out_ptr, x, mask=flag != 0)


@triton.jit
def contiguous(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x)


@triton.jit
def prefix(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(out_ptr + at, x, mask=at < n)


@triton.jit
def one_condition(x_ptr, out_ptr, flag, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=flag > 0, other=0.0)
    tl.store(out_ptr + at, x, mask=flag > 1)


@triton.jit
def odd_lanes(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=(at & 1) == 1, other=0.0)
    tl.store(out_ptr + at, x, mask=(at & 2) == 2)


@triton.jit
def strided(x_ptr, out_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * STRIDE)
    tl.store(out_ptr + at * STRIDE, x)


@triton.jit
def masked_strides(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * 3, mask=at < n)
    tl.store(out_ptr + at * 5, x, mask=at < n)


@triton.jit
def indirect(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, x)


@triton.jit
def masked_indirect(x_ptr, index_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at)
    x = tl.load(x_ptr + index, mask=index < n)
    tl.store(out_ptr + index, x, mask=index < n)


@triton.jit
def transposed(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + j * ROWS + i)
    tl.store(out_ptr + i * COLUMNS + j, x)


@triton.jit
def atomics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at, 1.0, mask=at < n)
    tl.atomic_add(out_ptr + at * 2, 1.0)
    tl.atomic_xchg(x_ptr, 1.0, mask=n > 1)
    tl.atomic_add(x_ptr, 1.0)


@triton.jit
def _loaded(x_ptr, at):
    return tl.load(x_ptr + at)


@triton.jit
def through_a_function(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = _loaded(x_ptr, at)
    tl.store(out_ptr + at, x)


@triton.jit
def by_use(source, rows, limit: tl.int64, value=1, BLOCK: tl.constexpr = 64):
    places = source + tl.program_id(0) * rows
    at = tl.arange(0, BLOCK)
    tl.store(places + at, at * value + limit)


@triton.autotune([triton.Config({"BLOCK": 256}, num_warps=2), triton.Config({"BLOCK": 512})], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned(x_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if EVEN:
        tl.store(x_ptr + at, 0.0)
    else:
        tl.store(x_ptr + at, 0.0, mask=at < n)


@triton.jit
def wrong_range(x_ptr):
    tl.store(x_ptr + tl.arange(0, 3), 0.0)


@triton.jit
def unsupported(x_ptr):
    tl.store(x_ptr, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [1.0], tl.float32, is_pure=True, pack=1))


BLOCK = 64  # not a kernel
