"""Conversions between MLIR's element types, on scalars or on vectors of any width alike.

Narrowing rounds to nearest even, once; with `rounding = rtz` towards zero. What is too large for an 8-bit float becomes
its largest finite number, infinities included, and NaN stays NaN: PTX's `cvt.rn.satfinite`, which is what Triton emits
on the hardware that has these types. A float that no integer of the target's type is near becomes the nearest that
there is, and NaN becomes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from esper_triton.cpu.lowering.types import (
    F16,
    F32,
    F64,
    FLOAT8,
    FLOATS,
    I1,
    I8,
    I16,
    I32,
    Float8,
    Unlowered,
    element_type,
    memory_type,
    register_type,
)
from esper_triton.cpu.lowering.vmath import Value, intrinsic, splat_constant, typed
from esper_triton.cpu.mlir import Operation

__all__ = ["CASTS", "chosen_in_float32", "float_to_float", "in_float32"]

_TOWARDS_ZERO, _TO_NEAREST_EVEN = 0, 1  # triton's enum of rounding modes
_BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, **dict.fromkeys(FLOAT8, 8)}
_MANTISSA_F32, _BIAS_F32 = 23, 127


def float_to_float(b: ir.IRBuilder, x: Value, source: str, target: str, *, towards_zero: bool = False) -> Value:
    """`x`, of MLIR type `source`, as `target`: widened exactly, or rounded once.

    Args:
        towards_zero: round towards zero instead of to the nearest, ties to even.
    """
    if source == target:
        return x
    if source in FLOAT8:
        return float_to_float(b, _float8_to_float32(b, x, source), "f32", target, towards_zero=towards_zero)
    if source == "bf16":
        widened = b.bitcast(b.shl(b.zext(x, typed(x, I32)), splat_constant(typed(x, I32), 16)), typed(x, F32))
        return float_to_float(b, widened, "f32", target, towards_zero=towards_zero)
    if source == "f64" and target in ("f16", "bf16", *FLOAT8):
        return float_to_float(b, _round_to_odd(b, x), "f32", target, towards_zero=towards_zero)
    if target in FLOAT8:
        return _float32_to_float8(b, float_to_float(b, x, source, "f32"), FLOAT8[target], towards_zero)
    if target == "bf16":
        return _float32_to_bfloat16(b, float_to_float(b, x, source, "f32"), towards_zero)
    result = typed(x, FLOATS[target])
    if _BITS[target] > _BITS[source]:
        return b.fpext(x, result)
    narrow = b.fptrunc(x, result)
    return _not_beyond(b, narrow, x) if towards_zero else narrow


def in_float32(b: ir.IRBuilder, name: str, args: Sequence[Value], f: Callable[..., Value]) -> Value:
    """`f` of arguments of MLIR's float type `name`, computed in float32 and rounded back."""
    return float_to_float(b, f(*(float_to_float(b, a, name, "f32") for a in args)), "f32", name)


def chosen_in_float32(b: ir.IRBuilder, name: str, args: Sequence[Value], f: Callable[..., Value]) -> Value:
    """Like `in_float32`, of an `f` whose value is one of its arguments or minus one: infinity stays what it is."""
    if name != "f8E5M2":
        return in_float32(b, name, args, f)
    value = f(*(float_to_float(b, a, name, "f32") for a in args))
    half = b.bitcast(b.fptrunc(value, typed(value, F16)), typed(value, I16))  # of whose bits these are the upper ones
    return b.trunc(b.lshr(half, splat_constant(half.type, 8)), typed(value, I8))


def _not_beyond(b: ir.IRBuilder, narrow: Value, x: Value) -> Value:
    # One step back towards zero where rounding to nearest went away from it; from infinity that is the largest number.
    integer = typed(narrow, I16 if _scalar(narrow.type) == F16 else I32)
    back = b.fpext(narrow, x.type)
    away = b.fcmp_ordered(">", intrinsic(b, "fabs", (back,)), intrinsic(b, "fabs", (x,)))
    return b.bitcast(b.sub(b.bitcast(narrow, integer), b.zext(away, integer)), narrow.type)


def _round_to_odd(b: ir.IRBuilder, x: Value) -> Value:
    # f64 to f32 such that a second rounding to 11 bits or fewer is as if there had been one (Boldo and Melquiond 2008):
    # truncate, then set the last bit if anything was lost.
    single = b.fptrunc(x, typed(x, F32))
    inexact = b.zext(b.fcmp_ordered("!=", b.fpext(single, x.type), x), typed(x, I32))
    truncated = b.bitcast(_not_beyond(b, single, x), typed(x, I32))
    return b.bitcast(b.or_(truncated, inexact), single.type)


def _float32_to_bfloat16(b: ir.IRBuilder, x: Value, towards_zero: bool) -> Value:
    integer = typed(x, I32)
    bits = b.bitcast(x, integer)
    rounded = bits
    if not towards_zero:
        odd = b.and_(b.lshr(bits, splat_constant(integer, 16)), splat_constant(integer, 1))
        rounded = b.add(bits, b.add(odd, splat_constant(integer, 0x7FFF)))
    quiet = b.or_(bits, splat_constant(integer, 0x400000))  # a NaN could become an infinity
    chosen = b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)
    return b.trunc(b.lshr(chosen, splat_constant(integer, 16)), typed(x, I16))


def _float8_to_float32(b: ir.IRBuilder, x: Value, source: str) -> Value:
    kind = FLOAT8[source]
    # Widened to a half, whose exponent the 8-bit float's has the place of, and scaled by the difference of the biases.
    # A half has subnormal numbers at no cost, which float32 on many processors has not.
    half, integer = typed(x, I16), typed(x, I32)
    wide = b.zext(x, half)
    sign = b.shl(b.and_(wide, splat_constant(half, 0x80)), splat_constant(half, 8))
    magnitude = b.and_(wide, splat_constant(half, 0x7F))
    if source == "f8E5M2FNUZ":  # its largest exponents are numbers, a half's are not
        bits = b.shl(b.zext(magnitude, integer), splat_constant(integer, _MANTISSA_F32 - kind.mantissa))
        value = b.fmul(b.bitcast(bits, typed(x, F32)), splat_constant(typed(x, F32), 2.0 ** (_BIAS_F32 - kind.bias)))
        value = b.bitcast(
            b.or_(b.bitcast(value, integer), b.shl(b.zext(sign, integer), splat_constant(integer, 16))), value.type
        )
    else:
        bits = b.or_(sign, b.shl(magnitude, splat_constant(half, 10 - kind.mantissa)))
        value = b.fpext(b.bitcast(bits, typed(x, F16)), typed(x, F32))
        if kind.bias != 15:
            value = b.fmul(value, splat_constant(value.type, 2.0 ** (15 - kind.bias)))
    if source == "f8E5M2":
        return value  # infinity and NaN are where a half has them
    tested = x if kind.unsigned_zero else b.and_(x, splat_constant(x.type, 0x7F))
    code = splat_constant(x.type, kind.nan - 0x100 if kind.nan > 0x7F else kind.nan)
    return b.select(b.icmp_unsigned("==", tested, code), splat_constant(value.type, float("nan")), value)


def _float32_to_float8(b: ir.IRBuilder, x: Value, kind: Float8, towards_zero: bool) -> Value:
    integer = typed(x, I32)
    bits = b.bitcast(x, integer)
    magnitude = b.and_(bits, splat_constant(integer, 0x7FFFFFFF))
    dropped = _MANTISSA_F32 - kind.mantissa
    # A normal number: round the bits as an integer, whose carry runs into the exponent as it should, and shift.
    rounded = magnitude
    if not towards_zero:
        odd = b.and_(b.lshr(magnitude, splat_constant(integer, dropped)), splat_constant(integer, 1))
        rounded = b.add(magnitude, b.add(odd, splat_constant(integer, (1 << (dropped - 1)) - 1)))
    normal = b.sub(
        b.lshr(rounded, splat_constant(integer, dropped)),
        splat_constant(integer, (_BIAS_F32 - kind.bias) << kind.mantissa),
    )
    # A subnormal one: added to the power of two whose last bit is worth the 8-bit float's smallest number, the adder
    # rounds, and the sum's mantissa is the code.
    power = splat_constant(x.type, 2.0 ** (1 - kind.bias - kind.mantissa + _MANTISSA_F32))
    absolute = b.bitcast(magnitude, x.type)
    total = b.fadd(absolute, power)
    small = b.sub(b.bitcast(total, integer), b.bitcast(power, integer))
    if towards_zero:
        small = b.sub(small, b.zext(b.fcmp_ordered(">", b.fsub(total, power), absolute), integer))
    least = splat_constant(integer, (_BIAS_F32 + 1 - kind.bias) << _MANTISSA_F32)
    code = b.select(b.icmp_unsigned("<", magnitude, least), small, normal)
    code = intrinsic(b, "smin", (code, splat_constant(integer, kind.largest)))
    sign = b.and_(b.lshr(bits, splat_constant(integer, 24)), splat_constant(integer, 0x80))
    if kind.unsigned_zero:
        sign = b.select(b.icmp_unsigned("==", code, splat_constant(integer, 0)), code, sign)
    code = b.select(b.fcmp_unordered("uno", x, x), splat_constant(integer, kind.nan), b.or_(code, sign))
    return b.trunc(code, typed(x, I8))


def _scalar(type_: ir.Type) -> ir.Type:
    return type_.element if isinstance(type_, ir.VectorType) else type_


def _names(op: Operation) -> tuple[str, str]:
    return str(element_type(op.operands[0].type)), str(element_type(op.results[0].type))


def _float_cast(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    source, target = _names(op)
    if source not in FLOATS or target not in FLOATS:
        raise Unlowered(f"conversion from {source} to {target}")
    mode = op.attributes.get("rounding", _TO_NEAREST_EVEN)
    if mode is not None and mode not in (_TOWARDS_ZERO, _TO_NEAREST_EVEN):
        raise Unlowered(f"rounding mode {mode} of the conversion from {source} to {target}")
    return float_to_float(b, args[0], source, target, towards_zero=mode == _TOWARDS_ZERO)


Emit = Callable[[ir.IRBuilder, Operation, list[Value]], Value]


def _int_cast(method: str) -> Emit:
    return lambda b, op, args: getattr(b, method)(args[0], typed(args[0], register_type(op.results[0].type)))


def _index_cast(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    source, target = register_type(op.operands[0].type), register_type(op.results[0].type)
    if source.width == target.width:
        return args[0]
    return (b.sext if target.width > source.width else b.trunc)(args[0], typed(args[0], target))


def _int_to_float(method: str) -> Emit:
    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        source, target = _names(op)
        if target in ("f32", "f64"):
            return getattr(b, method)(args[0], typed(args[0], FLOATS[target]))
        # Through f64, so that the result is rounded once. What f64 cannot hold of an i64 (its low 11 bits)
        # is first rounded to odd, which never lands on a tie.
        if source == "i64":
            args = [_sticky(b, args[0], method == "sitofp")]
        wide = getattr(b, method)(args[0], typed(args[0], F64))
        return float_to_float(b, wide, "f64", target)

    return emit


def _sticky(b: ir.IRBuilder, x: Value, signed: bool) -> Value:
    low, kept = splat_constant(x.type, 0x7FF), splat_constant(x.type, ~0x7FF)
    lost = b.zext(b.icmp_unsigned("!=", b.and_(x, low), splat_constant(x.type, 0)), x.type)
    odd = b.or_(b.and_(x, kept), b.shl(lost, splat_constant(x.type, 11)))
    # x is small iff x + 2^53 lies in [0, 2^54) (signed), or x below 2^53 (unsigned).
    limit = splat_constant(x.type, 1 << (54 if signed else 53))
    shifted = b.add(x, splat_constant(x.type, 1 << 53)) if signed else x
    return b.select(b.icmp_unsigned("<", shifted, limit), x, odd)


def _float_to_int(signed: bool) -> Emit:
    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        source, _ = _names(op)
        x = args[0] if source in ("f32", "f64") else float_to_float(b, args[0], source, "f32")
        # The plain conversion is poison out of range.
        return intrinsic(b, f"fpto{'s' if signed else 'u'}i.sat", (x,), typed(x, register_type(op.results[0].type)))

    return emit


def _bitcast(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    source, target = (register_type(t) for t in (op.operands[0].type, op.results[0].type))
    if source == target:
        return args[0]
    if memory_type(op.operands[0].type) == memory_type(op.results[0].type):  # i1 and i8
        return b.zext(args[0], typed(args[0], target)) if source == I1 else b.trunc(args[0], typed(args[0], target))
    return b.bitcast(args[0], typed(args[0], target))


CASTS: dict[str, Emit] = {
    "arith.extf": _float_cast,
    "arith.truncf": _float_cast,
    "tt.fp_to_fp": _float_cast,
    "arith.extsi": _int_cast("sext"),
    "arith.extui": _int_cast("zext"),
    "arith.trunci": _int_cast("trunc"),
    "arith.index_cast": _index_cast,
    "arith.sitofp": _int_to_float("sitofp"),
    "arith.uitofp": _int_to_float("uitofp"),
    "arith.fptosi": _float_to_int(True),
    "arith.fptoui": _float_to_int(False),
    "arith.bitcast": _bitcast,
    "tt.bitcast": _bitcast,
    "tt.int_to_ptr": lambda b, op, args: args[0],
    "tt.ptr_to_int": lambda b, op, args: args[0],
}
