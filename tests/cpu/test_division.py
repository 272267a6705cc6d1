"""Integer division by zero is an exception where the quotient is used, and none where it is not."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_triton.cpu import work
from esper_triton.cpu.errors import IntegerDivisionByZero


@triton.jit
def divide(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = tl.load(x + offsets, mask=mask, other=0)
    b = tl.load(y + offsets, mask=mask, other=0)
    if OP == "div":
        result = a // b
    else:
        result = a % b
    tl.store(out + offsets, result, mask=mask)


@triton.jit
def chosen(x, y, choose, use, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    quotient = tl.load(x + offsets) // tl.load(y + offsets)
    result = tl.where(tl.load(choose + offsets), quotient * 2 + 1, offsets)
    tl.store(out + offsets, result, mask=tl.load(use + offsets))


@triton.jit
def masks_of_quotients(x, y, out, LIMIT: tl.constexpr, GUARD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    b = tl.load(y + offsets)
    small = tl.load(x + offsets) // b < LIMIT
    if GUARD == "and":
        small = (b != 0) & small
    if GUARD == "or":
        small = ((b == 0) | small) & (b != 0)
    tl.store(out + offsets, b, mask=small)


@triton.jit
def in_a_loop(x, y, out, n, steps, GUARD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(steps):
        b = tl.load(y + offsets, mask=offsets < n, other=0)
        quotient = tl.load(x + offsets, mask=offsets < n, other=0) // b
        if GUARD:
            quotient = tl.where(b == 0, 0, quotient)
        total += quotient
    if steps > 2:
        total = total * 2
    tl.store(out + offsets, total, mask=offsets < n)


@triton.jit
def in_a_while_loop(y, out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    steps = 0
    while steps < 3:
        total = tl.maximum(total, 100 % tl.load(y + offsets))
        steps += 1
    tl.store(out + offsets, total, mask=offsets < n)


@triton.jit
def reduced(y, out, GUARD: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.load(y + tl.arange(0, BLOCK))
    quotient = 100 // b
    if GUARD:
        quotient = tl.where(b == 0, 0, quotient)
    tl.store(out, tl.sum(quotient))


@triton.jit
def by_a_number(x, out, n, divisor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = offsets // divisor
    values = tl.load(x + row, mask=offsets < n, other=0)
    tl.store(out + offsets, values, mask=offsets < n)


@triton.jit
def numbers(out, a, b):
    tl.store(out + tl.program_id(0), (a + tl.program_id(0)) // b)


@triton.jit
def guarded_numbers(out, a, b):
    result = a
    if b != 0:
        result = a % b
    tl.store(out, result)


@triton.jit
def at_a_quotient(x, y, out, STORE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    index = offsets // tl.load(y + offsets)
    if STORE:
        tl.store(out + index, offsets)
    else:
        tl.store(out + offsets, tl.load(x + index))


@triton.jit
def moved(y, out, TRANSPOSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    quotient = 100 // tl.load(y + rows)
    tile = quotient[:, None] + columns[None, :]
    keep = (tl.load(y + rows) != 0)[:, None] & (columns >= 0)[None, :]
    if TRANSPOSE:
        tile, keep = tl.trans(tile), tl.trans(keep)
    tile, keep = tl.reshape(tile, (ROWS * COLUMNS,)), tl.reshape(keep, (ROWS * COLUMNS,))
    tl.store(out + tl.arange(0, ROWS * COLUMNS), tile, mask=keep)


@triton.jit
def paired(y, out, HALF: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    pair = tl.join(100 // tl.load(y + lanes), lanes)
    first, second = tl.split(pair)
    both = tl.cat(second, first if HALF == "both" else lanes, can_reorder=True)
    tl.store(out + tl.arange(0, 2 * BLOCK), both)


@triton.jit
def nested(x, y, out, outer, inner, divisor, parity, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    total = tl.zeros((BLOCK,), tl.int32)
    other = a // divisor
    k = 0
    while k < outer:
        for j in range(inner):
            if (j + k) % 2 == parity:
                total = total + other
            else:
                total = tl.where(lanes < 4, total, other)
                other = a // b + total * 3
        before = total
        total = other
        other = before
        k += 1
    if outer == 1:
        total = total * 2
    tl.store(out + lanes, total, mask=lanes < 6)


def nested_in_python(x, y, outer, inner, divisor, parity):
    """Elements 0 to 5 that `nested` stores, None for those that are not defined."""

    def each(function, *tiles):
        return [None if None in elements else function(*elements) for elements in zip(*tiles, strict=True)]

    def divide(p, q):
        return None if q == 0 else p // q

    total, other = [0] * len(x), each(divide, x, [divisor] * len(x))
    for k in range(outer):
        for j in range(inner):
            if (j + k) % 2 == parity:
                total = each(lambda p, q: p + q, total, other)
            else:
                total = total[:4] + other[4:]
                other = each(lambda p, q: p + q * 3, each(divide, x, y), total)
        total, other = other, total
    return [None if p is None else p * (2 if outer == 1 else 1) for p in total[:6]]


@triton.jit(noinline=True)
def quotient_of(a, b):
    return a // b


@triton.jit
def calls(y, out, size):
    for k in range(size):
        tl.store(out + k, quotient_of(k + 10, tl.load(y + k)))


def integers(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def line_of(function, text: str) -> int:
    return function.starting_line_number + next(k for k, at in enumerate(function.raw_src) if text in at)


@pytest.fixture(scope="module", autouse=True)
def _threads_for_any_work():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "THREAD_GRAIN", 1)
        yield


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8, torch.uint32])
@pytest.mark.parametrize(("op", "text"), [("div", "a // b"), ("mod", "a % b")])
def test_a_zero_divisor_whose_result_is_stored_names_line_and_program(op, text, dtype):
    x, y = torch.arange(100).to(dtype), torch.arange(1, 101).to(dtype)
    out = torch.zeros_like(x)
    divide[4,](x, y, out, 100, OP=op, BLOCK=32)  # beyond element 99 the divisors are zero
    expected = x.long() // y.long() if op == "div" else x.long() % y.long()
    assert torch.equal(out.long(), expected)
    y[70] = 0
    with pytest.raises(IntegerDivisionByZero, match="integer division by zero") as caught:
        divide[4,](x, y, out, 100, OP=op, BLOCK=32)
    assert isinstance(caught.value, ZeroDivisionError)
    assert caught.value.program == (2, 0, 0)
    assert (caught.value.file, caught.value.line) == (__file__, line_of(divide, text))


@settings(max_examples=60, deadline=None)  # the first call compiles
@given(data=st.data())
def test_it_is_an_exception_exactly_where_a_chosen_and_used_element_was_divided(data):
    size = 16
    y = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), dtype=torch.int32)
    likely = st.integers(0, 9).map(lambda n: n > data.draw(st.integers(0, 9), label="rare"))
    choose, use = (torch.tensor(data.draw(st.lists(likely, min_size=size, max_size=size))) for _ in range(2))
    x, out = torch.arange(40, 40 + size, dtype=torch.int32), torch.full((size,), -9, dtype=torch.int32)
    wrong = choose & use & (y == 0)
    if wrong.any():
        with pytest.raises(IntegerDivisionByZero):
            chosen[1,](x, y, choose, use, out, BLOCK=size)
    else:
        chosen[1,](x, y, choose, use, out, BLOCK=size)
        quotient = x // torch.where(y == 0, 1, y)
        expected = torch.where(choose, quotient * 2 + 1, torch.arange(size, dtype=torch.int32))
        assert torch.equal(out, torch.where(use, expected, -9))


@pytest.mark.parametrize("guard", ["and", "or", None])
def test_a_mask_may_be_made_of_quotients_that_something_else_decides(guard):
    x, y, out = torch.arange(8, dtype=torch.int32), integers(0, 1, 2, 0, 4, 1, 1, 2), torch.full((8,), -1).int()
    if guard is None:
        with pytest.raises(IntegerDivisionByZero):
            masks_of_quotients[1,](x, y, out, LIMIT=3, GUARD=guard, BLOCK=8)
    else:
        masks_of_quotients[1,](x, y, out, LIMIT=3, GUARD=guard, BLOCK=8)
        assert out.tolist() == [-1, 1, 2, -1, 4, -1, -1, -1]


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guard", [False, True])
def test_undefined_elements_are_followed_around_loops_and_through_branches(guard, steps):
    x, y, out = torch.arange(8, dtype=torch.int32) + 8, integers(1, 2, 3, 4, 5, 0, 0, 0), torch.full((8,), -1).int()
    in_a_loop[1,](x, y, out, 5, steps, GUARD=guard, BLOCK=8)
    factor = steps * 2 if steps > 2 else steps
    assert out.tolist() == [8 * factor, 4 * factor, 3 * factor, 2 * factor, 2 * factor, -1, -1, -1]
    if guard:
        in_a_loop[1,](x, y, out, 6, steps, GUARD=guard, BLOCK=8)
        assert out[5] == 0
    else:
        with pytest.raises(IntegerDivisionByZero) as caught:
            in_a_loop[1,](x, y, out, 6, steps, GUARD=guard, BLOCK=8)
        assert caught.value.line == line_of(in_a_loop, "// b")


def test_undefined_elements_are_followed_around_while_loops():
    y, out = integers(3, 7, 0, 9), torch.full((4,), -1).int()
    in_a_while_loop[1,](y, out, 2, BLOCK=4)
    assert out.tolist() == [1, 2, -1, -1]
    with pytest.raises(IntegerDivisionByZero):
        in_a_while_loop[1,](y, out, 3, BLOCK=4)


@settings(max_examples=60, deadline=None)  # the first call compiles
@given(
    x=st.lists(st.integers(1, 50), min_size=8, max_size=8),
    y=st.lists(st.integers(1, 4), min_size=8, max_size=8),
    zeros=st.sets(st.integers(0, 7), max_size=2),
    counts=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    divisor=st.integers(0, 3),
    parity=st.integers(0, 1),
)
def test_nested_loops_and_branches_know_which_elements_are_undefined(x, y, zeros, counts, divisor, parity):
    y = [0 if lane in zeros else value for lane, value in enumerate(y)]
    expected, out = nested_in_python(x, y, *counts, divisor, parity), torch.full((8,), -7).int()
    if None in expected:
        with pytest.raises(IntegerDivisionByZero):
            nested[1,](integers(*x), integers(*y), out, *counts, divisor, parity, BLOCK=8)
    else:
        nested[1,](integers(*x), integers(*y), out, *counts, divisor, parity, BLOCK=8)
        assert out.tolist() == [*expected, -7, -7]


def test_what_is_reduced_is_used_whole():
    y, out = integers(1, 2, 0, 4), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IntegerDivisionByZero):
        reduced[1,](y, out, GUARD=False, BLOCK=4)
    reduced[1,](y, out, GUARD=True, BLOCK=4)
    assert out.item() == 175


def test_a_tile_divided_by_one_number_is_checked_where_any_of_it_is_used(threads):
    x, out = torch.arange(8, dtype=torch.int32), torch.full((24,), -1).int()
    by_a_number[3,](x, out, 20, 3, BLOCK=8)
    assert out.tolist() == [k // 3 for k in range(20)] + [-1] * 4
    by_a_number[3,](x, out, 0, 0, BLOCK=8)
    with pytest.raises(IntegerDivisionByZero) as caught:
        by_a_number[1,](x, out, 1, 0, BLOCK=8)
    assert caught.value.line == line_of(by_a_number, "// divisor")


def test_numbers_are_checked_where_they_are_divided(threads):
    out = torch.zeros(4, dtype=torch.int32)
    numbers[4,](out, 20, 4)
    assert out.tolist() == [5, 5, 5, 5]
    with pytest.raises(IntegerDivisionByZero):
        numbers[4,](out, 20, 0)
    guarded_numbers[1,](out, 9, 0)
    assert out[0] == 9
    guarded_numbers[1,](out, 9, 4)
    assert out[0] == 1


@pytest.mark.parametrize("store", [False, True])
def test_memory_is_not_touched_at_a_quotient_by_zero(store):
    x, out = torch.arange(8, dtype=torch.int32) + 100, torch.full((8,), -1).int()
    with pytest.raises(IntegerDivisionByZero):
        at_a_quotient[1,](x, integers(1, 1, 1, 0, 1, 1, 1, 1), out, STORE=store, BLOCK=8)
    assert out.eq(-1).all()
    at_a_quotient[1,](x, integers(1, 1, 1, 1, 1, 1, 1, 1), out, STORE=store, BLOCK=8)
    assert torch.equal(out, torch.arange(8, dtype=torch.int32) + (0 if store else 100))


@pytest.mark.parametrize("transpose", [False, True])
def test_undefined_elements_move_with_the_tile(transpose):
    y, out = integers(1, 0, 4, 5), torch.full((32,), -1).int()
    moved[1,](y, out, TRANSPOSE=transpose, ROWS=4, COLUMNS=8)
    expected = torch.tensor([100, 0, 25, 20])[:, None] + torch.arange(8)
    expected[1] = -1
    expected = expected.T if transpose else expected
    assert out.tolist() == expected.flatten().tolist()


@pytest.mark.filterwarnings("ignore:tl.cat.can_reorder=True. is deprecated")  # from 3.9 on
@pytest.mark.parametrize("half", ["both", "defined"])
def test_undefined_elements_are_told_from_their_neighbours_when_tiles_are_joined_and_split(half):
    out = torch.full((16,), -1).int()
    paired[1,](torch.full((8,), 5).int(), out, HALF=half, BLOCK=8)
    assert sorted(out.tolist()) == sorted([*range(8), *([20] * 8 if half == "both" else range(8))])
    y = integers(1, 2, 0, 4, 5, 6, 7, 8)
    if half == "both":
        with pytest.raises(IntegerDivisionByZero):
            paired[1,](y, out, HALF=half, BLOCK=8)
    else:
        paired[1,](y, out, HALF=half, BLOCK=8)


def test_a_callee_that_divides_by_zero_ends_its_caller():
    out = torch.full((4,), -1).int()
    calls[1,](integers(1, 2, 3, 4), out, 4)
    assert out.tolist() == [10, 5, 4, 3]
    out.fill_(-1)
    with pytest.raises(IntegerDivisionByZero) as caught:
        calls[1,](integers(1, 2, 0, 4), out, 4)
    assert caught.value.line == line_of(quotient_of, "a // b")
    assert out.tolist() == [10, 5, -1, -1]
