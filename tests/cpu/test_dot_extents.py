"""Products whose tiles masks cut: what does not count is left out, and what counts for anything at all is not."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st


@triton.jit
def _cut(
    a_ptr, b_ptr, out_ptr, second_ptr, bounds_ptr, depth, left, right, rows, cols, more_cols, start_value,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, A_OTHER: tl.constexpr, B_OTHER: tl.constexpr,
    TURN_A: tl.constexpr, TURN_B: tl.constexpr, WAY: tl.constexpr,
):  # fmt: skip
    """Steps of K beyond `left` are `A_OTHER` in the one operand, those beyond `right` `B_OTHER` in the other."""
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    c = tl.zeros((BM, BN), tl.float32) + start_value
    before = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        if TURN_A:
            a = tl.load(
                a_ptr + m[None, :] * depth + start + k[:, None], mask=k[:, None] < left - start, other=A_OTHER
            ).T
        else:
            a = tl.load(a_ptr + m[:, None] * depth + start + k[None, :], mask=k[None, :] < left - start, other=A_OTHER)
        if TURN_B:
            b = tl.load(b_ptr + (start + k[None, :]) * BN + n[:, None], mask=start + k[None, :] < right, other=B_OTHER)
            b = b.T
        else:
            b = tl.load(b_ptr + (start + k[:, None]) * BN + n[None, :], mask=start + k[:, None] < right, other=B_OTHER)
        before = c
        c = tl.dot(a, b, c)
        if WAY == "halved in the loop":
            c = c * 0.5
    place = m[:, None] * BN + n[None, :]
    inside = (m[:, None] < rows) & (n[None, :] < cols)
    if WAY == "with the sum before":
        tl.store(out_ptr + place, c + before, mask=inside)
    elif WAY == "unmasked":
        tl.store(out_ptr + place, c)
    elif WAY == "rows only":
        tl.store(out_ptr + place, c, mask=m[:, None] < rows)
    elif WAY == "either":
        tl.store(out_ptr + place, c, mask=(m[:, None] < rows) | (n[None, :] < cols))
    elif WAY == "all but the first":
        tl.store(out_ptr + place, c, mask=(m[:, None] < rows) & (n[None, :] >= cols))
    elif WAY == "element-wise":
        tl.store(out_ptr + place, tl.where(c > 0, c, c * 0.25).to(tl.float16).to(tl.float32), mask=inside)
    elif WAY == "stored again":
        tl.store(out_ptr + place, c, mask=inside)
        tl.store(second_ptr + place, c, mask=(m[:, None] < rows) & (n[None, :] < more_cols))
    elif WAY == "summed":
        tl.store(out_ptr + place, c, mask=inside)
        tl.store(second_ptr + place, tl.broadcast_to(tl.sum(c, 1)[:, None], (BM, BN)))
    elif WAY == "turned":
        tl.store(out_ptr + n[:, None] * BM + m[None, :], c.T, mask=(n[:, None] < cols) & (m[None, :] < rows))
    elif WAY == "multiplied again":
        tl.store(out_ptr + place, tl.dot(c, tl.full((BN, BN), 1.0, tl.float32)), mask=inside)
    elif WAY == "multiplied again, rows only":
        tl.store(out_ptr + place, tl.dot(c, tl.full((BN, BN), 1.0, tl.float32)), mask=m[:, None] < rows)
    elif WAY == "multiplied from the left":
        tl.store(out_ptr + place, tl.dot(tl.full((BM, BM), 1.0, tl.float32), c), mask=inside)
    elif WAY == "beside its sums":
        tl.store(out_ptr + place, c - tl.sum(c, 1)[:, None] + tl.sum(c, 0)[None, :], mask=inside)
    elif WAY == "beside the sum of all":
        tl.store(out_ptr + place, c, mask=inside)
        tl.store(second_ptr, tl.sum(tl.reshape(c, [BM * BN]), 0))
    elif WAY == "chosen by its largest":
        tl.store(out_ptr + place, tl.where(tl.max(c, 1)[:, None] > 0, c, 0.0), mask=m[:, None] < rows)
    elif WAY == "in a branch":
        if rows > 3:
            tl.store(out_ptr + place, c, mask=inside)
    elif WAY == "bounds that come late":
        rows, cols = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
        tl.store(out_ptr + place, c, mask=(m[:, None] < rows) & (n[None, :] < cols))
    else:
        tl.store(out_ptr + place, c, mask=inside)


WAYS = [
    "plain", "halved in the loop", "with the sum before", "unmasked", "rows only", "either", "all but the first",
    "element-wise", "stored again", "summed", "turned", "multiplied again", "multiplied again, rows only",
    "multiplied from the left", "beside its sums", "beside the sum of all",
    "chosen by its largest", "in a branch", "bounds that come late",
]  # fmt: skip
INFINITE = float("inf")
OTHERS = [(0.0, 0.0), (0.0, 0.0), (0.0, -0.0), (1.5, 0.0), (0.0, INFINITE), (1.0, 1.0)]


def _expected(way, a, b, bk, start_value, rows, cols, more_cols):
    """What the kernel leaves of two tensors of 77s."""
    bm, bn = a.shape[0], b.shape[1]
    c = torch.full((bm, bn), start_value, dtype=torch.float64)
    for x, y in zip(a.split(bk, 1), b.split(bk, 0), strict=True):
        before, c = c, c + x @ y
        if way == "halved in the loop":
            c = c * 0.5
    row, col = torch.arange(bm)[:, None] < rows, torch.arange(bn)[None, :] < cols
    mask, second = row & col, torch.full((bm, bn), 77.0, dtype=torch.float64)
    match way:
        case "with the sum before":
            c = c + before
        case "unmasked":
            mask = torch.ones(bm, bn, dtype=torch.bool)
        case "rows only":
            mask = row.expand(bm, bn)
        case "either":
            mask = row | col
        case "all but the first":
            mask = row & ~col
        case "element-wise":
            c = torch.where(c > 0, c, c * 0.25)
        case "stored again":
            second = torch.where(row & (torch.arange(bn)[None, :] < more_cols), c, second)
        case "summed":
            second = c.sum(1, keepdim=True).expand(bm, bn)
        case "turned":
            out = torch.full((bn, bm), 77.0, dtype=torch.float64)
            return torch.where(mask.T, c.T, out).reshape(bm, bn), second
        case "multiplied again":
            c = c.sum(1, keepdim=True).expand(bm, bn)
        case "multiplied again, rows only":
            c, mask = c.sum(1, keepdim=True).expand(bm, bn), row.expand(bm, bn)
        case "multiplied from the left":
            c = c.sum(0, keepdim=True).expand(bm, bn)
        case "beside its sums":
            c = c - c.sum(1, keepdim=True) + c.sum(0, keepdim=True)
        case "beside the sum of all":
            second[0, 0] = c.sum()
        case "chosen by its largest":
            c, mask = torch.where(c.amax(1, keepdim=True) > 0, c, 0.0), row.expand(bm, bn)
        case "in a branch" if rows <= 3:
            mask = torch.zeros_like(mask)
    return torch.where(mask, c, 77.0), second


@pytest.mark.parametrize("way", WAYS)
@given(
    blocks=st.tuples(st.sampled_from([1, 16, 64]), st.sampled_from([8, 64]), st.sampled_from([1, 2, 16, 32])),
    steps=st.integers(1, 3), others=st.sampled_from(OTHERS), beyond=st.sampled_from([2.0, INFINITE]),
    turned=st.tuples(st.booleans(), st.booleans()), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_product_is_what_it_would_be_of_whole_tiles(way, blocks, steps, others, beyond, turned, dtype, data):
    bm, bn, bk = blocks
    depth = bk * steps
    limits = {"left": depth, "right": depth, "rows": bm, "cols": bn, "more_cols": bn}
    drawn = {name: data.draw(st.integers(-2, limit + 2), name) for name, limit in limits.items()}
    generator = torch.Generator().manual_seed(depth)
    a, b = (torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((bm, depth), (depth, bn)))
    left, right = max(drawn["left"], 0), max(drawn["right"], 0)
    a[:, left:], b[right:] = float("nan"), float("nan")  # beyond a mask, where it must not be read
    a[:, right:left], b[left:right] = beyond, beyond  # which the other's zeros do not make zero if it is infinite
    masked = torch.arange(depth)
    x = torch.where(masked[None, :] < left, a.double(), others[0])
    y = torch.where(masked[:, None] < right, b.double(), others[1])
    first = _expected(way, x, y, bk, 1.0, drawn["rows"], drawn["cols"], drawn["more_cols"])
    out, second = torch.full((bm, bn), 77.0), torch.full((bm, bn), 77.0)
    bounds = torch.tensor([drawn["rows"], drawn["cols"]], dtype=torch.int32)
    _cut[(1,)](a, b, out, second, bounds, depth, *drawn.values(), 1.0, bm, bn, bk, *others, *turned, way)
    # Sums of small whole numbers and halves are exact, but for the rounding to float16.
    tolerance = {"rtol": 2**-11, "atol": 0} if way == "element-wise" else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(out.double(), first[0], equal_nan=True, **tolerance)
    torch.testing.assert_close(second.double(), first[1], equal_nan=True, rtol=1e-6, atol=0)


@triton.jit
def _from(start_value, a_ptr, b_ptr, out_ptr, left, right, BK: tl.constexpr):
    m, k = tl.arange(0, 16), tl.arange(0, BK)
    a = tl.load(a_ptr + m[:, None] * BK + k[None, :], mask=k[None, :] < left, other=0.0)
    b = tl.load(b_ptr + k[:, None] * 16 + m[None, :], mask=k[:, None] < right, other=0.0)
    tl.store(out_ptr + m[:, None] * 16 + m[None, :], tl.dot(a, b, tl.full((16, 16), start_value, tl.float32)))


@given(depth=st.sampled_from([2, 4, 16]), data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_zeros_that_are_left_out_have_made_minus_zero_positive(depth, data):
    left, right = (data.draw(st.integers(0, depth)) for _ in range(2))
    a, b, out = torch.zeros(16, depth), torch.full((depth, 16), -1.0), torch.full((16, 16), 77.0)
    _from[(1,)](-0.0, a, b, out, left, right, depth)
    # -0 + 0 * -1 is -0, and -0 + 0 * 0 is 0; of `b` there are zeros only beyond its mask.
    assert torch.equal(out, torch.zeros(16, 16))
    assert torch.equal(out.signbit(), torch.full((16, 16), right >= depth))


@triton.jit
def _cut_batches(a_ptr, b_ptr, out_ptr, left, right, rows, cols, B: tl.constexpr, S: tl.constexpr):
    i, m, n = tl.arange(0, B)[:, None, None], tl.arange(0, S)[None, :, None], tl.arange(0, S)[None, None, :]
    a = tl.load(a_ptr + i * S * S + m * S + n, mask=n < left)
    b = tl.load(b_ptr + i * S * S + m * S + n, mask=m < right)
    c = tl.dot(a, b.to(tl.float16), out_dtype=tl.float32)
    tl.store(out_ptr + i * S * S + m * S + n, c, mask=(m < rows) & (n < cols))


@given(batches=st.sampled_from([1, 2]), size=st.sampled_from([8, 32, 64]), data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_batches_of_products_are_cut_along_their_last_axes(batches, size, data):
    left, right, rows, cols = (data.draw(st.integers(0, size + 1), name) for name in ("left", "right", "rows", "cols"))
    generator = torch.Generator().manual_seed(size)
    a = torch.randint(-3, 4, (batches, size, size), generator=generator).half()
    b = torch.randint(-3, 4, (batches, size, size), generator=generator, dtype=torch.int8)
    a[:, :, left:] = float("nan")
    out = torch.full((batches, size, size), 77.0)
    _cut_batches[(1,)](a, b, out, left, right, rows, cols, batches, size)
    depth, expected = min(left, right), torch.full((batches, size, size), 77.0)
    expected[:, :rows, :cols] = (a[:, :, :depth].float() @ b[:, :depth].float())[:, :rows, :cols]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("special", [INFINITE, float("nan")])
@pytest.mark.parametrize("bounds", [(4, 9), (9, 4), (0, 16), (16, 0)], ids=str)
def test_zeros_of_one_operand_meet_what_the_other_holds(bounds, special):
    left, right = bounds
    a, b, out = torch.ones(16, 16), torch.ones(16, 16), torch.full((16, 16), 77.0)
    a[3, left - 1 if left > right else 0] = special
    b[right - 1 if right > left else 0, 5] = special
    _from[(1,)](1.0, a, b, out, left, right, 16)
    k = torch.arange(16)
    x, y = torch.where(k[None, :] < left, a.double(), 0.0), torch.where(k[:, None] < right, b.double(), 0.0)
    torch.testing.assert_close(out.double(), 1 + x @ y, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().any()  # zero times what is infinite


@triton.jit
def _wide(a_ptr, b_ptr, out_ptr, first, bound, depth, UP_TO: tl.constexpr):
    """Rows and steps of which 64-bit indices say whether they count."""
    m, n = tl.arange(0, 32), tl.arange(0, 16)
    row = first + m.to(tl.int64)
    row_ok = (row <= bound if UP_TO else row < bound)[:, None]
    k_ok = (n.to(tl.int64) < depth)[None, :]
    a = tl.load(a_ptr + m[:, None] * 16 + n[None, :], mask=row_ok & k_ok, other=0.0)
    b = tl.load(b_ptr + n[:, None] * 16 + n[None, :])
    b = tl.where(tl.trans(k_ok), b * 1.0, 0.0)
    tl.store(out_ptr + m[:, None] * 16 + n[None, :], tl.dot(a, b), mask=row_ok)


_EDGES = st.sampled_from([-(2**63), -(2**63) + 3, -(2**31), -5, 0, 7, 2**31, 2**63 - 17, 2**63 - 1])


@given(first=_EDGES, beyond=st.integers(-3, 40), other=_EDGES, far=st.booleans(), up_to=st.booleans(),
       depth=st.sampled_from([-(2**63), -1, 0, 5, 16, 2**63 - 1]))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_64_bit_indices_count_rows_and_steps_also_where_they_wrap_around(first, beyond, other, far, up_to, depth):
    bound = other if far else min(max(first + beyond, -(2**63)), 2**63 - 1)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-3, 4, (rows, 16), generator=generator).float() for rows in (32, 16))
    a[:, max(depth, 0) :] = float("nan")  # beyond the mask
    out = torch.full((32, 16), 77.0)
    _wide[(1,)](a, b, out, first, bound, depth, up_to)
    rows = [(first + k + 2**63) % 2**64 - 2**63 for k in range(32)]
    inside = torch.tensor([row <= bound if up_to else row < bound for row in rows])[:, None]
    steps = min(max(depth, 0), 16)
    assert torch.equal(out, torch.where(inside, a[:, :steps] @ b[:steps], 77.0))
