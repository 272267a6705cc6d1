"""Element-wise operations of TTIR as LLVM IR, on scalars or on vectors of any width alike.

How MLIR's element types are held in LLVM registers: pointers are i64 addresses, bf16 is i16 bits (LLVM would call a
conversion routine that not every libgcc has), everything else is itself. In memory i1 takes a byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering import vmath
from esper_triton.cpu.lowering.vmath import Value, call, intrinsic, splat_constant, typed, undefined
from esper_triton.cpu.mlir import Operation, PointerType, ScalarType, TensorType, Type

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_FLOATS = {"f16": F16, "bf16": I16, "f32": F32, "f64": F64}


class Unlowered(Exception):
    """This operation, or this form of it, has no lowering; the caller adds operation, kernel and source line."""


def element_type(type_: Type) -> Type:
    """The element of a tensor type; any other type itself."""
    return type_.element if isinstance(type_, TensorType) else type_


def register_type(type_: Type) -> ir.Type:
    """The LLVM type that one element of an MLIR type has in a register."""
    element = element_type(type_)
    if isinstance(element, PointerType):
        return I64
    if isinstance(element, ScalarType):
        if element.name in _FLOATS:
            return _FLOATS[element.name]
        if element.is_integer and element.bits in (1, 8, 16, 32, 64):
            return ir.IntType(element.bits)
    raise Unlowered(f"element type {element}")


def memory_type(type_: Type) -> ir.Type:
    """The LLVM type of one element in memory."""
    register = register_type(type_)
    return I8 if register == I1 else register


def size_of(type_: Type) -> int:
    """Bytes of one element in memory."""
    register = memory_type(type_)
    if isinstance(register, ir.IntType):
        return int(register.width) // 8
    return {"half": 2, "float": 4, "double": 8}[str(register)]


def constant(type_: Type, value: Any) -> ir.Constant:
    """An element's constant in its register type."""
    element = element_type(type_)
    if isinstance(element, ScalarType) and element.name == "bf16":
        return ir.Constant(I16, _bfloat16_bits(float(value)))
    register = register_type(type_)
    if isinstance(register, ir.IntType):
        width = register.width
        integer = int(value) & ((1 << width) - 1)
        return ir.Constant(register, integer - (1 << width) if width > 1 and integer >> (width - 1) else integer)
    return ir.Constant(register, float(value))


def _bfloat16_bits(value: float) -> int:
    if value != value:
        return 0x7FC0
    try:
        bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        bits = 0x7F800000 if value > 0 else 0xFF800000
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF  # the parser hands over exact bf16 values


# ---------------------------------------------------------------------------------------------------------- conversions


def float_to_float(b: ir.IRBuilder, x: Value, source: str, target: str) -> Value:
    """Round to nearest even, or widen exactly, between f16, bf16, f32 and f64."""
    if source == target:
        return x
    if source == "bf16":
        widened = b.shl(b.zext(x, typed(x, I32)), splat_constant(typed(x, I32), 16))
        return float_to_float(b, b.bitcast(widened, typed(x, F32)), "f32", target)
    if source == "f64" and target in ("f16", "bf16"):
        return float_to_float(b, _round_to_odd(b, x), "f32", target)
    if target == "bf16":
        return _float32_to_bfloat16(b, float_to_float(b, x, source, "f32"))
    result = typed(x, _FLOATS[target])
    widths = {"f16": 16, "f32": 32, "f64": 64}
    return b.fpext(x, result) if widths[target] > widths[source] else b.fptrunc(x, result)


def _float32_to_bfloat16(b: ir.IRBuilder, x: Value) -> Value:
    integer = typed(x, I32)
    bits = b.bitcast(x, integer)
    odd = b.and_(b.lshr(bits, splat_constant(integer, 16)), splat_constant(integer, 1))
    rounded = b.add(bits, b.add(odd, splat_constant(integer, 0x7FFF)))
    quiet = b.or_(bits, splat_constant(integer, 0x400000))  # rounding could carry a NaN into infinity
    chosen = b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)
    return b.trunc(b.lshr(chosen, splat_constant(integer, 16)), typed(x, I16))


def _round_to_odd(b: ir.IRBuilder, x: Value) -> Value:
    # f64 to f32 such that a second rounding to 11 bits or fewer is as if there had been one (Boldo and Melquiond 2008):
    # truncate, then set the last bit if anything was lost.
    single = b.fptrunc(x, typed(x, F32))
    integer = typed(x, I32)
    back = b.fpext(single, x.type)
    away = b.fcmp_ordered(">", intrinsic(b, "fabs", (back,)), intrinsic(b, "fabs", (x,)))
    bits = b.bitcast(single, integer)
    truncated = b.sub(bits, b.zext(away, integer))
    inexact = b.zext(b.fcmp_ordered("!=", back, x), integer)
    return b.bitcast(b.or_(truncated, inexact), single.type)


def _in_float32(b: ir.IRBuilder, name: str, args: Sequence[Value], f: Callable[..., Value]) -> Value:
    wide = [float_to_float(b, a, name, "f32") for a in args]
    return float_to_float(b, f(*wide), "f32", name)


# ----------------------------------------------------------------------------------------------------------- arithmetic

Emit = Callable[[ir.IRBuilder, Operation, list[Value]], Value]
TABLE: dict[str, Emit] = {}


def _float_name(op: Operation) -> str:
    element = element_type(op.results[0].type)
    assert isinstance(element, ScalarType)
    return element.name


def _float_op(name: str, f: Callable[..., Value]) -> None:
    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        element = _float_name(op)
        if element == "bf16":
            return _in_float32(b, element, args, lambda *wide: f(b, *wide))
        return f(b, *args)

    TABLE[name] = emit


def _minmax(name: str) -> Callable[..., Value]:
    # maximum/minimum let NaN through, maxnum/minnum prefer the number; all of them order -0 below +0, as the hardware
    # that Triton was made for does. LLVM's own maxnum leaves the sign of zero open, so its maximumnum stands for it.
    spelled = name if name.endswith("imum") else f"{name[:3]}imumnum"
    return lambda b, x, y: intrinsic(b, spelled, (x, y))


for _name, _method in {"addf": "fadd", "subf": "fsub", "mulf": "fmul", "divf": "fdiv", "remf": "frem"}.items():
    _float_op(f"arith.{_name}", lambda b, x, y, _m=_method: getattr(b, _m)(x, y))
_float_op("arith.negf", lambda b, x: b.fneg(x))
for _name in ("maximum", "minimum", "maxnum", "minnum"):
    _float_op(f"arith.{_name}f", _minmax(_name))
_float_op("tt.precise_divf", lambda b, x, y: b.fdiv(x, y))
_float_op("tt.precise_sqrt", lambda b, x: intrinsic(b, "sqrt", (x,)))
_float_op("math.sqrt", lambda b, x: intrinsic(b, "sqrt", (x,)))
_float_op("math.rsqrt", lambda b, x: b.fdiv(splat_constant(x.type, 1.0), intrinsic(b, "sqrt", (x,))))
_float_op("math.absf", lambda b, x: intrinsic(b, "fabs", (x,)))
_float_op("math.floor", lambda b, x: intrinsic(b, "floor", (x,)))
_float_op("math.ceil", lambda b, x: intrinsic(b, "ceil", (x,)))
_float_op("math.fma", lambda b, x, y, z: intrinsic(b, "fma", (x, y, z)))


def _int_op(name: str, method: str) -> None:
    TABLE[f"arith.{name}"] = lambda b, op, args: getattr(b, method)(*args)


for _name, _method in {
    "addi": "add", "subi": "sub", "muli": "mul", "andi": "and_", "ori": "or_", "xori": "xor",
}.items():  # fmt: skip
    _int_op(_name, _method)


def _division(name: str) -> None:
    # x86 traps on a zero divisor and on INT_MIN / -1, and a masked-off lane may well hold either. As on NVIDIA hardware
    # a zero divisor gives all ones (the remainder: the dividend) and INT_MIN / -1 wraps.
    signed, remainder = name.endswith("si"), name.startswith("rem")

    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        x, y = args
        one, zero, ones = (splat_constant(x.type, n) for n in (1, 0, -1))
        by_zero = b.icmp_unsigned("==", y, zero)
        divisor = b.select(by_zero, one, y)
        if signed:
            by_minus_one = b.icmp_signed("==", y, ones)
            divisor = b.select(by_minus_one, one, divisor)
            value = (b.srem if remainder else b.sdiv)(x, divisor)
            if not remainder:
                value = b.select(by_minus_one, b.sub(zero, x), value)
        else:
            value = (b.urem if remainder else b.udiv)(x, divisor)
        return b.select(by_zero, x if remainder else ones, value)

    TABLE[f"arith.{name}"] = emit


for _name in ("divsi", "divui", "remsi", "remui"):
    _division(_name)


def _shift(name: str, method: str) -> None:
    # A shift by the width or more is poison in LLVM; on the hardware that Triton was made for it empties the register.
    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        x, amount = args
        width = (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width
        inside = b.icmp_unsigned("<", amount, splat_constant(x.type, width))
        shifted = getattr(b, method)(x, b.select(inside, amount, splat_constant(x.type, 0)))
        if method == "ashr":
            emptied = b.ashr(x, splat_constant(x.type, width - 1))
        else:
            emptied = splat_constant(x.type, 0)
        return b.select(inside, shifted, emptied)

    TABLE[f"arith.{name}"] = emit


for _name, _method in {"shli": "shl", "shrsi": "ashr", "shrui": "lshr"}.items():
    _shift(_name, _method)

for _name, (_signed, _order) in {
    "maxsi": (True, ">"), "minsi": (True, "<"), "maxui": (False, ">"), "minui": (False, "<"),
}.items():  # fmt: skip

    def _emit_int_minmax(
        b: ir.IRBuilder, op: Operation, args: list[Value], _signed: bool = _signed, _order: str = _order
    ) -> Value:
        compare = b.icmp_signed if _signed else b.icmp_unsigned
        return b.select(compare(_order, *args), *args)

    TABLE[f"arith.{_name}"] = _emit_int_minmax

_INT_PREDICATES = ("==", "!=", "s<", "s<=", "s>", "s>=", "u<", "u<=", "u>", "u>=")
_FLOAT_PREDICATES = (
    "false", "o==", "o>", "o>=", "o<", "o<=", "o!=", "ord", "u==", "u>", "u>=", "u<", "u<=", "u!=", "uno", "true",
)  # fmt: skip


def _cmpi(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    predicate = _INT_PREDICATES[op.attributes["predicate"]]
    compare = b.icmp_unsigned if predicate.startswith("u") else b.icmp_signed
    return compare(predicate.lstrip("us"), *args)


def _cmpf(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    element = element_type(op.operands[0].type)
    assert isinstance(element, ScalarType)
    if element.name == "bf16":
        args = [float_to_float(b, a, "bf16", "f32") for a in args]
    predicate = _FLOAT_PREDICATES[op.attributes["predicate"]]
    if predicate in ("true", "false"):
        return splat_constant(typed(args[0], I1), int(predicate == "true"))
    if predicate in ("ord", "uno"):
        return (b.fcmp_ordered if predicate == "ord" else b.fcmp_unordered)(predicate, *args)
    return (b.fcmp_ordered if predicate[0] == "o" else b.fcmp_unordered)(predicate[1:], *args)


def _select(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    return b.select(*args)


TABLE["arith.cmpi"], TABLE["arith.cmpf"], TABLE["arith.select"] = _cmpi, _cmpf, _select


def _clampf(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    name = _float_name(op)
    propagate = op.attributes.get("propagateNan", 0) not in (0, False, None)

    def clamp(x: Value, low: Value, high: Value) -> Value:
        if propagate:
            return _minmax("minimum")(b, _minmax("maximum")(b, x, low), high)
        return _minmax("minnum")(b, _minmax("maxnum")(b, x, low), high)

    return _in_float32(b, name, args, clamp) if name == "bf16" else clamp(*args)


def _high_half(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    x, y = args
    width = (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width
    wide = typed(x, ir.IntType(2 * width))
    product = b.mul(b.zext(x, wide), b.zext(y, wide))
    return b.trunc(b.lshr(product, splat_constant(wide, width)), x.type)


TABLE["tt.clampf"], TABLE["tt.mulhiui"] = _clampf, _high_half
TABLE["math.absi"] = lambda b, op, args: b.select(
    b.icmp_signed("<", args[0], splat_constant(args[0].type, 0)), b.neg(args[0]), args[0]
)


# ---------------------------------------------------------------------------------------------------------------- casts


def _names(op: Operation) -> tuple[str, str]:
    return str(element_type(op.operands[0].type)), str(element_type(op.results[0].type))


def _float_cast(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    source, target = _names(op)
    if source not in _FLOATS or target not in _FLOATS:
        raise Unlowered(f"conversion from {source} to {target}")
    mode = op.attributes.get("rounding")
    if mode not in (None, 1):  # 0 is round towards zero, 1 nearest even
        raise Unlowered("rounding mode other than nearest even")
    return float_to_float(b, args[0], source, target)


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
        if target not in ("f16", "bf16"):
            return getattr(b, method)(args[0], typed(args[0], _FLOATS[target]))
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
        x = float_to_float(b, args[0], source, "f32") if source in ("f16", "bf16") else args[0]
        # The plain conversion is poison out of range; this one saturates, NaN to 0, as the hardware does.
        return intrinsic(b, f"fpto{'s' if signed else 'u'}i.sat", (x,), typed(x, register_type(op.results[0].type)))

    return emit


def _bitcast(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    source, target = (register_type(t) for t in (op.operands[0].type, op.results[0].type))
    if source == target:
        return args[0]
    if memory_type(op.operands[0].type) == memory_type(op.results[0].type):  # i1 and i8
        return b.zext(args[0], typed(args[0], target)) if source == I1 else b.trunc(args[0], typed(args[0], target))
    return b.bitcast(args[0], typed(args[0], target))


TABLE |= {
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


# ------------------------------------------------------------------------------------------------------------ functions


def _per_lane(b: ir.IRBuilder, function: str, args: Sequence[Value]) -> Value:
    # libm, one lane at a time: for what is too rare to have a vector form here.
    type_ = args[0].type
    if not isinstance(type_, ir.VectorType):
        return call(b, function, type_, args)
    result = undefined(type_)
    for lane in range(type_.count):
        index = ir.Constant(I32, lane)
        element = call(b, function, type_.element, [b.extract_element(a, index) for a in args])
        result = b.insert_element(result, element, index)
    return result


def _function(b: ir.IRBuilder, name: str, element: str, args: Sequence[Value]) -> Value:
    """libm's function `name` on f16, bf16, f32 or f64."""
    if element in ("f16", "bf16"):
        return _in_float32(b, element, args, lambda *wide: _function(b, name, "f32", wide))
    if element == "f64":
        return _per_lane(b, name, args)
    if name in vmath.FLOAT32:
        return vmath.FLOAT32[name](b, args[0])
    return _per_lane(b, f"{name}f", args)


LIBM = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erfc exp exp10 exp2 expm1 fdim fmod hypot lgamma log "
    "log10 log1p log2 nearbyint pow remainder rint round sin sinh tan tanh tgamma trunc".split()
)


def _math(name: str, b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    return _function(b, name, _float_name(op), args)


for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf"):
    TABLE[f"math.{_name}"] = partial(_math, _name)

_EXACT: dict[str, Callable[..., Value]] = {
    "sqrt": lambda b, x: intrinsic(b, "sqrt", (x,)),
    "rsqrt": lambda b, x: b.fdiv(splat_constant(x.type, 1.0), intrinsic(b, "sqrt", (x,))),
    "rcp_rn": lambda b, x: b.fdiv(splat_constant(x.type, 1.0), x),
    "fabs": lambda b, x: intrinsic(b, "fabs", (x,)),
    "floor": lambda b, x: intrinsic(b, "floor", (x,)),
    "ceil": lambda b, x: intrinsic(b, "ceil", (x,)),
    "trunc": lambda b, x: intrinsic(b, "trunc", (x,)),
    "rint": lambda b, x: intrinsic(b, "rint", (x,)),
    "nearbyint": lambda b, x: intrinsic(b, "rint", (x,)),
    "copysign": lambda b, x, y: intrinsic(b, "copysign", (x, y)),
    "fma": lambda b, x, y, z: intrinsic(b, "fma", (x, y, z)),
    "fmax": _minmax("maxnum"),
    "fmin": _minmax("minnum"),
    "fdiv_rn": lambda b, x, y: b.fdiv(x, y),
    "sqrt_rn": lambda b, x: intrinsic(b, "sqrt", (x,)),
}
_INFINITY = float("inf")
# Of one float, answered by an int32.
_CLASSES: dict[str, Callable[[ir.IRBuilder, Value], Value]] = {
    "isnan": lambda b, x: b.fcmp_unordered("uno", x, x),
    "isinf": lambda b, x: b.fcmp_ordered("==", intrinsic(b, "fabs", (x,)), splat_constant(x.type, _INFINITY)),
    "finite": lambda b, x: b.fcmp_ordered("<", intrinsic(b, "fabs", (x,)), splat_constant(x.type, _INFINITY)),
    "isfinite": lambda b, x: b.fcmp_ordered("<", intrinsic(b, "fabs", (x,)), splat_constant(x.type, _INFINITY)),
}
# CUDA's fast variants are as good as the ordinary ones here.
_FAST = {
    f"fast_{name}f": name for name in ("exp", "exp10", "log", "log2", "log10", "sin", "cos", "tan", "tanh", "pow")
} | {"fast_fdividef": "fdiv_rn", "div_rn": "fdiv_rn"}


def _extern(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    symbol = str(op.attributes["symbol"])
    if not symbol.startswith("__nv_"):
        raise Unlowered(f"external function {symbol!r}; libdevice's (`__nv_*`) are known")
    elements = {str(element_type(v.type)) for v in op.operands}
    element = elements.pop()
    base = symbol.removeprefix("__nv_")
    base = _FAST.get(base, base)
    names = [base, base.removesuffix("f"), base.removesuffix("d")]
    if element not in ("f32", "f64") or elements:
        raise Unlowered(f"libdevice function {symbol!r} on {', '.join([element, *elements])}")
    for name in names:
        if name in _CLASSES:
            return b.zext(_CLASSES[name](b, args[0]), typed(args[0], register_type(op.results[0].type)))
        if _float_name(op) != element:
            continue
        if name in _EXACT:
            return _EXACT[name](b, *args)
        if name in LIBM:
            return _function(b, name, element, args)
    raise Unlowered(f"libdevice function {symbol!r}")


TABLE["tt.extern_elementwise"] = _extern
