"""Arithmetic on floats that is rounded towards zero, downwards or upwards.

The processor does it, in functions of the kernel's module that set its rounding mode and put it back. Their operations
are LLVM's constrained ones, which are not moved across that.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from esper_triton.cpu.lowering.types import F32, F64, I32, I64
from esper_triton.cpu.lowering.vmath import (
    Value,
    call,
    call_out_of_line,
    intrinsic,
    mangle,
    splat_constant,
    typed,
)

__all__ = ["float_of_integer", "rounded"]

_MODES = {"rz": 0, "rn": 1, "ru": 2, "rd": 3}  # as `llvm.set.rounding` counts
_LLVM = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv", "sqrt": "sqrt", "fma": "fma", "cast": "fptrunc"}


def rounded(b: ir.IRBuilder, operation: str, mode: str, args: Sequence[Value], result: ir.Type | None = None) -> Value:
    """`operation` of floats of one type, rounded as `mode` says.

    Args:
        operation: add, sub, mul, div, rcp (the inverse), sqrt, fma, or cast to the narrower type `result`.
        mode: rn (to nearest, ties to even), rz (towards zero), rd (downwards) or ru (upwards).
    """
    if operation == "rcp":
        operation, args = "div", [splat_constant(args[0].type, 1.0), *args]
    result = result or args[0].type
    if mode == "rn":
        return _to_nearest(b, operation, args, result)
    name = f"llvm.experimental.constrained.{_LLVM[operation]}.{mangle(result)}"
    name += f".{mangle(args[0].type)}" if operation == "cast" else ""

    def body(inner: ir.IRBuilder, *inner_args: Value) -> Value:
        _mark_strict(inner.function)
        _set_mode(inner, mode)
        value = _constrained(inner, name, inner_args, result)
        _set_mode(inner, "rn")
        return value

    return call_out_of_line(b, f"{operation}.{mode}.{mangle(args[0].type)}", result, args, body)


def _to_nearest(b: ir.IRBuilder, operation: str, args: Sequence[Value], result: ir.Type) -> Value:
    if operation == "cast":
        return b.fptrunc(args[0], result)
    return intrinsic(b, operation, args) if operation in ("sqrt", "fma") else getattr(b, _LLVM[operation])(*args)


def _set_mode(b: ir.IRBuilder, mode: str) -> None:
    _mark_strict(call(b, "llvm.set.rounding", ir.VoidType(), [ir.Constant(I32, _MODES[mode])]))


def _mark_strict(function_or_call: Value) -> None:
    # An attribute that llvmlite has not heard of, and would refuse.
    set.add(function_or_call.attributes, "strictfp")


def _constrained(b: ir.IRBuilder, name: str, args: Sequence[Value], result: ir.Type) -> Value:
    module = b.function.module
    words = [ir.MetaDataString(module, word) for word in ("round.dynamic", "fpexcept.strict")]
    value = call(b, name, result, [*args, *words])
    _mark_strict(value)
    return value


def float_of_integer(b: ir.IRBuilder, x: Value, mode: str, signed: bool, target: ir.Type) -> Value:
    """An int32 or int64, scalar or vector, as a float of the scalar type `target`, rounded as `mode` says."""
    convert, wide, result = b.sitofp if signed else b.uitofp, typed(x, F64), typed(x, target)
    if mode == "rn":
        return convert(x, result)
    if x.type == typed(x, I32):
        value = convert(x, wide)
    else:  # in two parts that are exact in float64
        low = b.uitofp(b.and_(x, splat_constant(typed(x, I64), 0x7FF)), wide)
        value = rounded(b, "add", mode, [convert(b.and_(x, splat_constant(x.type, ~0x7FF)), wide), low])
    # A second rounding in one direction leads to where one would have.
    return rounded(b, "cast", mode, [value], result) if target == F32 else value
