"""`tl.atomic_load`, `tl.atomic_store` and `tl.atomic_poll`, which Triton has from 3.9 on."""

import time

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import RELEASE, known_if

from esper_triton.cpu import deadline
from esper_triton.cpu.errors import IntegerDivisionByZero, KernelTimeout, OutOfBounds

KNOWN = RELEASE >= (3, 9)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@triton.jit
def _copy(x, index, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    mask = at < n
    values = tl.atomic_load(x + tl.load(index + at), mask=mask)
    tl.atomic_store(out + at, values, mask=mask)
    tl.atomic_store(out + N, tl.atomic_load(x, sem="relaxed"), sem="relaxed")


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=str,
)
@given(size=st.sampled_from([1, 4, 64]), data=st.data())
@settings(max_examples=5, deadline=None)
def test_elements_are_loaded_and_stored_where_the_mask_is_on(dtype, size, data):
    n = data.draw(st.integers(0, size))
    x = torch.randint(-99, 99, (size,)).to(dtype)
    index = torch.randint(0, size, (size,), dtype=torch.int32)
    out = torch.full((size + 1,), -7).to(dtype)
    expected = torch.cat([x[index[:n].long()], torch.full((size - n,), -7).to(dtype), x[:1]])
    with known_if(KNOWN, "no attribute 'atomic_load'"):
        _copy[(1,)](x, index, out, n, N=size)
        assert torch.equal(out, expected)


@triton.jit
def _hand_on(flags, data, N: tl.constexpr):
    """Each program adds one to what the program before it has left, once it is told to."""
    program = tl.program_id(0)
    at = tl.arange(0, N)
    if program > 0:
        tl.atomic_poll(flags + program - 1, 1)
    tl.store(data + (program + 1) * N + at, tl.load(data + program * N + at) + 1)
    tl.atomic_store(flags + program, 1)


def test_a_program_waits_for_what_another_writes_before_its_flag(two_threads):
    programs = 2_000
    flags, data = torch.zeros(programs, dtype=torch.int32), torch.zeros(programs + 1, 8)
    with known_if(KNOWN, "no attribute 'atomic_poll'"):
        _hand_on[(programs,)](flags, data, N=8)
        assert torch.equal(data, torch.arange(programs + 1.0)[:, None].expand(-1, 8))
        assert flags.eq(1).all()


@triton.jit
def _expect(x, expected, out, limit, N: tl.constexpr):
    at = tl.arange(0, N)
    seen = tl.atomic_poll(x + at, tl.load(expected + at), timeout_ns=limit)
    tl.store(out + at, seen.to(tl.int8))
    one = tl.atomic_poll(x, tl.load(expected), sem="relaxed", timeout_ns=limit)
    tl.store(out + N, one.to(tl.int8))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("limit_ns", [0, 20_000_000])
@pytest.mark.parametrize("size", [1, 16])
def test_waiting_for_what_does_not_come_ends_with_its_limit(dtype, limit_ns, size):
    x = torch.arange(size).to(dtype)
    expected = torch.where(torch.arange(size) % 3 == 0, x + 1, x)
    out = torch.full((size + 1,), -1, dtype=torch.int8)
    with known_if(KNOWN, "no attribute 'atomic_poll'"):
        _expect.warmup(x, expected, out, limit_ns, N=size, grid=(1,))
        start = time.perf_counter()
        _expect[(1,)](x, expected, out, limit_ns, N=size)
        # One limit for the tile and one for the scalar, both of which have an element that does not come.
        assert time.perf_counter() - start >= 2 * limit_ns * 1e-9
        assert torch.equal(out[:size].bool(), x == expected)
        assert out.tolist()[size] == 0


@triton.jit
def _wait_for_nobody(x):
    tl.atomic_poll(x, 1)


def test_waiting_for_ever_ends_with_the_deadline_of_the_launch():
    x = torch.zeros(1, dtype=torch.int32)
    with known_if(KNOWN, "no attribute 'atomic_poll'"), deadline(0.05), pytest.raises(KernelTimeout):
        _wait_for_nobody[(1,)](x)


@triton.jit
def _beyond(x, out, n, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    if OP == "load":
        tl.store(out + at, tl.atomic_load(x + at, mask=at < n), mask=at < 1)
    elif OP == "store":
        tl.atomic_store(x + at, at, mask=at < n)
    else:
        tl.store(out + at, tl.atomic_poll(x + at, 0, timeout_ns=0).to(tl.int32), mask=at < n)


@pytest.mark.parametrize("operation", ["load", "store", "poll"])
def test_the_sanitizer_sees_accesses_out_of_bounds(operation):
    x, out = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with known_if(KNOWN, "no attribute 'atomic_"):
        if operation != "poll":  # which has no mask
            _beyond[(1,)](x, out, 8, N=16, OP=operation, sanitize="bounds")
        with pytest.raises(OutOfBounds):
            _beyond[(1,)](x, out, 9, N=16, OP=operation, sanitize="bounds")


@triton.jit
def _where_defined(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    divisor = tl.load(y + at)
    place, mask = 4 // divisor, divisor != 0
    if OP == "load":
        tl.store(out + at, tl.atomic_load(x + place, mask=mask))
    elif OP == "store":
        tl.atomic_store(out + at, place, mask=mask)
    else:
        tl.atomic_poll(x + place, 0, timeout_ns=0)


@pytest.mark.parametrize("operation", ["load", "store", "poll"])
def test_a_quotient_by_zero_may_stand_behind_a_mask(operation):
    x, y = torch.arange(8, dtype=torch.int32), torch.tensor([1, 0, 2, 4], dtype=torch.int32)
    out = torch.zeros(4, dtype=torch.int32)
    with known_if(KNOWN, "no attribute 'atomic_"):
        if operation == "poll":
            with pytest.raises(IntegerDivisionByZero):
                _where_defined[(1,)](x, y, out, N=4, OP=operation)
        else:
            _where_defined[(1,)](x, y, out, N=4, OP=operation)
            assert out.tolist() == [4, 0, 2, 1]
