"""Special functions that libdevice has and libm has not, in float64, one number at a time.

Each becomes a function of the kernel's module on first use. They are made of libm's `erf`, `erfc`, `exp` and `log`;
errors are a few units in the last place (`tests/cpu/test_libdevice.py` measures them against mpmath).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering.types import F64, I32
from esper_triton.cpu.lowering.vmath import Value, call, intrinsic

__all__ = ["SPECIAL", "call_special"]

_SQRT_PI = math.sqrt(math.pi)
# sqrt(1/2) in two parts.
_SQRT_HALF, _SQRT_HALF_LOW = 0.7071067811865476, -4.833646656726457e-17


class _Number:
    """A float64 that is still to be computed: arithmetic on it emits instructions."""

    def __init__(self, b: ir.IRBuilder, value: Value | float) -> None:
        self.b, self.value = b, ir.Constant(F64, value) if isinstance(value, float) else value

    def _with(self, other: _Number | float, method: str, swapped: bool = False) -> _Number:
        operands = [self.value, other.value if isinstance(other, _Number) else ir.Constant(F64, float(other))]
        return _Number(self.b, getattr(self.b, method)(*(reversed(operands) if swapped else operands)))

    def __add__(self, other: _Number | float) -> _Number:
        return self._with(other, "fadd")

    def __sub__(self, other: _Number | float) -> _Number:
        return self._with(other, "fsub")

    def __mul__(self, other: _Number | float) -> _Number:
        return self._with(other, "fmul")

    def __truediv__(self, other: _Number | float) -> _Number:
        return self._with(other, "fdiv")

    def __radd__(self, other: float) -> _Number:
        return self._with(other, "fadd")

    def __rsub__(self, other: float) -> _Number:
        return self._with(other, "fsub", swapped=True)

    def __rmul__(self, other: float) -> _Number:
        return self._with(other, "fmul")

    def __rtruediv__(self, other: float) -> _Number:
        return self._with(other, "fdiv", swapped=True)

    def __neg__(self) -> _Number:
        return _Number(self.b, self.b.fneg(self.value))

    def __abs__(self) -> _Number:
        return _Number(self.b, intrinsic(self.b, "fabs", (self.value,)))

    def where(self, order: str, bound: _Number | float, yes: _Number | float, no: _Number | float) -> _Number:
        """`yes` where `self order bound` (which is false for NaN), `no` elsewhere."""
        other = bound if isinstance(bound, _Number) else _Number(self.b, float(bound))
        choices = [c.value if isinstance(c, _Number) else ir.Constant(F64, float(c)) for c in (yes, no)]
        return _Number(self.b, self.b.select(self.b.fcmp_ordered(order, self.value, other.value), *choices))

    def signed_as(self, other: _Number) -> _Number:
        return _Number(self.b, intrinsic(self.b, "copysign", (self.value, other.value)))

    def fma(self, factor: _Number | float, summand: _Number) -> _Number:
        other = factor.value if isinstance(factor, _Number) else ir.Constant(F64, factor)
        return _Number(self.b, intrinsic(self.b, "fma", (self.value, other, summand.value)))

    def libm(self, name: str) -> _Number:
        return _Number(self.b, call(self.b, name, F64, [self.value]))

    def sqrt(self) -> _Number:
        return _Number(self.b, intrinsic(self.b, "sqrt", (self.value,)))


def _erfcinv_of_tail(q: _Number) -> _Number:
    # Halley's method on erfc(x) = q for q <= 1, from the rational approximation 26.2.22 of Abramowitz and Stegun.
    t = (-2.0 * (0.5 * q).libm("log")).sqrt()
    x = _SQRT_HALF * (t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t)))
    for _ in range(3):
        excess = x.libm("erfc") - q
        x = x + excess / ((2.0 / _SQRT_PI) * (-(x * x)).libm("exp") - x * excess)
    return q.where("==", 0.0, math.inf, x)


def _erfinv_of_middle(y: _Number) -> _Number:
    # The series about 0, then Halley's method, for |y| <= 1/2.
    square = y * y
    x = (0.5 * _SQRT_PI) * y * (1.0 + square * (math.pi / 12 + square * (7 * math.pi**2 / 480)))
    for _ in range(3):
        excess = x.libm("erf") - y
        x = x - excess / ((2.0 / _SQRT_PI) * (-(x * x)).libm("exp") + x * excess)
    return y.where("==", 0.0, y, x)


def _erfcinv(q: _Number) -> _Number:
    # About 1 by erf, whose argument is exact there and has a relative error where erfc's has an absolute one.
    y = 1.0 - q
    tail = _erfcinv_of_tail(q.where("<", 1.0, q, 2.0 - q)).signed_as(y)
    return abs(y).where("<", 0.5, _erfinv_of_middle(y), tail)


def _erfinv(y: _Number) -> _Number:
    # Near 1 by the complement, which erf cannot tell from 1.
    return abs(y).where("<", 0.5, _erfinv_of_middle(y), _erfcinv_of_tail(1.0 - abs(y)).signed_as(y))


def _erfcx(x: _Number) -> _Number:
    # exp(x^2) erfc(x), with x^2 in two parts; from 10 on by the asymptotic series (Abramowitz and Stegun 7.1.23).
    bounded = x.where("<", -30.0, -30.0, x)
    high = bounded * bounded
    low = bounded.fma(bounded, -high)
    near = high.libm("exp") * (1.0 + low) * bounded.libm("erfc")
    z = 0.5 / (x * x)
    series = _Number(x.b, 1.0)
    for n in range(12, 0, -1):
        series = 1.0 - (2 * n - 1) * z * series
    return x.where("<", 10.0, near, series * (1.0 / _SQRT_PI) / x)


def _normcdf(x: _Number) -> _Number:
    # erfc(-x / sqrt 2) / 2. The argument's rounding error would count x^2-fold in the tail.
    x = x.where("<", -40.0, -40.0, x)
    x = -x.where(">", 40.0, 40.0, x)
    t = x * _SQRT_HALF
    error = x.fma(_SQRT_HALF, -t) + x * _SQRT_HALF_LOW
    return 0.5 * (t.libm("erfc") - error * (2.0 / _SQRT_PI) * (-(t * t)).libm("exp"))


def _normcdfinv(p: _Number) -> _Number:
    return 0.0 - math.sqrt(2.0) * _erfcinv(2.0 * p)  # 0 rather than -0 of 1/2


def _bessel_i(order: int) -> Callable[[_Number], _Number]:
    # Abramowitz and Stegun 9.6.10 (the power series, whose terms are all positive) up to 20 and 9.7.1 beyond.
    def emit(x: _Number) -> _Number:
        a = abs(x)
        quarter = 0.25 * (a * a)
        series = _Number(x.b, 1.0)
        for k in range(48, 0, -1):
            series = 1.0 + quarter * series * (1.0 / (k * (k + order)))
        if order:
            series = series * (0.5 * a)
        inverse, asymptotic = 0.125 / a, _Number(x.b, 1.0)
        for k in range(24, 0, -1):
            asymptotic = 1.0 - ((4.0 * order - (2 * k - 1) ** 2) / k) * inverse * asymptotic
        root = (0.5 * a).libm("exp")  # in two factors: the whole would overflow too early
        far = root * (asymptotic / (2 * math.pi * a).sqrt()) * root
        result = a.where("<", 20.0, series, far)
        result = a.where("==", math.inf, math.inf, result)
        return result.signed_as(x) if order else result

    return emit


SPECIAL: dict[str, Callable[[_Number], _Number]] = {
    "erfinv": _erfinv,
    "erfcinv": _erfcinv,
    "erfcx": _erfcx,
    "normcdf": _normcdf,
    "normcdfinv": _normcdfinv,
    "cyl_bessel_i0": _bessel_i(0),
    "cyl_bessel_i1": _bessel_i(1),
}


def call_special(b: ir.IRBuilder, name: str, x: Value) -> Value:
    """`name` of a float64 scalar or vector."""
    function = _defined(b.function.module, name)
    if not isinstance(x.type, ir.VectorType):
        return b.call(function, [x])
    result: Any = ir.Constant(x.type, ir.Undefined)
    for lane in range(x.type.count):
        index = ir.Constant(I32, lane)
        result = b.insert_element(result, b.call(function, [b.extract_element(x, index)]), index)
    return result


def _defined(module: Any, name: str) -> Any:
    symbol = f"special.{name}"
    function = module.globals.get(symbol)
    if function is None:
        function = ir.Function(module, ir.FunctionType(F64, [F64]), symbol)
        function.linkage = "internal"
        function.attributes.add("noinline")
        b = ir.IRBuilder(function.append_basic_block("entry"))
        b.ret(SPECIAL[name](_Number(b, function.args[0])).value)
    return function
