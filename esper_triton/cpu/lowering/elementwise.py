"""Element-wise operations of TTIR as LLVM IR, on scalars or on vectors of any width alike."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from esper_triton.cpu.lowering.casts import CASTS, chosen_in_float32, float_to_float, in_float32
from esper_triton.cpu.lowering.libdevice import emit_extern, function
from esper_triton.cpu.lowering.types import (
    F16,
    F32,
    F64,
    FLOAT8,
    I1,
    I8,
    I16,
    I32,
    I64,
    Unlowered,
    constant,
    element_type,
    memory_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.vmath import Value, intrinsic, splat_constant, typed
from esper_triton.cpu.mlir import Operation, ScalarType

__all__ = [
    "F16", "F32", "F64", "I1", "I8", "I16", "I32", "I64", "TABLE", "Unlowered", "constant", "element_type",
    "float_to_float", "memory_type", "register_type", "size_of",
]  # fmt: skip

_IN_FLOAT32 = ("bf16", *FLOAT8)

Emit = Callable[[ir.IRBuilder, Operation, list[Value]], Value]
TABLE: dict[str, Emit] = {}


def _float_name(op: Operation) -> str:
    element = element_type(op.results[0].type)
    assert isinstance(element, ScalarType)
    return element.name


def _float_op(name: str, f: Callable[..., Value], widened: Callable[..., Value] = in_float32) -> None:
    def emit(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
        element = _float_name(op)
        if element in _IN_FLOAT32:
            return widened(b, element, args, lambda *wide: f(b, *wide))
        return f(b, *args)

    TABLE[name] = emit


def _minmax(name: str) -> Callable[..., Value]:
    # maximum/minimum let NaN through, maxnum/minnum prefer the number; all of them order -0 below +0, as the hardware
    # that Triton was made for does. LLVM's own maxnum leaves the sign of zero open, so its maximumnum stands for it.
    spelled = name if name.endswith("imum") else f"{name[:3]}imumnum"
    return lambda b, x, y: intrinsic(b, spelled, (x, y))


for _name, _method in {"addf": "fadd", "subf": "fsub", "mulf": "fmul", "divf": "fdiv", "remf": "frem"}.items():
    _float_op(f"arith.{_name}", lambda b, x, y, _m=_method: getattr(b, _m)(x, y))
_float_op("arith.negf", lambda b, x: b.fneg(x), chosen_in_float32)
for _name in ("maximum", "minimum", "maxnum", "minnum"):
    _float_op(f"arith.{_name}f", _minmax(_name), chosen_in_float32)
for _name in ("tt.precise_divf", "tt.approx_divf"):
    _float_op(_name, lambda b, x, y: b.fdiv(x, y))
_float_op("tt.precise_sqrt", lambda b, x: intrinsic(b, "sqrt", (x,)))
_float_op("math.sqrt", lambda b, x: intrinsic(b, "sqrt", (x,)))
_float_op("math.rsqrt", lambda b, x: b.fdiv(splat_constant(x.type, 1.0), intrinsic(b, "sqrt", (x,))))
_float_op("math.absf", lambda b, x: intrinsic(b, "fabs", (x,)), chosen_in_float32)
_float_op("math.floor", lambda b, x: intrinsic(b, "floor", (x,)))
_float_op("math.ceil", lambda b, x: intrinsic(b, "ceil", (x,)))


def _fma(b: ir.IRBuilder, op: Operation, args: list[Value]) -> Value:
    element = _float_name(op)
    if element in ("f32", "f64"):
        return intrinsic(b, "fma", args)
    # In f64 the product is exact, and the sum is rounded to odd: to nearest, then to the odd one of its two neighbours
    # if anything was lost (Knuth's two-sum), which the second rounding then never takes for a tie.
    x, y, z = (float_to_float(b, a, element, "f64") for a in args)
    product = b.fmul(x, y)
    total = b.fadd(product, z)
    of_z = b.fsub(total, product)
    lost = b.fadd(b.fsub(product, b.fsub(total, of_z)), b.fsub(z, of_z))
    zero, integer = splat_constant(total.type, 0.0), typed(total, I64)
    one, bits = splat_constant(integer, 1), b.bitcast(total, integer)
    beyond = b.icmp_unsigned("==", b.fcmp_ordered(">", lost, zero), b.fcmp_ordered(">", total, zero))
    inexact_and_even = b.and_(
        b.fcmp_ordered("!=", lost, zero), b.icmp_unsigned("==", b.and_(bits, one), splat_constant(integer, 0))
    )
    odd = b.select(beyond, b.add(bits, one), b.sub(bits, one))
    return float_to_float(b, b.bitcast(b.select(inexact_and_even, odd, bits), total.type), "f64", element)


TABLE["math.fma"] = _fma


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
    if element.name in _IN_FLOAT32:
        args = [float_to_float(b, a, element.name, "f32") for a in args]
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

    return chosen_in_float32(b, name, args, clamp) if name in _IN_FLOAT32 else clamp(*args)


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


def _math(name: str) -> Emit:
    return lambda b, op, args: function(b, name, _float_name(op), args)


for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf"):
    TABLE[f"math.{_name}"] = _math(_name)
TABLE["tt.extern_elementwise"] = emit_extern
TABLE |= CASTS
