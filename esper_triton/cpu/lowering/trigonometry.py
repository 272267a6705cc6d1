"""Sine and cosine of float32 scalars and vectors, as LLVM IR."""

from __future__ import annotations

from llvmlite import ir

from esper_triton.cpu.lowering.types import F64, I32
from esper_triton.cpu.lowering.vmath import (
    Value,
    call_out_of_line,
    fma,
    intrinsic,
    per_lane,
    polynomial,
    round_to_int,
    splat_constant,
    typed,
)

__all__ = ["emit_cos", "emit_sin"]

# sin(r) = r + r * u * P(u) and cos(r) = 1 + u * Q(u), u = r^2, on |r| <= 0.82; relative errors 5.4e-9 and 1.0e-10.
_SIN = (-0.16666651026902485, 0.008331939484969159, -0.0001948597533338676)
_COS = (-0.49999999564539843, 0.04166660634679129, -0.0013886258540248663, 2.4345467928800557e-05)
# pi / 2 in two parts. The first has 33 bits, so that its product with a number of 20 bits is exact in float64.
_HALF_PI = (1.5707963267341256, 6.077100506506192e-11)
_REDUCED = 0x49800000  # bits of 2^20: up to there a float32 is fewer than 2^20 quarter turns
_INFINITY, _SIGN = 0x7F800000, 0x80000000


def emit_sin(b: ir.IRBuilder, x: Value) -> Value:
    """sin(x): Cody-Waite reduction in float64 up to 2^20, libm's function where a lane is beyond."""
    return _by_quarter_turns(b, x, "sinf", 0)


def emit_cos(b: ir.IRBuilder, x: Value) -> Value:
    """cos(x), like `emit_sin`: a quarter turn ahead."""
    return _by_quarter_turns(b, x, "cosf", 1)


def _by_quarter_turns(b: ir.IRBuilder, x: Value, symbol: str, ahead: int) -> Value:
    integer, wide = typed(x, I32), typed(x, F64)
    magnitude = intrinsic(b, "fabs", (x,))
    turns, count = round_to_int(b, magnitude, 0.6366197723675814)
    exact, r = b.fpext(turns, wide), b.fpext(magnitude, wide)
    for part in _HALF_PI:  # the closest that a float32 comes to a multiple of pi / 2 is far above what is lost here
        r = fma(b, exact, splat_constant(wide, -part), r)
    r = b.fptrunc(r, x.type)
    square = b.fmul(r, r)
    sine = fma(b, b.fmul(r, square), polynomial(b, square, _SIN), r)
    cosine = fma(b, square, polynomial(b, square, _COS), splat_constant(x.type, 1.0))

    count = b.add(count, splat_constant(integer, ahead)) if ahead else count
    odd = b.icmp_unsigned("!=", b.and_(count, splat_constant(integer, 1)), splat_constant(integer, 0))
    value = b.bitcast(b.select(odd, cosine, sine), integer)
    half_turns = b.shl(b.and_(count, splat_constant(integer, 2)), splat_constant(integer, 30))
    value = b.xor(value, half_turns)
    if not ahead:  # sin(-x) = -sin(x); of zeros too, since the sine of +0 came out as +0
        value = b.xor(value, b.and_(b.bitcast(x, integer), splat_constant(integer, _SIGN)))
    return _unless_large(b, x, magnitude, b.bitcast(value, x.type), symbol)


def _unless_large(b: ir.IRBuilder, x: Value, magnitude: Value, value: Value, symbol: str) -> Value:
    # Infinities and NaN have led to NaN already.
    integer = typed(x, I32)
    above = b.sub(b.bitcast(magnitude, integer), splat_constant(integer, _REDUCED))
    large = b.icmp_unsigned("<", above, splat_constant(integer, _INFINITY - _REDUCED))
    if isinstance(x.type, ir.VectorType):
        lanes = ir.IntType(x.type.count)
        large = b.icmp_unsigned("!=", b.bitcast(large, lanes), ir.Constant(lanes, 0))
    before = b.block
    with b.if_then(large, likely=False):
        exact = _by_libm(b, x, symbol)
        taken = b.block
    result = b.phi(x.type)
    result.add_incoming(value, before)
    result.add_incoming(exact, taken)
    return result


def _by_libm(b: ir.IRBuilder, x: Value, symbol: str) -> Value:
    if not isinstance(x.type, ir.VectorType):
        return per_lane(b, symbol, [x])
    name = f"{symbol}.{x.type.count}"
    return call_out_of_line(b, name, x.type, [x], lambda inner, lanes: per_lane(inner, symbol, [lanes]))
