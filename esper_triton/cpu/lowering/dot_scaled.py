"""`tt.dot_scaled`: a product of operands in the microscaling formats, written as operations that have a lowering.

OCP Microscaling Formats (MX) Specification 1.0: along K, every 32 elements share a scale that is a power of two (E8M0:
2**(code - 127), code 255 is NaN), with elements of E2M1 (two to a byte, the first one in the lower half), E4M3, E5M2,
or 16 bits. Scales may also be E4M3, for 16 elements each. Operands are decoded to float32, which holds them exactly
unless they are beyond its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esper_triton.cpu.lowering.types import FLOAT8
from esper_triton.cpu.mlir import Dense, Operation, ScalarType, TensorType, Type, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_E2M1 = 4  # of Triton's ScaleDotElemType
_I8, _I16, _I32, _F16, _F32 = (ScalarType(name) for name in ("i8", "i16", "i32", "f16", "f32"))


def lower_dot_scaled(program: Program, op: Operation) -> None:
    """`c + (a * a_scale) @ (b * b_scale)`; the scales have one line for each row of a and for each column of b."""
    operands = iter(op.operands)
    present = op.attributes["operandSegmentSizes"]
    a, b, accumulator, a_scale, b_scale = (next(operands) if count else None for count in present)
    assert a is not None
    assert b is not None
    assert accumulator is not None
    write = _Writer(op)
    inner = len(_type(a).shape) - 1
    left = write.decoded(a, op.attributes["a_elem_type"], inner if op.attributes["lhs_k_pack"] else inner - 1)
    right = write.decoded(b, op.attributes["b_elem_type"], inner - 1 if op.attributes["rhs_k_pack"] else inner)
    if a_scale is not None:
        left = write.scaled(left, a_scale, inner)
    if b_scale is not None:
        right = write.scaled(right, write.turned(b_scale, inner - 1, inner), inner - 1)
    product = write("tt.dot", [left, right, accumulator], _type(op.result)).defining_op
    assert product is not None
    product.results, op.result.defining_op = [op.result], product
    for value in dict.fromkeys(op.operands):
        value.users.remove(op)
    # Only now, since what is stored depends on who uses it later.
    for operation in write.operations:
        program.lower(operation)


def _type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type


class _Writer:
    """Writes operations that stand in for another one."""

    def __init__(self, op: Operation) -> None:
        self._op = op
        self.operations: list[Operation] = []

    def __call__(self, name: str, operands: Sequence[Value], type_: Type, **attributes: Any) -> Value:
        """The result of a new operation."""
        at = self._op
        op = Operation(name, list(operands), [], attributes, [], [], [], at.location, at.block)
        op.results = [Value(f"{at.result.name}.{len(self.operations)}", type_, defining_op=op)]
        for value in dict.fromkeys(operands):
            value.users.append(op)
        self.operations.append(op)
        return op.result

    def _with(
        self, name: str, value: Value, number: float, type_: ScalarType | None = None, **attributes: Any
    ) -> Value:
        """A binary operation on a tile and a number."""
        constant = self("arith.constant", [], value.type, value=Dense(value.type, number, splat=True))
        return self(
            name, [value, constant], TensorType(_type(value).shape, type_) if type_ else value.type, **attributes
        )

    def _as(self, name: str, value: Value, element: ScalarType) -> Value:
        return self(name, [value], TensorType(_type(value).shape, element))

    def turned(self, value: Value, first: int, second: int) -> Value:
        """Two axes change places."""
        shape = list(_type(value).shape)
        order = list(range(len(shape)))
        order[first], order[second] = second, first
        return self(
            "tt.trans",
            [value],
            TensorType(tuple(shape[axis] for axis in order), _type(value).element),
            order=tuple(order),
        )

    def decoded(self, value: Value, kind: int, packed: int) -> Value:
        """The elements as float32; E2M1 is packed along axis `packed`."""
        element = _type(value).element
        if kind == _E2M1:
            return self._from_e2m1(self._unpacked(value, packed))
        return self._as("tt.fp_to_fp" if str(element) in FLOAT8 else "arith.extf", value, _F32)

    def _unpacked(self, value: Value, axis: int) -> Value:
        """Codes of four bits, one to a byte, from two to a byte."""
        shape = _type(value).shape
        halves = [self._with("arith.andi", value, 15), self._with("arith.shrui", value, 4)]
        pairs = self("tt.join", halves, TensorType((*shape, 2), _I8))
        # The new axis goes behind the packed one.
        order = (*range(axis + 1), len(shape), *range(axis + 1, len(shape)))
        turned = TensorType(tuple((*shape, 2)[k] for k in order), _I8)
        if axis != len(shape) - 1:
            pairs = self("tt.trans", [pairs], turned, order=order)
        return self("tt.reshape", [pairs], TensorType((*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]), _I8))

    def _from_e2m1(self, codes: Value) -> Value:
        # As the exponent and first mantissa bit of a half, whose bias is larger by 14. Codes whose exponent is
        # zero come out right as well, since subnormal numbers of a half are made like those of this format.
        wide = self._as("arith.extui", codes, _I16)
        magnitude = self._with("arith.shli", self._with("arith.andi", wide, 7), 9)
        sign = self._with("arith.shli", self._with("arith.andi", wide, 8), 12)
        bits = self("arith.ori", [magnitude, sign], wide.type)
        return self._with("arith.mulf", self._as("arith.extf", self._as("tt.bitcast", bits, _F16), _F32), 2.0**14)

    def scaled(self, value: Value, codes: Value, axis: int) -> Value:
        """The tile times scales, of which there are fewer along `axis`."""
        type_, few = _type(value), _type(codes).shape
        if _type(codes).element == _I8:
            scales = self._from_e8m0(codes)
        else:
            scales = self._as("tt.fp_to_fp", codes, _F32)
        group = type_.shape[axis] // few[axis]
        one = (*few[: axis + 1], 1, *few[axis + 1 :])
        many = (*few[: axis + 1], group, *few[axis + 1 :])
        spread = self("tt.expand_dims", [scales], TensorType(one, _F32), axis=axis + 1)
        spread = self("tt.broadcast", [spread], TensorType(many, _F32))
        return self("arith.mulf", [value, self("tt.reshape", [spread], type_)], type_)

    def _from_e8m0(self, codes: Value) -> Value:
        # The code is the exponent's of a float32, but for the smallest, which is subnormal, and NaN.
        wide = self._as("arith.extui", codes, _I32)
        power = self._as("tt.bitcast", self._with("arith.shli", wide, 23), _F32)
        for code, number in ((0, 2.0**-127), (255, float("nan"))):
            other = self("arith.constant", [], power.type, value=Dense(power.type, number, splat=True))
            is_code = self._with("arith.cmpi", wide, code, ScalarType("i1"), predicate=0)
            power = self("arith.select", [is_code, other, power], power.type)
        return power
