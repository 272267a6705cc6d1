"""Elementary functions on float32 scalars and vectors, as LLVM IR; of float64 what libm is not good enough at.

Each `emit_*` takes and returns an LLVM value of type float or <W x float> and is written without branches, so that
the same text serves every width. The polynomials are minimax fits (Lawson-weighted least squares, 40 digits)
made for this file; the argument reductions are the textbook ones named at each function. `tests/cpu/test_vmath.py`
measures their error against mpmath.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from esper_triton.cpu.host import cpu_features

Value = Any  # llvmlite has no usable type stubs
F32, I32 = ir.FloatType(), ir.IntType(32)
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.4286068203094172e-06  # of 15 bits, so that products with exponents are exact
_AVX512 = 16  # lanes of float32 in one of its registers

# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2)/2; relative error 3.1e-9.
_EXP = (
    0.49999993448492125,
    0.16666520643270002,
    0.04166838792969626,
    0.00836871541200981,
    0.00138145998711689,
)
# exp2(r) = 1 + r * P(r) on |r| <= 1/2; relative error 4.7e-11.
_EXP2 = (
    0.6931471807045373,
    0.24022651066567666,
    0.05550410365976802,
    0.009618038131301791,
    0.0013333935066180969,
    0.0001546675652103549,
    1.5196154288885712e-05,
)
# tanh(x) = x + x * u * P(u), u = x^2, on |x| <= 0.625; relative error 4.1e-9.
_TANH = (
    -0.33333283924744966,
    0.13331491272435034,
    -0.05374349690785708,
    0.02065058363000209,
    -0.00571704113793946,
)
# The same in float64; relative error 1.0e-17.
_TANH_DOUBLE = (
    -0.33333333333332854,
    0.1333333333326203,
    -0.053968253931241564,
    0.021869487575646083,
    -0.008863220998339702,
    0.0035919891482759274,
    -0.0014549587794191353,
    0.0005863162932483509,
    -0.00022856382292157397,
    7.714401961863634e-05,
    -1.607243513198808e-05,
)
# erfc(x) = exp(-x - x * P(x)) on 0 <= x <= 4; error relative to erf(x) 4.0e-9.
_ERFC = (
    0.1283791716243539,
    0.6366193810801586,
    0.10277783933340774,
    -0.01915310196328115,
    -0.00016031247245177756,
    0.0016669288094732903,
    -0.0006327745403473719,
    0.00011762164850010226,
    -9.253861863085307e-06,
)
# log((1+s)/(1-s)) = 2s + s * z * P(z), z = s^2, on |s| <= 0.1716; relative error 9.6e-12 of s.
_LOG = (
    0.666666656454416,
    0.40000335193466985,
    0.2853730840564416,
    0.23582153544704432,
)


def typed(like: Value, element: ir.Type) -> ir.Type:
    """`element`, or a vector of it as wide as `like`."""
    return ir.VectorType(element, like.type.count) if isinstance(like.type, ir.VectorType) else element


def splat_constant(type_: ir.Type, value: float | int | None) -> ir.Constant:
    """A constant of a scalar or vector type, the same in every lane."""
    scalar = ir.Constant(type_.element if isinstance(type_, ir.VectorType) else type_, value)
    return splat_of(scalar, type_.count) if isinstance(type_, ir.VectorType) else scalar


class _Spelled(ir.Constant):  # type: ignore[misc]  # llvmlite carries no types
    """A constant in a shorter spelling. llvmlite writes vectors out lane by lane, which would be most of the text that
    LLVM has to read."""

    def __init__(self, type_: ir.Type, constant: Any, text: str) -> None:
        self.type, self.constant, self._text = type_, constant, text

    def _get_reference(self) -> str:
        return self._text


def splat_of(scalar: ir.Constant, width: int) -> ir.Constant:
    """A vector constant with `scalar` in every lane."""
    return _Spelled(ir.VectorType(scalar.type, width), [scalar] * width, f"splat ({scalar})")


def undefined(type_: ir.Type) -> ir.Constant:
    """A vector that is still to be filled in."""
    return _Spelled(type_, ir.Undefined, "poison")


def first_lane(width: int) -> ir.Constant:
    """The shuffle mask that spreads lane 0 over `width` lanes."""
    lane = ir.Constant(ir.IntType(32), 0)
    return _Spelled(ir.VectorType(lane.type, width), [lane] * width, "zeroinitializer")


def mangle(type_: ir.Type) -> str:
    """The suffix LLVM's overloaded intrinsics carry for a type, such as `v8f32`."""
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{mangle(type_.element)}"
    if isinstance(type_, ir.IntType):
        return f"i{type_.width}"
    if isinstance(type_, ir.PointerType):
        return "p0"
    return {"half": "f16", "float": "f32", "double": "f64"}[str(type_)]


def intrinsic(b: ir.IRBuilder, name: str, args: Sequence[Value], result: ir.Type | None = None) -> Value:
    """A call of `llvm.<name>` overloaded on the type of its first argument (and of its result where that is given)."""
    suffix = mangle(args[0].type) if result is None else f"{mangle(result)}.{mangle(args[0].type)}"
    return call(b, f"llvm.{name}.{suffix}", result or args[0].type, args)


def call(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[Value]) -> Value:
    """A call of an external function, declared on first use."""
    module = b.function.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def call_out_of_line(
    b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[Value], body: Callable[..., Value | None]
) -> Value:
    """A call of a function of this module that `body` emits on first use: code that is too long to stand everywhere."""
    module = b.function.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [arg.type for arg in args]), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block("entry"))
        value = body(inner, *function.args)
        if value is None:
            inner.ret_void()
        else:
            inner.ret(value)
    return b.call(function, args)


def per_lane(b: ir.IRBuilder, symbol: str, args: Sequence[Value], result: ir.Type | None = None) -> Value:
    """An external function of scalars, one lane at a time: for what is too rare to have a vector form here.

    Args:
        result: the scalar type it returns; that of the last argument where it is left out.
    """
    like = args[0].type
    element = result or (args[-1].type.element if isinstance(like, ir.VectorType) else args[-1].type)
    if not isinstance(like, ir.VectorType):
        return call(b, symbol, element, args)
    vector = undefined(ir.VectorType(element, like.count))
    for lane in range(like.count):
        index = ir.Constant(I32, lane)
        value = call(b, symbol, element, [b.extract_element(a, index) for a in args])
        vector = b.insert_element(vector, value, index)
    return vector


def fma(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, fused where the CPU has an FMA unit (a program may not depend on which)."""
    return intrinsic(b, "fmuladd", (x, y, z))


def polynomial(b: ir.IRBuilder, x: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial in x with these coefficients, the constant one first."""
    # Horner's rule: a chunk has several registers in flight already, so that latency is hidden without Estrin's scheme.
    result = splat_constant(x.type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = fma(b, result, x, splat_constant(x.type, coefficient))
    return result


def _times_power_of_2(b: ir.IRBuilder, x: Value, n: Value, exponent: Value) -> Value:
    """x * 2**n, rounded once where that is below the normal range; `exponent` is n as an integer."""
    if "avx512f" in cpu_features() and isinstance(x.type, ir.VectorType) and x.type.count % _AVX512 == 0:
        return _scaled_by_avx512(b, x, n)
    # In two halves, so that results below the normal range are rounded once and exponent 128 does not overflow early.
    integer = exponent.type
    half = b.ashr(exponent, splat_constant(integer, 1))
    for part in (half, b.sub(exponent, half)):
        bits = b.shl(b.add(part, splat_constant(integer, 127)), splat_constant(integer, 23))
        x = b.fmul(x, b.bitcast(bits, x.type))
    return x


def _scaled_by_avx512(b: ir.IRBuilder, x: Value, n: Value) -> Value:
    # One instruction for 16 lanes, where the same with integers takes nine.
    part = ir.VectorType(F32, _AVX512)
    name, every_lane, rounding = (
        "llvm.x86.avx512.mask.scalef.ps.512",
        ir.Constant(ir.IntType(16), -1),
        ir.Constant(I32, 4),
    )
    lanes = ir.VectorType(I32, _AVX512)
    parts = []
    for start in range(0, x.type.count, _AVX512):
        chosen = ir.Constant(lanes, [ir.Constant(I32, start + lane) for lane in range(_AVX512)])
        value, power = (b.shuffle_vector(v, undefined(v.type), chosen) for v in (x, n))
        parts.append(call(b, name, part, [value, power, splat_constant(part, 0.0), every_lane, rounding]))
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        both = ir.Constant(ir.VectorType(I32, width), [ir.Constant(I32, lane) for lane in range(width)])
        parts = [b.shuffle_vector(low, high, both) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def round_to_int(b: ir.IRBuilder, x: Value, scale: float) -> tuple[Value, Value]:
    """The integer nearest to x * scale, as a float and as an int32; its magnitude is to be below 2^22."""
    # Adding 1.5 * 2^23 leaves the nearest integer of x * scale in the low mantissa bits; NaN gives an arbitrary integer
    # where a float-to-int conversion would be undefined.
    magic = splat_constant(x.type, 12582912.0)
    shifted = fma(b, x, splat_constant(x.type, scale), magic)
    integer = typed(x, I32)
    return b.fsub(shifted, magic), b.sub(b.bitcast(shifted, integer), b.bitcast(magic, integer))


def _clamped(b: ir.IRBuilder, x: Value, low: float, high: float) -> Value:
    # Ordered comparisons are false for NaN, which therefore passes through.
    low_v, high_v = splat_constant(x.type, low), splat_constant(x.type, high)
    x = b.select(b.fcmp_ordered("<", x, low_v), low_v, x)
    return b.select(b.fcmp_ordered(">", x, high_v), high_v, x)


def emit_exp(b: ir.IRBuilder, x: Value) -> Value:
    """exp(x): Cody-Waite reduction by multiples of ln 2."""
    n, exponent, growth = _exp_parts(b, _clamped(b, x, -105.0, 89.5))
    return _times_power_of_2(b, b.fadd(growth, splat_constant(x.type, 1.0)), n, exponent)


def emit_expm1(b: ir.IRBuilder, x: Value) -> Value:
    """exp(x) - 1: with exp's reduction, 2^n * growth + (2^n - 1)."""
    _, exponent, growth = _exp_parts(b, _clamped(b, x, -20.0, 88.9))  # beyond, it is infinite or rounds to -1
    integer = exponent.type
    bits = b.shl(b.add(exponent, splat_constant(integer, 126)), splat_constant(integer, 23))
    half = b.bitcast(bits, x.type)  # of 2^n, which may be 2^128
    result = fma(b, growth, half, b.fsub(half, splat_constant(x.type, 0.5)))
    # Without the detour where n is 0: half of the least number is none.
    result = b.select(b.icmp_signed("==", exponent, splat_constant(integer, 0)), growth, b.fadd(result, result))
    return intrinsic(b, "copysign", (result, x))  # -0 has become +0


def _exp_parts(b: ir.IRBuilder, x: Value) -> tuple[Value, Value, Value]:
    """(n, n as an integer, exp(r) - 1) with x = n * ln 2 + r, |r| <= ln(2)/2."""
    n, exponent = round_to_int(b, x, _LOG2_E)
    r = fma(b, n, splat_constant(x.type, -_LN2_HIGH), x)
    r = fma(b, n, splat_constant(x.type, -_LN2_LOW), r)
    return n, exponent, _growth(b, r)


def _growth(b: ir.IRBuilder, r: Value) -> Value:
    """exp(r) - 1 on |r| <= ln(2)/2."""
    return fma(b, b.fmul(r, r), polynomial(b, r, _EXP), r)


def emit_exp2(b: ir.IRBuilder, x: Value) -> Value:
    """2**x: the reduction is exact."""
    x = _clamped(b, x, -151.0, 129.0)
    n, exponent = round_to_int(b, x, 1.0)
    r = b.fsub(x, n)
    return _times_power_of_2(b, fma(b, r, polynomial(b, r, _EXP2), splat_constant(x.type, 1.0)), n, exponent)


_SQRT_HALF = 0x3F3504F3  # as bits of a float32


def _log_parts(b: ir.IRBuilder, x: Value) -> tuple[Value, Value, Value, Value]:
    """(e, f, hfsq, s * (hfsq + R)) with log(x) = e * ln 2 + f - (hfsq - last): fdlibm's arrangement."""
    tiny = b.fcmp_ordered("<", x, splat_constant(x.type, 1.1754943508222875e-38))
    x = b.select(tiny, b.fmul(x, splat_constant(x.type, 8388608.0)), x)
    bias = b.select(tiny, splat_constant(x.type, -23.0), splat_constant(x.type, 0.0))
    exponent, mantissa = _split(b, x)
    f = b.fsub(mantissa, splat_constant(x.type, 1.0))
    return b.fadd(exponent, bias), f, *_log_near_1(b, f)


def _split(b: ir.IRBuilder, x: Value) -> tuple[Value, Value]:
    """(e, m) with x = 2^e * m and sqrt(1/2) <= m < sqrt(2), of a normal number."""
    integer = typed(x, I32)
    offset = b.sub(b.bitcast(x, integer), splat_constant(integer, _SQRT_HALF))
    exponent = b.sitofp(b.ashr(offset, splat_constant(integer, 23)), x.type)
    mantissa = b.add(b.and_(offset, splat_constant(integer, 0x7FFFFF)), splat_constant(integer, _SQRT_HALF))
    return exponent, b.bitcast(mantissa, x.type)


def _log_near_1(b: ir.IRBuilder, f: Value) -> tuple[Value, Value]:
    """(hfsq, s * (hfsq + R)) with log(1 + f) = f - (hfsq - last)."""
    s = b.fdiv(f, b.fadd(f, splat_constant(f.type, 2.0)))
    z = b.fmul(s, s)
    half_square = b.fmul(b.fmul(f, f), splat_constant(f.type, 0.5))
    return half_square, b.fmul(s, fma(b, z, polynomial(b, z, _LOG), half_square))


def _log_specials(b: ir.IRBuilder, x: Value, result: Value) -> Value:
    zero, infinity = splat_constant(x.type, 0.0), splat_constant(x.type, float("inf"))
    result = b.select(b.fcmp_unordered("<", x, zero), splat_constant(x.type, float("nan")), result)
    result = b.select(b.fcmp_ordered("==", x, zero), splat_constant(x.type, float("-inf")), result)
    return b.select(b.fcmp_ordered("==", x, infinity), infinity, result)


def emit_log(b: ir.IRBuilder, x: Value) -> Value:
    """Natural logarithm."""
    e, f, half_square, tail = _log_parts(b, x)
    low = b.fsub(half_square, fma(b, e, splat_constant(x.type, _LN2_LOW), tail))
    result = fma(b, e, splat_constant(x.type, _LN2_HIGH), b.fsub(f, low))
    return _log_specials(b, x, result)


def emit_log1p(b: ir.IRBuilder, x: Value) -> Value:
    """log(1 + x), with what 1 + x was rounded by as a correction: log(u + c) = log(u) + c / u."""
    one = splat_constant(x.type, 1.0)
    u = b.fadd(x, one)
    part = b.fsub(u, x)
    lost = b.fadd(b.fsub(x, b.fsub(u, part)), b.fsub(one, part))
    e, mantissa = _split(b, u)
    near = b.fcmp_ordered("==", e, splat_constant(x.type, 0.0))
    f = b.select(near, x, b.fsub(mantissa, one))  # near 0 nothing is lost
    half_square, tail = _log_near_1(b, f)
    correction = fma(b, e, splat_constant(x.type, _LN2_LOW), b.fdiv(lost, u))
    small = b.fsub(f, b.fsub(half_square, tail))
    large = b.fsub(f, b.fsub(half_square, b.fadd(correction, tail)))
    large = fma(b, e, splat_constant(x.type, _LN2_HIGH), large)
    return _log_specials(b, u, b.select(near, small, large))


def emit_log2(b: ir.IRBuilder, x: Value) -> Value:
    """Base-2 logarithm; log2(e) is split so that the head's product with a truncated f is exact."""
    e, f, half_square, tail = _log_parts(b, x)
    # f - half_square in two parts: the head keeps 12 bits so that head * log2e_high is exact.
    integer = typed(x, I32)
    head = b.fsub(f, half_square)
    head = b.bitcast(b.and_(b.bitcast(head, integer), splat_constant(integer, 0xFFFFF000)), x.type)
    rest = b.fadd(b.fsub(b.fsub(f, head), half_square), tail)
    high, low = 1.44287109375, -0.000176052861036613
    result = b.fmul(b.fadd(rest, head), splat_constant(x.type, low))
    result = fma(b, rest, splat_constant(x.type, high), result)
    scaled = b.fmul(head, splat_constant(x.type, high))
    total = b.fadd(e, scaled)  # |e| > |scaled| or e == 0, so the error term below is exact (Dekker)
    return _log_specials(b, x, b.fadd(total, b.fadd(result, b.fsub(scaled, b.fsub(total, e)))))


def emit_tanh(b: ir.IRBuilder, x: Value) -> Value:
    """tanh(x): a polynomial near 0, 1 - 2 / (exp(2|x|) + 1) elsewhere."""
    return _tanh(b, x, _TANH, emit_exp)


def emit_tanh_double(b: ir.IRBuilder, x: Value) -> Value:
    """tanh(x) of float64, likewise, with libm's exp: libm's own tanh was seen to be off by 2.2 units."""
    return _tanh(b, x, _TANH_DOUBLE, lambda b, twice: per_lane(b, "exp", [twice]))


def _tanh(
    b: ir.IRBuilder, x: Value, coefficients: Sequence[float], exp: Callable[[ir.IRBuilder, Value], Value]
) -> Value:
    magnitude = intrinsic(b, "fabs", (x,))
    square = b.fmul(x, x)
    small = fma(b, b.fmul(magnitude, square), polynomial(b, square, coefficients), magnitude)
    one, two = splat_constant(x.type, 1.0), splat_constant(x.type, 2.0)
    growth = exp(b, b.fmul(magnitude, two))
    large = b.fsub(one, b.fdiv(two, b.fadd(growth, one)))
    # `<` is false for NaN, which then comes through `large`.
    value = b.select(b.fcmp_ordered("<", magnitude, splat_constant(x.type, 0.625)), small, large)
    return intrinsic(b, "copysign", (value, x))  # of the polynomial too: x + x * -0 is +0 for -0


def emit_erf(b: ir.IRBuilder, x: Value) -> Value:
    """erf(x) = 1 - erfc(x), without cancellation: -(exp(log erfc(|x|)) - 1), reduced and put together as expm1 is."""
    magnitude, four = intrinsic(b, "fabs", (x,)), splat_constant(x.type, 4.0)
    magnitude = b.select(b.fcmp_ordered(">", magnitude, four), four, magnitude)  # erf(4) rounds to 1; NaN stays
    rest = polynomial(b, magnitude, _ERFC)
    n, exponent = round_to_int(b, fma(b, magnitude, rest, magnitude), _LOG2_E)
    minus = b.fneg(magnitude)
    r = fma(b, n, splat_constant(x.type, _LN2_HIGH), minus)
    r = fma(b, n, splat_constant(x.type, _LN2_LOW), r)
    growth = _growth(b, fma(b, minus, rest, r))
    integer = exponent.type
    scale = b.bitcast(b.shl(b.sub(splat_constant(integer, 127), exponent), splat_constant(integer, 23)), x.type)  # 2^-n
    return intrinsic(b, "copysign", (fma(b, growth, scale, b.fsub(scale, splat_constant(x.type, 1.0))), x))


FLOAT32: dict[str, Callable[[ir.IRBuilder, Value], Value]] = {
    "exp": emit_exp,
    "expm1": emit_expm1,
    "exp2": emit_exp2,
    "log": emit_log,
    "log1p": emit_log1p,
    "log2": emit_log2,
    "tanh": emit_tanh,
    "erf": emit_erf,
}
FLOAT64: dict[str, Callable[[ir.IRBuilder, Value], Value]] = {"tanh": emit_tanh_double}
