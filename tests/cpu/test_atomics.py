"""Atomic operations, on one thread and on several, against numpy."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from drawn_tiles import BF16, F16, F32, F64, INTS, UINTS, Element, as_tensor, as_values, assert_same, rounded, values
from hypothesis import given, settings
from hypothesis import strategies as st

INTEGERS = [torch.int32, torch.int64]
UFUNCS = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or,
          "xor": np.bitwise_xor}  # fmt: skip


@triton.jit
def _rmw(x_ptr, index_ptr, value_ptr, old_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < n
    place = x_ptr + tl.load(index_ptr + at, mask=mask, other=0)
    value = tl.load(value_ptr + at, mask=mask)
    if OP == "add":
        old = tl.atomic_add(place, value, mask=mask)
    elif OP == "max":
        old = tl.atomic_max(place, value, mask=mask)
    elif OP == "min":
        old = tl.atomic_min(place, value, mask=mask)
    elif OP == "and":
        old = tl.atomic_and(place, value, mask=mask, sem="relaxed")
    elif OP == "or":
        old = tl.atomic_or(place, value, mask=mask, sem="release")
    elif OP == "xor":
        old = tl.atomic_xor(place, value, mask=mask, scope="cta")
    else:
        old = tl.atomic_xchg(place, value, mask=mask, sem="acquire")
    tl.store(old_ptr + at, old, mask=mask)


@pytest.mark.parametrize("op", [*UFUNCS, "xchg"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 32))
@settings(max_examples=6, deadline=None)
def test_every_element_sees_what_the_ones_before_it_left(op, dtype, seed, n):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-100, 100, 7)).to(dtype)
    index = torch.from_numpy(rng.integers(0, 7, 32)).to(torch.int32)  # many times the same place
    value = torch.from_numpy(rng.integers(-100, 100, 32)).to(dtype)
    expected, expected_old = x.numpy().copy(), np.full(32, -7)
    for k in range(n):
        place = int(index[k])
        expected_old[k] = expected[place]
        new = value[k].item() if op == "xchg" else UFUNCS[op](expected[place], value[k].item())
        expected[place] = new
    old = torch.full((32,), -7, dtype=dtype)
    _rmw[(1,)](x, index, value, old, n, OP=op, BLOCK=32)
    assert np.array_equal(x.numpy(), expected)
    assert np.array_equal(old.numpy(), expected_old)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *(("add", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        *(("xchg", dtype) for dtype in (torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_floats_are_added_and_exchanged(op, dtype):
    x = torch.tensor([1.5, -2.0, 0.25], dtype=dtype)
    index = torch.tensor([0, 1, 0, 2], dtype=torch.int32)
    value = torch.tensor([1.0, 2.0, 4.0, -8.0], dtype=dtype)
    old = torch.zeros(4, dtype=dtype)
    _rmw[(1,)](x, index, value, old, 4, OP=op, BLOCK=4)
    if op == "add":
        assert x.tolist() == [6.5, 0.0, -7.75]
        assert old.tolist() == [1.5, -2.0, 2.5, 0.25]
    else:
        assert x.tolist() == [4.0, 2.0, -8.0]
        assert old.tolist() == [1.5, -2.0, 1.0, 0.25]


ELEMENTS = {
    **dict.fromkeys([*INTS[2:], *UINTS[2:]], (*UFUNCS, "xchg")),
    **dict.fromkeys([F16, BF16], ("add",)),
    **dict.fromkeys([F32, F64], ("add", "max", "min", "xchg")),
}


def combined(op: str, old, new, element: Element):
    """What is in memory after an operation; -0 is below +0."""
    if op == "xchg":
        return new
    if element.is_float and op != "add":
        return (max if op == "max" else min)(old, new, key=lambda x: (x, np.copysign(1.0, x)))
    result = UFUNCS[op](old, new)
    return rounded(result, element) if element.is_float else result


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 32))
@settings(max_examples=6, deadline=None)
@np.errstate(all="ignore")
def test_every_operation_on_every_type_with_limits_and_infinities(element, seed, n):
    rng = np.random.default_rng(seed)
    for op in ELEMENTS[element]:
        start, value = values(rng, element, 7), values(rng, element, 32)
        if op in ("max", "min") and element.is_float:
            start, value = np.where(np.isnan(start), 1.0, start), np.where(np.isnan(value), -1.0, value)
        index = rng.integers(0, 7, 32)
        memory, old = as_tensor(start, element), as_tensor(np.ones(32, dtype=element.numpy), element)
        _rmw[(1,)](memory, torch.from_numpy(index), as_tensor(value, element), old, n, OP=op, BLOCK=32)
        expected, expected_old = start.copy(), np.ones(32, dtype=element.numpy)
        for k, place in enumerate(index[:n]):
            expected_old[k] = expected[place]
            expected[place] = combined(op, expected[place], value[k], element)
        assert_same(as_values(memory, element), expected, f"{op} of {element}")
        if not (element.is_float and op in ("max", "min")):  # of which Triton makes two, one for either sign
            assert_same(as_values(old, element), expected_old, f"what was there before {op} of {element}")


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_floats_of_either_sign_are_compared_as_numbers(op, dtype):
    values = torch.tensor([-3.0, 2.5, -0.5, 7.0, -9.0, 0.0], dtype=dtype)
    x = torch.tensor([-1.0, 1.0], dtype=dtype)
    index = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0], dtype=torch.int32)
    old = torch.zeros(8, dtype=dtype)
    expected = [getattr(torch.cat([x[k : k + 1], values[k::2]]), op)().item() for k in (0, 1)]
    _rmw[(1,)](x, index, torch.cat([values, values[:2]]), old, 6, OP=op, BLOCK=8)
    assert x.tolist() == expected


@triton.jit
def _count(total_ptr, histogram_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(total_ptr, 1)
    tl.atomic_add(histogram_ptr + tl.arange(0, BLOCK), 0.5)


def test_nothing_is_lost_between_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        total, sums = torch.zeros(1, dtype=torch.int64), torch.zeros(16)
        _count[(20_000,)](total, sums, BLOCK=16)
    finally:
        torch.set_num_threads(threads)
    assert total.item() == 20_000
    assert sums.tolist() == [10_000.0] * 16


@triton.jit
def _under_a_lock(lock_ptr, data_ptr, BLOCK: tl.constexpr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    at = data_ptr + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def test_a_spin_lock_keeps_programs_apart():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        lock, data = torch.zeros(1, dtype=torch.int32), torch.zeros(64)
        _under_a_lock[(5_000,)](lock, data, BLOCK=64)
    finally:
        torch.set_num_threads(threads)
    assert lock.item() == 0
    assert data.tolist() == [5_000.0] * 64


@triton.jit
def _swap_if(x_ptr, compare_ptr, new_ptr, old_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    old = tl.atomic_cas(x_ptr + at, tl.load(compare_ptr + at), tl.load(new_ptr + at))
    tl.store(old_ptr + at, old)


@pytest.mark.parametrize(
    "dtype",
    [torch.int16, torch.int32, torch.int64, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32,
     torch.float64],
    ids=str,
)  # fmt: skip
def test_compare_and_swap_of_a_tile(dtype):
    x = torch.tensor([1, 2, 3, 4]).to(dtype)
    old = torch.zeros(4, dtype=dtype)
    _swap_if[(1,)](x, torch.tensor([1, 0, 3, 0]).to(dtype), torch.tensor([9, 9, 9, 9]).to(dtype), old, BLOCK=4)
    assert x.tolist() == [9, 2, 9, 4]
    assert old.tolist() == [1, 2, 3, 4]


@triton.jit
def _load_add_load(x_ptr, out_ptr):
    before = tl.load(x_ptr)
    tl.atomic_add(x_ptr, 5)
    after = tl.load(x_ptr)
    tl.store(out_ptr, before)
    tl.store(out_ptr + 1, after)


def test_loads_do_not_cross_an_atomic():
    x, out = torch.tensor([2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    _load_add_load[(1,)](x, out)
    assert out.tolist() == [2, 7]
