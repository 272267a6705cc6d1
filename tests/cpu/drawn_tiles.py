"""Types of elements, values of them, and tiles of memory with any strides: what tests of all operations draw from.

Values are numpy arrays of the type itself where it is an integer, of 0 and 1 in uint8 where it is a bool, and of
float64 where it is a float: every float type's numbers are float64's as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import triton.language as tl
from hypothesis import strategies as st


@dataclass(frozen=True)
class Element:
    """A type.

    Attributes:
        kind: "bool", "uint", "int", "float", or "fp8". mantissa: bits behind the point.
        least: exponent of the smallest normal number. largest: finite number.
    """

    kind: str
    bits: int
    torch: torch.dtype
    triton: tl.dtype
    mantissa: int = 0
    least: int = 0
    largest: float = 0.0

    @property
    def is_float(self) -> bool:
        return self.kind in ("float", "fp8")

    @property
    def numpy(self) -> type:
        if self.is_float:
            return np.float64
        return np.uint8 if self.kind == "bool" else getattr(np, f"{self.kind}{self.bits}")

    def __str__(self) -> str:
        return str(self.triton)


BOOL = Element("bool", 1, torch.bool, tl.int1)
INTS = [Element("int", n, getattr(torch, f"int{n}"), getattr(tl, f"int{n}")) for n in (8, 16, 32, 64)]
UINTS = [Element("uint", n, getattr(torch, f"uint{n}"), getattr(tl, f"uint{n}")) for n in (8, 16, 32, 64)]
F16 = Element("float", 16, torch.float16, tl.float16, 10, -14, 65504.0)
BF16 = Element("float", 16, torch.bfloat16, tl.bfloat16, 7, -126, (2 - 2.0**-7) * 2.0**127)
F32 = Element("float", 32, torch.float32, tl.float32, 23, -126, (2 - 2.0**-23) * 2.0**127)
F64 = Element("float", 64, torch.float64, tl.float64, 52, -1022, (2 - 2.0**-52) * 2.0**1023)
E4M3 = Element("fp8", 8, torch.float8_e4m3fn, tl.float8e4nv, 3, -6, 448.0)
E5M2 = Element("fp8", 8, torch.float8_e5m2, tl.float8e5, 2, -14, 57344.0)
INTEGERS = [BOOL, *INTS, *UINTS]
FLOATS = [F16, BF16, F32, F64]
ELEMENTS = [*INTEGERS, *FLOATS, E4M3, E5M2]


def rounded(x: np.ndarray, to: Element) -> np.ndarray:
    """float64 rounded to a float type, to nearest even; what is too large for eight bits becomes the largest number."""
    if to is F64:
        return x
    unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, to.least) - to.mantissa)
    finite = np.isfinite(x)
    return _limited(np.where(finite, np.round(np.where(finite, x, 0) / unit) * unit, x), to)


def truncated(x: np.ndarray, to: Element) -> np.ndarray:
    """float64 rounded to a float type towards zero: from a finite number never to infinity."""
    unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, to.least) - to.mantissa)
    finite = np.isfinite(x)
    inside = np.clip(np.trunc(np.where(finite, x, 0) / unit) * unit, -to.largest, to.largest)
    return _limited(np.where(finite, np.copysign(inside, x), x), to)


def rounded_exactly(x: Fraction, to: Element) -> float:
    """A number that float64 may not hold, rounded to a float type, to nearest even. Zero is positive."""
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, to.least) - to.mantissa)
    nearest = round(x / unit) * unit
    beyond = abs(nearest) > Fraction(to.largest)
    magnitude = (to.largest if to.kind == "fp8" else np.inf) if beyond else float(abs(nearest))
    return magnitude if x > 0 else -magnitude


def _limited(x: np.ndarray, to: Element) -> np.ndarray:
    beyond = np.abs(x) > to.largest
    return np.where(beyond, np.copysign(to.largest if to.kind == "fp8" else np.inf, x), x)


def converted(x: np.ndarray, source: Element, to: Element) -> np.ndarray:
    """Values of one type as another: floats rounded once, integers wrapped; from float to integer towards zero, to the
    nearest integer there is, and 0 from NaN; to bool whether they are not zero."""
    if source == to:
        return x
    if to.kind == "bool":
        return (x != 0).astype(np.uint8)
    if to.is_float:
        if source.is_float:
            return rounded(x, to)
        return np.array([rounded_exactly(Fraction(int(n)), to) for n in x.flat]).reshape(x.shape)
    if not source.is_float:
        return x.astype(to.numpy)
    limits = np.iinfo(to.numpy)
    numbers = x.ravel().tolist()  # Python compares floats and integers exactly
    whole = [
        0 if n != n else limits.max if n > limits.max else limits.min if n < limits.min else int(n) for n in numbers
    ]
    return np.array(whole, dtype=to.numpy).reshape(x.shape)


def wrapped(numbers: list[int], to: Element, shape: tuple[int, ...]) -> np.ndarray:
    """Integers of any size as values of an integer type."""
    unsigned = np.array([n % 2**to.bits for n in numbers], dtype=np.uint64)
    return unsigned.astype(to.numpy).reshape(shape)


def as_tensor(x: np.ndarray, element: Element) -> torch.Tensor:
    """Values, which the type has, as a tensor with memory of its own."""
    tensor = torch.from_numpy(np.array(x, order="C"))
    return tensor.to(element.torch) if element.is_float or element.kind == "bool" else tensor


def as_values(x: torch.Tensor, element: Element) -> np.ndarray:
    """A tensor's values."""
    if element.is_float:
        return x.double().numpy() if element.kind == "float" else x.float().double().numpy()
    return x.numpy().astype(element.numpy)


def values(rng: np.random.Generator, element: Element, size: int) -> np.ndarray:
    """Values of a type: any bits, limits and other special ones, and ordinary ones, about as many of each."""
    if element.kind == "bool":
        return rng.integers(0, 2, size, dtype=np.uint8)
    anything = torch.from_numpy(rng.integers(0, 256, size * element.bits // 8, dtype=np.uint8)).view(element.torch)
    if element.is_float:
        tiny, eps = 2.0**element.least, 2.0**-element.mantissa
        special = np.array([0, -0.0, 1, -1, tiny, -tiny, tiny * eps, -tiny * eps, 1 + eps, 1 - eps, element.largest,
                            -element.largest, np.nan] + ([] if element is E4M3 else [np.inf, -np.inf]))  # fmt: skip
        special = rounded(special, element) if element is not E5M2 else special
        ordinary = rounded(rng.standard_normal(size) * np.exp2(rng.integers(-2, 4, size)), element)
    else:
        limits = np.iinfo(element.numpy)
        special = [0, 1, 2, limits.max, limits.max - 1, limits.min, limits.min + 1, limits.max // 2]
        special = np.array([*special, *([] if limits.min == 0 else [-1, -2])], dtype=element.numpy)
        ordinary = rng.integers(max(limits.min, -12), 13, size).astype(element.numpy)
    which = rng.integers(0, 3, size)
    return np.select([which == 0, which == 1], [as_values(anything, element), rng.choice(special, size)], ordinary)


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tile of (rows, columns) lie.

    Attributes:
        start: of element (0, 0). strides: in elements, of rows and of columns. size: of the memory.
    """

    shape: tuple[int, int]
    strides: tuple[int, int]

    @property
    def start(self) -> int:
        return sum(
            -stride * (extent - 1) for stride, extent in zip(self.strides, self.shape, strict=True) if stride < 0
        )

    @property
    def size(self) -> int:
        return 1 + sum(abs(stride) * (extent - 1) for stride, extent in zip(self.strides, self.shape, strict=True))

    @property
    def index(self) -> np.ndarray:
        (rows, columns), (row, column) = self.shape, self.strides
        return self.start + row * np.arange(rows)[:, None] + column * np.arange(columns)[None, :]


def shapes() -> st.SearchStrategy[tuple[int, int]]:
    """(rows, columns), powers of two; 0 rows for a tile of one dimension, 0 columns as well for a number."""
    tiles = st.tuples(st.sampled_from([0, 0, 1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
    return st.one_of(tiles, tiles, tiles, st.just((0, 0)))


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int], *, apart: bool = False) -> Layout:
    """Rows or columns that are contiguous, padded, backwards, or transposed; unless `apart`, repeated as well."""
    rows, columns = max(shape[0], 1), max(shape[1], 1)
    sign = st.sampled_from([1, 1, -1])
    step, padding = draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.sampled_from([0, 0, 1, 5]))
    if draw(st.sampled_from([True, True, False])):
        strides = columns * step + padding, step
    else:
        strides = step, rows * step + padding
    strides = strides[0] * draw(sign), strides[1] * draw(sign)
    if not apart:
        strides = tuple(0 if draw(st.sampled_from([False] * 5 + [True])) else stride for stride in strides)
    return Layout((rows, columns), strides)


def assert_same(got: np.ndarray, expected: np.ndarray, of: str) -> None:
    """Every number the same, zeros with their sign, NaN where NaN is expected."""
    same = got == expected
    if got.dtype == np.float64:
        same = np.where(expected == 0, same & (np.signbit(got) == np.signbit(expected)), same)
        same |= np.isnan(got) & np.isnan(expected)
    if not same.all():
        at = tuple(int(n) for n in np.argwhere(~same)[0])
        raise AssertionError(f"{of}: {got[at]!r} instead of {expected[at]!r} at {at}; {np.sum(~same)} of {same.size}")
