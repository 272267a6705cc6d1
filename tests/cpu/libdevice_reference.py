"""What libdevice's functions are to give: exact integers and rationals, and mpmath at 250 bits where there is neither.

`EXPECTED[name]` takes Python numbers that the argument types hold exactly. A rational or an mpf is still to be rounded.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np

PRECISION = 250  # bits

Number = Any


def exactly(value: Number) -> Fraction:
    """A finite float, integer or mpf as a rational."""
    if isinstance(value, mpmath.mpf):
        sign, mantissa, exponent, _ = value._mpf_
        return (-1) ** sign * Fraction(int(mantissa)) * Fraction(2) ** exponent
    return Fraction(value)


def rounded(value: Fraction, mode: str, target: type[np.floating]) -> np.floating:
    """A rational that is not 0 as a float of type `target`, rounded to nearest even (rn), to zero, down or up."""
    largest = Fraction(float(np.finfo(target).max))
    with np.errstate(all="ignore"):
        guess = target(float(min(max(value, -largest), largest)))
        while Fraction(float(guess)) > value and guess != -np.finfo(target).max:
            guess = np.nextafter(guess, target(-np.inf))
        below = target(-np.inf) if Fraction(float(guess)) > value else guess
        if below == value:
            return below
        above = np.nextafter(below, target(np.inf))
        if mode in ("rd", "ru"):
            result = below if mode == "rd" else above
        elif mode == "rz":
            result = below if value > 0 else above
        elif np.isinf(below) or np.isinf(above):
            step = largest - Fraction(float(np.nextafter(np.finfo(target).max, target(0))))
            inner, outer = (above, below) if np.isinf(below) else (below, above)
            result = outer if abs(value) >= largest + step / 2 else inner
        else:
            middle = (Fraction(float(below)) + Fraction(float(above))) / 2
            even = below if int(below.view(f"u{below.nbytes}")) % 2 == 0 else above
            result = even if value == middle else below if value < middle else above
    return np.copysign(result, target(1 if value > 0 else -1)) if result == 0 else result


def whole(value: Number, mode: str) -> int:
    """A float as the integer that `mode` (rn, rz, rd, ru) leads to."""
    return {"rn": round, "rz": math.trunc, "rd": math.floor, "ru": math.ceil}[mode](Fraction(value))


def saturated(value: int, bits: int, signed: bool) -> int:
    """The nearest integer of so many bits; an unsigned one as the signed one of the same bits."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return _signed(min(max(value, low), high), bits)


def _of_bits(source: str, target: str) -> Callable[[Number], Number]:
    return lambda x: struct.unpack(target, struct.pack(source, x))[0]


def _signed(value: int, bits: int) -> int:
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def _exponent(x: float) -> int:
    return math.frexp(x)[1] - 1


def _away(x: float) -> int:
    return int(math.copysign(math.floor(abs(Fraction(x)) + Fraction(1, 2)), x))


def _norm(*x: float) -> Number:
    return mpmath.sqrt(sum(mpmath.mpf(v) ** 2 for v in x))


def _byte_perm(x: int, y: int, selector: int) -> int:
    source = struct.pack("<II", x % 2**32, y % 2**32)
    chosen = [(selector >> (4 * k)) & 0xF for k in range(4)]
    parts = [source[c & 7] if c < 8 else 0xFF * (source[c & 7] >> 7) for c in chosen]
    return struct.unpack("<i", bytes(parts))[0]


def _by_zero_remainder(x: float, y: float, nearest: bool) -> Fraction | float:
    quotient = Fraction(x) / Fraction(y)
    rest = Fraction(x) - (round(quotient) if nearest else math.trunc(quotient)) * Fraction(y)
    return rest if rest else math.copysign(0.0, x)


def _cube_root(x: float) -> Number:
    return mpmath.sign(x) * mpmath.cbrt(abs(x))


def _normal_quantile(p: float) -> Number:
    return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


_SAME = "exp exp10 log log2 log10 sin cos tan tanh pow"  # as the fast functions of float32
EXPECTED: dict[str, Callable[..., Number]] = {
    **{name: getattr(mpmath, name) for name in (
        "exp sin cos tan sinpi cospi cosh sinh tanh atan asin acos log log10 log1p acosh asinh atanh expm1 erf erfinv "
        "erfc atan2 sqrt hypot"
    ).split()},
    "exp2": lambda x: mpmath.mpf(2) ** x,
    "exp10": lambda x: mpmath.mpf(10) ** x,
    "log2": lambda x: mpmath.log(x, 2),
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "cbrt": _cube_root,
    "rcbrt": lambda x: 1 / _cube_root(x),
    "j0": lambda x: mpmath.besselj(0, x),
    "j1": lambda x: mpmath.besselj(1, x),
    "jn": lambda n, x: mpmath.besselj(n, x),
    "y0": lambda x: mpmath.bessely(0, x),
    "y1": lambda x: mpmath.bessely(1, x),
    "yn": lambda n, x: mpmath.bessely(n, x),
    "cyl_bessel_i0": lambda x: mpmath.besseli(0, x),
    "cyl_bessel_i1": lambda x: mpmath.besseli(1, x),
    "erfcx": lambda x: mpmath.exp(mpmath.mpf(x) ** 2) * mpmath.erfc(x),
    "erfcinv": lambda x: mpmath.erfinv(1 - mpmath.mpf(x)),
    "normcdf": mpmath.ncdf,
    "normcdfinv": _normal_quantile,
    "lgamma": lambda x: mpmath.log(abs(mpmath.gamma(x))),
    "tgamma": mpmath.gamma,
    "pow": lambda x, y: mpmath.mpf(x) ** y,
    "rhypot": lambda x, y: 1 / _norm(x, y),
    "norm3d": _norm,
    "norm4d": _norm,
    "rnorm3d": lambda *x: 1 / _norm(*x),
    "rnorm4d": lambda *x: 1 / _norm(*x),
    "rcp64h": lambda x: 1 / mpmath.mpf(x),
    # Exact but for one rounding.
    "abs": abs,
    "floor": lambda x: whole(x, "rd"),
    "ceil": lambda x: whole(x, "ru"),
    "trunc": lambda x: whole(x, "rz"),
    "rint": lambda x: whole(x, "rn"),
    "nearbyint": lambda x: whole(x, "rn"),
    "round": _away,
    "llrint": lambda x: whole(x, "rn"),
    "llround": _away,
    "saturatef": lambda x: min(max(x, 0.0), 1.0),
    "logb": _exponent,
    "ilogb": _exponent,
    "fast_dividef": lambda x, y: Fraction(x) / Fraction(y),
    "copysign": math.copysign,
    "fmod": lambda x, y: _by_zero_remainder(x, y, nearest=False),
    "remainder": lambda x, y: _by_zero_remainder(x, y, nearest=True),
    "fdim": lambda x, y: max(Fraction(x) - Fraction(y), 0),
    "fma": lambda x, y, z: Fraction(x) * Fraction(y) + Fraction(z),
    "ldexp": lambda x, n: Fraction(x) * Fraction(2) ** n,
    "scalbn": lambda x, n: Fraction(x) * Fraction(2) ** n,
    # Integers and bits.
    "isnan": lambda x: 0,
    "isinf": lambda x: 0,
    "finitef": lambda x: 1,
    "isfinited": lambda x: 1,
    "signbit": lambda x: int(math.copysign(1, x) < 0),
    "byte_perm": _byte_perm,
    "sad": lambda x, y, z: abs(x - y) + z,
    "hadd": lambda x, y: (x + y) >> 1,
    "rhadd": lambda x, y: (x + y + 1) >> 1,
    "float_as_int": _of_bits("f", "i"),
    "float_as_uint": _of_bits("f", "i"),
    "int_as_float": _of_bits("i", "f"),
    "uint_as_float": _of_bits("I", "f"),
    "double_as_longlong": _of_bits("d", "q"),
    "longlong_as_double": _of_bits("q", "d"),
    "double2loint": lambda x: _signed(_of_bits("d", "Q")(x) & 0xFFFFFFFF, 32),
    "double2hiint": lambda x: _of_bits("d", "q")(x) >> 32,
    "hiloint2double": lambda high, low: _of_bits("q", "d")(_signed((high << 32) | (low % 2**32), 64)),
}  # fmt: skip
EXPECTED |= {f"fast_{name}f": EXPECTED[name] for name in _SAME.split()}

# Whose results depend on the integer type: these take its bits and whether it is signed first.
OF_INTEGERS: dict[str, Callable[..., int]] = {
    "abs": lambda bits, signed, x: _signed(abs(x), bits),
    "clz": lambda bits, signed, x: bits - (x % 2**bits).bit_length(),
    "popc": lambda bits, signed, x: (x % 2**bits).bit_count(),
    "brev": lambda bits, signed, x: _signed(int(f"{x % 2**bits:0{bits}b}"[::-1], 2), bits),
    "ffs": lambda bits, signed, x: (x & -x).bit_length(),
    "mulhi": lambda bits, signed, x, y: (x * y) >> bits,
    "mul24": lambda bits, signed, x, y: _mul24(signed, x, y),
}


def _mul24(signed: bool, x: int, y: int) -> int:
    low = [_signed(v, 24) if signed else v % 2**24 for v in (x, y)]
    product = low[0] * low[1]
    return _signed(product, 32) if signed else product % 2**32


_ROUNDED = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
    "fma": lambda x, y, z: x * y + z, "rcp": lambda x: 1 / x,
    "sqrt": lambda x: exactly(mpmath.sqrt(mpmath.mpf(x.numerator) / x.denominator)),
    "rsqrt": lambda x: exactly(mpmath.sqrt(mpmath.mpf(x.denominator) / x.numerator)),
}  # fmt: skip
_DIRECTED = re.compile(r"(\w+)_(r[nzdu])")


def directed(name: str) -> tuple[Callable[..., Fraction], str] | None:
    """(the exact function of finite numbers, rounding mode) of a function that is named after one, else None."""
    match = _DIRECTED.fullmatch(name)
    if match is None:
        return None
    if match[1] in _ROUNDED:
        exact = _ROUNDED[match[1]]
        return lambda *args: exact(*map(Fraction, args)), match[2]
    return Fraction, match[2]
