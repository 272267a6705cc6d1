"""libdevice's functions (`__nv_*`), which `triton.language.extra.libdevice` calls by symbol, and libm behind them.

Integer results of a float that no integer is near are the nearest that there is; NaN gives 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import reduce

from llvmlite import ir

from esper_triton.cpu.lowering import vmath
from esper_triton.cpu.lowering.casts import float_to_float, in_float32
from esper_triton.cpu.lowering.rounding import float_of_integer, rounded
from esper_triton.cpu.lowering.special import SPECIAL, call_special
from esper_triton.cpu.lowering.trigonometry import emit_cos, emit_sin
from esper_triton.cpu.lowering.types import F32, F64, FLOAT8, I32, I64, Unlowered, element_type, register_type
from esper_triton.cpu.lowering.vmath import Value, call, intrinsic, per_lane, splat_constant, typed
from esper_triton.cpu.mlir import Operation

__all__ = ["emit_extern", "function"]

_LIBM = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erfc exp exp10 exp2 expm1 fmod hypot j0 j1 lgamma log "
    "log10 log1p log2 logb nextafter pow remainder sin sinh tan tanh tgamma y0 y1".split()
)
_INFINITY = float("inf")
# Of float32, for all lanes at once.
_VECTOR_FORMS = {**vmath.FLOAT32, "sin": emit_sin, "cos": emit_cos}


def function(b: ir.IRBuilder, name: str, element: str, args: Sequence[Value]) -> Value:
    """libm's function `name` on numbers of the MLIR float type `element`."""
    if element in ("f16", "bf16", *FLOAT8):
        return in_float32(b, element, args, lambda *wide: function(b, name, "f32", wide))
    if element == "f64":
        return vmath.FLOAT64[name](b, args[0]) if name in vmath.FLOAT64 else per_lane(b, name, args)
    if name in _VECTOR_FORMS:
        return _VECTOR_FORMS[name](b, args[0])
    return per_lane(b, f"{name}f", args)


def _scalar(type_: ir.Type) -> ir.Type:
    return type_.element if isinstance(type_, ir.VectorType) else type_


def _c(like: Value, value: float) -> ir.Constant:
    return splat_constant(like.type, value)


# ------------------------------------------------------------------------------------ floats in, floats of the type out

_UNARY_INTRINSICS = {
    "sqrt": "sqrt", "fabs": "fabs", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "rint": "rint",
    "nearbyint": "rint", "round": "round",
}  # fmt: skip


def _inverse(b: ir.IRBuilder, x: Value) -> Value:
    return b.fdiv(_c(x, 1.0), x)


def _sum_of_squares(b: ir.IRBuilder, args: Sequence[Value]) -> Value:
    # The root of a sum of squares, without overflow or underflow on the way: in float64 for float32; else pairwise.
    if _scalar(args[0].type) == F32:
        wide = [b.fpext(a, typed(a, F64)) for a in args]
        total = b.fmul(wide[0], wide[0])
        for a in wide[1:]:
            total = intrinsic(b, "fma", (a, a, total))
        # Infinite if any of them is, whatever the others are.
        infinite = [b.fcmp_ordered("==", intrinsic(b, "fabs", (a,)), _c(a, _INFINITY)) for a in wide]
        total = b.select(reduce(b.or_, infinite), _c(total, _INFINITY), total)
        return intrinsic(b, "sqrt", (total,))
    total = args[0]
    for a in args[1:]:
        total = per_lane(b, "hypot", [total, a])
    return total


def _norm(b: ir.IRBuilder, *args: Value) -> Value:
    root = _sum_of_squares(b, args)
    return b.fptrunc(root, args[0].type) if root.type != args[0].type else root


def _rnorm(b: ir.IRBuilder, *args: Value) -> Value:
    inverse = _inverse(b, _sum_of_squares(b, args))
    return b.fptrunc(inverse, args[0].type) if inverse.type != args[0].type else inverse


def _of_pi(sine: bool) -> Callable[..., Value]:
    # sin(pi x) and cos(pi x): x = n/2 + t with |t| <= 1/4, all of it exact, and the quadrant decides.
    def emit(b: ir.IRBuilder, x: Value) -> Value:
        narrow = x.type
        x = b.fpext(x, typed(x, F64)) if _scalar(narrow) == F32 else x
        n = intrinsic(b, "rint", (b.fmul(x, _c(x, 2.0)),))
        angle = b.fmul(b.fsub(x, b.fmul(n, _c(x, 0.5))), _c(x, 3.141592653589793))
        # n mod 4, exactly, in floating point: it may be too large for an integer. Infinity leads to NaN by itself.
        quarters = b.fmul(intrinsic(b, "floor", (b.fmul(n, _c(x, 0.25)),)), _c(x, 4.0))
        quadrant = b.fsub(n, quarters)
        odd = b.or_(b.fcmp_ordered("==", quadrant, _c(x, 1.0)), b.fcmp_ordered("==", quadrant, _c(x, 3.0)))
        s, c = per_lane(b, "sin", [angle]), per_lane(b, "cos", [angle])
        value = b.select(odd, c, s) if sine else b.select(odd, s, c)
        first, second = (2.0, 3.0) if sine else (1.0, 2.0)
        minus = b.or_(b.fcmp_ordered("==", quadrant, _c(x, first)), b.fcmp_ordered("==", quadrant, _c(x, second)))
        value = b.select(minus, b.fneg(value), value)
        if sine:  # a zero has the sign of x
            value = b.select(b.fcmp_ordered("==", value, _c(x, 0.0)), intrinsic(b, "copysign", (_c(x, 0.0), x)), value)
        else:  # +0 rather than -0
            value = b.fadd(value, _c(x, 0.0))
        return b.fptrunc(value, narrow) if narrow != value.type else value

    return emit


def _special(name: str) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value) -> Value:
        if _scalar(x.type) == F64:
            return call_special(b, name, x)
        return b.fptrunc(call_special(b, name, b.fpext(x, typed(x, F64))), x.type)

    return emit


def _fdim(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_unordered(">", x, y), b.fsub(x, y), _c(x, 0.0))


def _saturate(b: ir.IRBuilder, x: Value) -> Value:
    # NaN becomes 0.
    return intrinsic(b, "minimumnum", (intrinsic(b, "maximumnum", (x, _c(x, 0.0))), _c(x, 1.0)))


def _cbrt(b: ir.IRBuilder, x: Value) -> Value:
    if _scalar(x.type) != F64:
        return function(b, "cbrt", "f32", [x])
    # libm's is a few units off in float64. One step of Newton's mends that where no power underflows or overflows.
    y = function(b, "cbrt", "f64", [x])
    square = b.fmul(y, y)
    excess = intrinsic(b, "fma", (square, y, b.fneg(x)))
    better = b.fsub(y, b.fdiv(excess, b.fmul(square, _c(x, 3.0))))
    size = intrinsic(b, "fabs", (x,))
    usual = b.and_(b.fcmp_ordered(">", size, _c(x, 1e-290)), b.fcmp_ordered("<", size, _c(x, 1e300)))
    return b.select(usual, better, y)


def _high_word_only(b: ir.IRBuilder, x: Value) -> Value:
    # An approximation of 1/x whose lower half is zero.
    bits = b.bitcast(_inverse(b, x), typed(x, I64))
    return b.bitcast(b.and_(bits, splat_constant(bits.type, ~0xFFFFFFFF)), x.type)


_FLOAT: dict[str, Callable[..., Value]] = {
    **{name: (lambda b, x, _i=i: intrinsic(b, _i, (x,))) for name, i in _UNARY_INTRINSICS.items()},
    "rsqrt": lambda b, x: _inverse(b, intrinsic(b, "sqrt", (x,))),
    "rcp64h": _high_word_only,
    "copysign": lambda b, x, y: intrinsic(b, "copysign", (x, y)),
    "fma": lambda b, x, y, z: intrinsic(b, "fma", (x, y, z)),
    "fmax": lambda b, x, y: intrinsic(b, "maximumnum", (x, y)),
    "fmin": lambda b, x, y: intrinsic(b, "minimumnum", (x, y)),
    "fast_fdivide": lambda b, x, y: b.fdiv(x, y),
    "saturate": _saturate,
    "fdim": _fdim,
    "rhypot": _rnorm,
    "norm3d": _norm,
    "norm4d": _norm,
    "rnorm3d": _rnorm,
    "rnorm4d": _rnorm,
    "cbrt": _cbrt,
    "rcbrt": lambda b, x: _inverse(b, _cbrt(b, x)),
    "sinpi": _of_pi(sine=True),
    "cospi": _of_pi(sine=False),
    **{name: _special(name) for name in SPECIAL},
}


# --------------------------------------------------------------------------------------------- conversions and integers


def _float_to_int(b: ir.IRBuilder, x: Value, mode: str, signed: bool, result: ir.Type) -> Value:
    rounding = {"rn": "rint", "rz": "trunc", "rd": "floor", "ru": "ceil"}[mode]
    whole = intrinsic(b, rounding, (x,))
    return intrinsic(b, f"fpto{'s' if signed else 'u'}i.sat", (whole,), typed(x, result))


def _byte_perm(b: ir.IRBuilder, x: Value, y: Value, selector: Value) -> Value:
    long = typed(x, I64)
    source = b.or_(b.zext(x, long), b.shl(b.zext(y, long), splat_constant(long, 32)))
    selector = b.zext(selector, long)
    result = splat_constant(long, 0)
    for k in range(4):
        choice = b.lshr(selector, splat_constant(long, 4 * k))
        shift = b.shl(b.and_(choice, splat_constant(long, 7)), splat_constant(long, 3))
        byte = b.and_(b.lshr(source, shift), splat_constant(long, 0xFF))
        replicate = b.icmp_unsigned("!=", b.and_(choice, splat_constant(long, 8)), splat_constant(long, 0))
        negative = b.icmp_unsigned("!=", b.and_(byte, splat_constant(long, 0x80)), splat_constant(long, 0))
        sign = b.select(negative, splat_constant(long, 0xFF), splat_constant(long, 0))
        result = b.or_(result, b.shl(b.select(replicate, sign, byte), splat_constant(long, 8 * k)))
    return b.trunc(result, x.type)


def _high_half(signed: bool) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value, y: Value) -> Value:
        width = _scalar(x.type).width
        wide = typed(x, ir.IntType(2 * width))
        extend = b.sext if signed else b.zext
        return b.trunc(b.lshr(b.mul(extend(x, wide), extend(y, wide)), splat_constant(wide, width)), x.type)

    return emit


def _mul24(signed: bool) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value, y: Value) -> Value:
        eight, back = splat_constant(x.type, 8), b.ashr if signed else b.lshr
        return b.mul(*(back(b.shl(a, eight), eight) for a in (x, y)))

    return emit


def _sad(signed: bool) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
        larger = (b.icmp_signed if signed else b.icmp_unsigned)(">", x, y)
        return b.add(b.select(larger, b.sub(x, y), b.sub(y, x)), z)

    return emit


def _half_sum(signed: bool, up: bool) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value, y: Value) -> Value:
        half = (b.ashr if signed else b.lshr)(b.xor(x, y), splat_constant(x.type, 1))
        return b.sub(b.or_(x, y), half) if up else b.add(b.and_(x, y), half)

    return emit


def _first_set(b: ir.IRBuilder, x: Value) -> Value:
    zeros = call(b, f"llvm.cttz.{vmath.mangle(x.type)}", x.type, [x, ir.Constant(ir.IntType(1), 0)])
    place = b.add(zeros, splat_constant(x.type, 1))
    zero = splat_constant(x.type, 0)
    return _to_i32(b, b.select(b.icmp_unsigned("==", x, zero), zero, place))


def _leading_zeros(b: ir.IRBuilder, x: Value) -> Value:
    return _to_i32(b, call(b, f"llvm.ctlz.{vmath.mangle(x.type)}", x.type, [x, ir.Constant(ir.IntType(1), 0)]))


def _to_i32(b: ir.IRBuilder, x: Value) -> Value:
    return x if _scalar(x.type) == I32 else b.trunc(x, typed(x, I32))


def _absolute(b: ir.IRBuilder, x: Value) -> Value:
    return b.select(b.icmp_signed("<", x, splat_constant(x.type, 0)), b.neg(x), x)


def _from_words(b: ir.IRBuilder, high: Value, low: Value) -> Value:
    long = typed(high, I64)
    bits = b.or_(b.shl(b.zext(high, long), splat_constant(long, 32)), b.zext(low, long))
    return b.bitcast(bits, typed(high, F64))


def _word(shift: int) -> Callable[..., Value]:
    def emit(b: ir.IRBuilder, x: Value) -> Value:
        bits = b.bitcast(x, typed(x, I64))
        return b.trunc(b.lshr(bits, splat_constant(bits.type, shift)), typed(x, I32))

    return emit


_WHOLE: dict[str, Callable[..., Value]] = {
    "clz": _leading_zeros,
    "popc": lambda b, x: _to_i32(b, intrinsic(b, "ctpop", (x,))),
    "brev": lambda b, x: intrinsic(b, "bitreverse", (x,)),
    "ffs": _first_set,
    "byte_perm": _byte_perm,
    "mulhi": _high_half(signed=True),
    "umulhi": _high_half(signed=False),
    "mul64hi": _high_half(signed=True),
    "umul64hi": _high_half(signed=False),
    "mul24": _mul24(signed=True),
    "umul24": _mul24(signed=False),
    "sad": _sad(signed=True),
    "usad": _sad(signed=False),
    "abs": _absolute,
    "llabs": _absolute,
    "hadd": _half_sum(signed=True, up=False),
    "uhadd": _half_sum(signed=False, up=False),
    "rhadd": _half_sum(signed=True, up=True),
    "urhadd": _half_sum(signed=False, up=True),
    "hiloint2double": _from_words,
    "double2loint": _word(0),
    "double2hiint": _word(32),
}
# Of one float, answered by an int32.
_CLASSES: dict[str, Callable[[ir.IRBuilder, Value], Value]] = {
    "isnan": lambda b, x: b.fcmp_unordered("uno", x, x),
    "isinf": lambda b, x: b.fcmp_ordered("==", intrinsic(b, "fabs", (x,)), _c(x, _INFINITY)),
    "finite": lambda b, x: b.fcmp_ordered("<", intrinsic(b, "fabs", (x,)), _c(x, _INFINITY)),
    "isfinite": lambda b, x: b.fcmp_ordered("<", intrinsic(b, "fabs", (x,)), _c(x, _INFINITY)),
    "signbit": lambda b, x: _negative(b, x),
}


def _negative(b: ir.IRBuilder, x: Value) -> Value:
    bits = b.bitcast(x, typed(x, I32 if _scalar(x.type) == F32 else I64))
    return b.icmp_signed("<", bits, splat_constant(bits.type, 0))


# --------------------------------------------------------------------------------------------------------------- lookup

_ROUNDED = re.compile(r"(?P<type>[fd]?)(?P<operation>add|sub|mul|div|fmaf?|sqrt|rcp|rsqrt)_(?P<mode>r[nzdu])")
_CONVERSION = re.compile(
    r"(?P<from>float|double|int|uint|ll|ull)2(?P<to>float|double|int|uint|ll|ull)_(?P<mode>r[nzdu])"
)
_BITS = re.compile(r"(float|double|int|uint|longlong)_as_(float|double|int|uint|longlong)")
# CUDA's fast variants are as good as the ordinary ones here.
_FAST = re.compile(r"fast_(exp|exp10|log|log2|log10|sin|cos|tan|tanh|pow)")


def emit_extern(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    """`tt.extern_elementwise`, on scalars or vectors.

    Raises:
        Unlowered: not a function of libdevice, or one without a meaning here.
    """
    symbol = str(op.attributes["symbol"])
    if not symbol.startswith("__nv_"):
        raise Unlowered(f"external function {symbol!r}; libdevice's (`__nv_*`) are known")
    name = symbol.removeprefix("__nv_")
    result = register_type(op.results[0].type)
    elements = [str(element_type(operand.type)) for operand in op.operands]
    found = _not_of_libm(name, elements, result)
    if found is not None:
        return found(b, *args)
    base = name.removesuffix("f") if "f32" in elements else name
    base = base.removesuffix("d") if base.removesuffix("d") in _CLASSES else base
    if match := _FAST.fullmatch(base):
        base = match[1]
    float_only = elements[0] in ("f32", "f64") and len(set(elements)) == 1
    if float_only and base in _CLASSES:
        return b.zext(_CLASSES[base](b, args[0]), typed(args[0], result))
    if float_only and base in ("llrint", "llround"):
        whole = intrinsic(b, base.removeprefix("ll"), (args[0],))
        return intrinsic(b, "fptosi.sat", (whole,), typed(args[0], result))
    suffix = "f" if "f32" in elements else ""
    if float_only and base == "ilogb":
        return per_lane(b, f"ilogb{suffix}", args, I32)
    if base in ("ldexp", "scalbn") and elements[1:] == ["i32"]:
        return per_lane(b, f"{base}{suffix}", args, _scalar(args[0].type))
    if base in ("jn", "yn") and elements[0] == "i32":
        return per_lane(b, f"{base}{suffix}", args)
    if base == "powi" and elements[1:] == ["i32"]:
        # In float64, where every int32 is a number.
        power = per_lane(
            b, "pow", [float_to_float(b, args[0], elements[0], "f64"), b.sitofp(args[1], typed(args[1], F64))]
        )
        return float_to_float(b, power, "f64", elements[0])
    if float_only and result == register_type(op.operands[0].type):
        if base in _FLOAT:
            return _FLOAT[base](b, *args)
        if base in _LIBM:
            return function(b, base, elements[0], args)
    raise Unlowered(f"libdevice function {symbol!r} on {', '.join(elements)}")


def _not_of_libm(name: str, elements: Sequence[str], result: ir.Type) -> Callable[..., Value] | None:
    """What libdevice adds to libm: integers, conversions, roundings."""
    if all(element in ("i32", "i64") for element in elements):
        base = name.removesuffix("ll") if name.removesuffix("ll") in _WHOLE else name
        if base in _WHOLE:
            return _WHOLE[base]
    if name in ("double2loint", "double2hiint"):
        return _WHOLE[name]
    if _BITS.fullmatch(name):
        return lambda b, x: b.bitcast(x, typed(x, result))
    if match := _CONVERSION.fullmatch(name):
        source, target, mode = match["from"], match["to"], match["mode"]
        if source in ("float", "double") and target in ("float", "double"):
            return lambda b, x: rounded(b, "cast", mode, [x], typed(x, F32))
        if source in ("float", "double"):
            return lambda b, x: _float_to_int(b, x, mode, not target.startswith("u"), result)
        return lambda b, x: float_of_integer(b, x, mode, not source.startswith("u"), _scalar(result))
    if match := _ROUNDED.fullmatch(name):
        operation = match["operation"].removesuffix("f")
        if operation == "rsqrt":  # of float32, to nearest: in float64, and rounded once more
            return lambda b, x: b.fptrunc(_FLOAT["rsqrt"](b, b.fpext(x, typed(x, F64))), x.type)
        return lambda b, *args: rounded(b, operation, match["mode"], args)
    return None
