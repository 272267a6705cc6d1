"""How MLIR's element types are held in LLVM registers and in memory.

Pointers are i64 addresses; bf16 and the 8-bit floats are integers of their bits (LLVM would call conversion routines
that not every libgcc has); everything else is itself. In memory i1 takes a byte.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from esper_triton.cpu.mlir import PointerType, ScalarType, TensorType, Type

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


@dataclass(frozen=True)
class Float8:
    """A float of eight bits: a sign, then exponent and mantissa.

    Attributes:
        mantissa: its bits. bias: of the exponent. largest: code of the largest finite number. nan: code that stands for
            NaN. unsigned_zero: the code of -0 is NaN's.
    """

    mantissa: int
    bias: int
    largest: int
    nan: int
    unsigned_zero: bool = False


# OCP 8-bit Floating Point Specification, revision 1.0, and the variants that AMD's first hardware has.
FLOAT8 = {
    "f8E4M3FN": Float8(3, 7, 0x7E, 0x7F),
    "f8E5M2": Float8(2, 15, 0x7B, 0x7F),
    "f8E4M3FNUZ": Float8(3, 8, 0x7F, 0x80, unsigned_zero=True),
    "f8E5M2FNUZ": Float8(2, 16, 0x7F, 0x80, unsigned_zero=True),
}
FLOATS = {"f16": F16, "bf16": I16, "f32": F32, "f64": F64, **dict.fromkeys(FLOAT8, I8)}


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
        if element.name in FLOATS:
            return FLOATS[element.name]
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
    if isinstance(element, ScalarType) and element.name in FLOAT8:
        return ir.Constant(I8, _float8_bits(FLOAT8[element.name], float(value)))
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


def _float8_bits(kind: Float8, value: float) -> int:
    """The code of a value that the parser has read, which is exact, or not finite."""
    if value != value:
        return kind.nan
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isinf(value):
        return sign | ((0x1F << 2) if kind is FLOAT8["f8E5M2"] else kind.nan)
    if value == 0:  # whose exponent is none
        return 0 if kind.unsigned_zero else sign
    exponent = max(math.frexp(value)[1] - 1, 1 - kind.bias)
    code = int(math.ldexp(abs(value), kind.mantissa - exponent)) + ((exponent + kind.bias - 1) << kind.mantissa)
    return 0 if code == 0 and kind.unsigned_zero else sign | code
