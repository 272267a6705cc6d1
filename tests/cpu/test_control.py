"""While loops, returns from inside a condition, and calls that are not inlined, against plain Python."""

import torch
import triton
import triton.language as tl

x = torch.arange(1, 65, dtype=torch.float32)


@triton.jit
def _leave_early(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if pid >= n:
        return
    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offsets)
    if pid == 2:
        tl.store(out_ptr + offsets, value)
        return
    tl.store(out_ptr + offsets, value * 2)


def test_a_return_from_inside_a_condition_ends_the_program():
    out = torch.full((96,), -1.0)
    _leave_early[(6,)](x, out, 4, BLOCK=16)
    expected = torch.full((96,), -1.0)
    expected[:64] = x * 2
    expected[32:48] = x[32:48]
    assert torch.equal(out, expected)


@triton.jit
def _swap_while(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + offsets), tl.load(x_ptr + BLOCK + offsets)
    k = 0
    while k < n:
        j = 0
        while j < k:
            a, b = b, a + 1
            j += 1
        k += 1
    tl.store(out_ptr + offsets, a)
    tl.store(out_ptr + BLOCK + offsets, b)


def test_nested_while_loops_exchange_the_tiles_they_carry():
    for n in (0, 1, 2, 5):
        a, b = x[:16], x[16:32]
        for k in range(n):
            for _ in range(k):
                a, b = b, a + 1
        out = torch.full((32,), -1.0)
        _swap_while[(1,)](x, out, n, BLOCK=16)
        assert torch.equal(out, torch.cat([a, b]))


@triton.jit
def _collatz(out_ptr, steps_ptr):
    value = tl.program_id(0).to(tl.int64) + 1
    steps = 0
    while value != 1 and steps < 1000:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out_ptr + tl.program_id(0), value)
    tl.store(steps_ptr + tl.program_id(0), steps)


def test_a_while_loop_of_scalars_runs_until_its_condition_fails():
    out, steps = torch.zeros(30, dtype=torch.int64), torch.full((30,), -1, dtype=torch.int32)
    _collatz[(30,)](out, steps)

    def expected(value):
        count = 0
        while value != 1:
            value = value // 2 if value % 2 == 0 else 3 * value + 1
            count += 1
        return count

    assert out.tolist() == [1] * 30
    assert steps.tolist() == [expected(k) for k in range(1, 31)]


@triton.jit(noinline=True)
def _mix(a, b):
    if a > 3:
        return a + b, a * b
    return a - b, b


@triton.jit(noinline=True)
def _mix_twice(a, b):
    s, t = _mix(a, b)
    return _mix(s, t)


@triton.jit
def _calls(out_ptr, n):
    pid = tl.program_id(0)
    u, v = _mix_twice(pid, n)
    w, _ = _mix(u, 1)
    tl.store(out_ptr + 3 * pid, u)
    tl.store(out_ptr + 3 * pid + 1, v)
    tl.store(out_ptr + 3 * pid + 2, w)


def test_functions_that_are_not_inlined_call_each_other_and_return_from_where_they_like():
    out = torch.zeros(24, dtype=torch.int32)
    _calls[(8,)](out, 5)

    def mix(a, b):
        return (a + b, a * b) if a > 3 else (a - b, b)

    expected = []
    for pid in range(8):
        u, v = mix(*mix(pid, 5))
        expected += [u, v, mix(u, 1)[0]]
    assert out.tolist() == expected


@triton.jit
def _piecewise(value, n):
    if n > 3:
        return value + 1
    if n < 0:
        return value
    return value * 2


@triton.jit
def _calls_with_tiles(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + offsets)
    for k in range(n):
        value = _piecewise(value, k - 2)
    tl.store(out_ptr + offsets, value)


def test_a_function_with_several_returns_takes_and_gives_back_tiles_inside_a_loop():
    out = torch.full((16,), -1.0)
    _calls_with_tiles[(1,)](x, out, 9, BLOCK=16)
    expected = x[:16].clone()
    for k in range(-2, 7):
        expected = expected + 1 if k > 3 else expected if k < 0 else expected * 2
    assert torch.equal(out, expected)


@triton.jit(noinline=True)
def _own_place(out_ptr, amount):
    at = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    tl.store(out_ptr + at, amount + at)


@triton.jit
def _call_for_effect(out_ptr):
    _own_place(out_ptr, 10)


def test_a_callee_knows_its_program_and_writes_memory():
    out = torch.zeros(24, dtype=torch.int32)
    _call_for_effect[(2, 3, 4)](out)
    assert torch.equal(out, torch.arange(10, 34, dtype=torch.int32))


@triton.jit(noinline=True)
def _increment(ptr):
    tl.store(ptr, tl.load(ptr) + 1)


@triton.jit
def _load_call_load(ptr, out_ptr):
    before = tl.load(ptr)
    _increment(ptr)
    tl.store(out_ptr, before)
    tl.store(out_ptr + 1, tl.load(ptr))


def test_loads_do_not_cross_a_call_that_writes():
    cell, out = torch.tensor([7], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    _load_call_load[(1,)](cell, out)
    assert out.tolist() == [7, 8]
