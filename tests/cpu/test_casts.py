"""Conversions between types: 8-bit floats over all of their codes, roundings, integers. Expected values are torch's, or
the nearest of the representable numbers in float64."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from releases import RELEASE, known_if

FLOAT8 = {
    torch.float8_e4m3fn: (tl.float8e4nv, 448.0),
    torch.float8_e5m2: (tl.float8e5, 57344.0),
    torch.float8_e4m3fnuz: (tl.float8e4b8, 240.0),
    torch.float8_e5m2fnuz: (tl.float8e5b16, 57344.0),
}


@triton.jit
def convert(x, y, n, TO: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < n)
    tl.store(y + offsets, values.to(TO, fp_downcast_rounding=ROUNDING), mask=offsets < n)


def converted(x: torch.Tensor, type_: torch.dtype, to: tl.dtype, rounding: str | None = None) -> torch.Tensor:
    y = (
        torch.full((x.numel(),), 77, dtype=torch.uint8 if type_.itemsize == 1 else torch.int16).view(type_)
        if type_.itemsize < 4
        else torch.full((x.numel(),), 77, dtype=type_)
    )
    convert[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), TO=to, ROUNDING=rounding, BLOCK=256)
    return y


def codes(type_: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(type_)


def numbers(type_: torch.dtype) -> np.ndarray:
    """What the codes 0 to 127 mean, ascending, without what is no finite number."""
    values = codes(type_)[:128].float().numpy().astype(np.float64)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("source", FLOAT8)
@pytest.mark.parametrize(
    ("target", "to"), [(torch.float32, tl.float32), (torch.float16, tl.float16), (torch.float64, tl.float64)]
)
def test_every_code_of_an_eight_bit_float_is_widened_exactly(source, target, to):
    torch.testing.assert_close(
        converted(codes(source), target, to), codes(source).to(target), rtol=0, atol=0, equal_nan=True
    )


def interesting(type_: torch.dtype) -> torch.Tensor:
    """Representable numbers, the points half-way between them, the neighbours of both, and what is beyond them all."""
    known = numbers(type_)
    points = np.concatenate(
        [known, (known[1:] + known[:-1]) / 2, known[-1:] * 1.0625, known[-1:] * 1.07, [1e9, 1e-30, np.inf]]
    )
    points = points.astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return torch.from_numpy(np.concatenate([points, -points, [np.float32(np.nan)]]))


@pytest.mark.parametrize("target", FLOAT8)
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_eight_bit_floats_are_rounded_to_nearest_even_and_saturate(source, target):
    to, largest = FLOAT8[target]
    x = interesting(target).to(source)
    if source == torch.float64:
        # Just off the points half-way: through float32 these would be rounded twice.
        x = torch.cat([x, x * (1 + 2.0**-40), x * (1 - 2.0**-40)])
    got = converted(x, target, to).float().double()
    known = numbers(target)
    magnitude = np.minimum(np.abs(x.double().numpy()), largest)
    above = np.searchsorted(known, magnitude).clip(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    even = np.where(np.arange(len(known))[above] % 2 == 0, high, low)
    nearest = np.where(
        magnitude - low < high - magnitude, low, np.where(magnitude - low > high - magnitude, high, even)
    )
    expected = np.where(np.isnan(x.double().numpy()), np.nan, np.copysign(nearest, x.double().numpy()))
    np.testing.assert_array_equal(got.numpy(), expected)


def test_eight_bit_floats_keep_the_sign_of_zero_where_they_have_one():
    x = torch.tensor([0.0, -0.0, -1e-30])
    assert converted(x, torch.float8_e4m3fn, tl.float8e4nv).view(torch.uint8).tolist() == [0, 0x80, 0x80]
    assert converted(x, torch.float8_e4m3fnuz, tl.float8e4b8).view(torch.uint8).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("source", "target", "to"),
    [
        (torch.float32, torch.float16, tl.float16),
        (torch.float32, torch.bfloat16, tl.bfloat16),
        (torch.float64, torch.bfloat16, tl.bfloat16),
        (torch.float64, torch.float16, tl.float16),
        (torch.float64, torch.float32, tl.float32),
        (torch.float32, torch.float8_e5m2, tl.float8e5),
        (torch.float16, torch.float8_e5m2, tl.float8e5),
        (torch.float32, torch.float8_e4m3fn, tl.float8e4nv),
    ],
)  # fmt: skip
def test_rounding_towards_zero_never_goes_away_from_it(source, target, to, rng):
    scale = torch.randint(-30, 17, (4000,), generator=rng).double().exp2()
    x = torch.cat([torch.randn(4000, generator=rng).double() * scale, interesting(torch.float8_e5m2).double()])
    x = x[x.isfinite()].to(source)
    x = x[x.isfinite()]
    got = converted(x, target, to, "rtz").double()
    nearest = x.double().clamp(-57344, 57344).to(target).double()
    assert (got.abs() <= x.double().abs()).all()
    assert ((got == 0) | (got.sign() == x.sign())).all()
    # And it is the last number before: what is nearest is that one, or the next one after it.
    inward = nearest.abs() <= x.double().abs()
    regular = x.double().abs() < (400 if target == torch.float8_e4m3fn else 50000)
    assert torch.equal(got[inward & regular], nearest[inward & regular])
    further = ~inward & regular
    bits = torch.int8 if target.itemsize == 1 else torch.int16 if target.itemsize == 2 else torch.int32
    outer = x[further].double().to(target).view(bits)
    assert torch.equal(got[further], (outer - 1).view(target).double())


@triton.jit
def fp8_arithmetic(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(
        out + i,
        tl.where(a < b, a, b).to(tl.float32) + (a.to(tl.float32) * b.to(tl.float32)).to(tl.float8e4nv).to(tl.float32),
    )
    tl.store(out + BLOCK + i, tl.zeros((BLOCK,), tl.float8e5).to(tl.float32))


def test_eight_bit_floats_are_compared_and_selected(rng):
    x, y = (torch.randn(128, generator=rng).to(torch.float8_e4m3fn) for _ in range(2))
    out = torch.full((256,), float("nan"))
    fp8_arithmetic[1,](x, y, out, BLOCK=128)
    a, b = x.float(), y.float()
    assert torch.equal(out[:128], torch.minimum(a, b) + (a * b).to(torch.float8_e4m3fn).float())
    assert torch.equal(out[128:], torch.zeros(128))


@triton.jit
def fp8_constants(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.full((BLOCK,), 1.5, tl.float8e4nv).to(tl.float32))


def test_a_number_becomes_a_constant_of_eight_bits():
    out = torch.full((16,), float("nan"))
    with known_if(RELEASE >= (3, 7), "no attribute 'get_fp8e4nv'"):
        fp8_constants[1,](out, BLOCK=16)
        assert out.tolist() == [1.5] * 16


@pytest.mark.parametrize("source", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize(("target", "to"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)])
def test_integers_become_small_floats_with_one_rounding(source, target, to):
    limit = 255 if source.itemsize == 1 else 32767
    x = torch.arange(-limit, limit, 7).to(source)
    torch.testing.assert_close(converted(x, target, to).double(), x.double().to(target).double(), rtol=0, atol=0)


@triton.jit
def negate_and_limit(x, negated, limited, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(negated + i, -values)
    tl.store(limited + i, tl.maximum(tl.minimum(values, tl.abs(values)), values))


@pytest.mark.parametrize("type_", FLOAT8)
def test_eight_bit_floats_are_taken_from_zero_and_chosen_from_infinities_included(type_):
    x, negated, limited = codes(type_), torch.zeros(256, dtype=type_), torch.zeros(256, dtype=type_)
    negate_and_limit[1,](x, negated, limited, BLOCK=256)
    saturated = x.float().clamp(-FLOAT8[type_][1], FLOAT8[type_][1])
    expected = -x.float() if RELEASE >= (3, 8) else 0 - saturated  # before 3.8 a subtraction, which saturates
    torch.testing.assert_close(negated.float(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(limited.float(), x.float(), rtol=0, atol=0, equal_nan=True)
