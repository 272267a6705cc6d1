"""Which addresses a tile of pointers covers, worked out at run time before any of them is used.

Whether a load may be computed in the loop of a store that comes after it depends on whether the two overlap, and that
is known only when the kernel runs. What is worked out is an interval that holds every address, masked-off ones
included, from the scalars that the tile is made of; where arithmetic could have wrapped on the way, it says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering.elementwise import I64, constant, element_type, size_of
from esper_triton.cpu.mlir import Dense, Operation, PointerType, ScalarType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


@dataclass(frozen=True)
class _Interval:
    """All elements lie from `low` to `high`, both included, provided that each of `conditions` (i1) holds."""

    low: Any
    high: Any
    conditions: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) as i64, and `holds` (i1): whether that could be worked out after all."""

    start: Any
    stop: Any
    holds: Any


class Ranges:
    """The ranges of address tiles at a program's present position."""

    def __init__(self, program: Program) -> None:
        self._program, self._b = program, program.b
        self._known: dict[Value, _Interval | None] = {}

    def of(self, pointers: Value) -> Range | None:
        """What the tile of pointers covers; None where its elements are not made of scalars and ranges."""
        interval = self._interval(pointers)
        if interval is None:
            return None
        pointer = element_type(pointers.type)
        assert isinstance(pointer, PointerType)
        b = self._b
        stop = b.add(interval.high, ir.Constant(I64, size_of(pointer.pointee)))
        holds = b.icmp_unsigned("<", interval.low, stop)  # or the addresses wrap around
        for condition in interval.conditions:
            holds = b.and_(holds, condition)
        return Range(interval.low, stop, holds)

    def disjoint(self, first: Range, second: Range) -> Any:
        """i1: no byte is in both."""
        b = self._b
        apart = b.or_(b.icmp_unsigned("<=", first.stop, second.start), b.icmp_unsigned("<=", second.stop, first.start))
        return b.and_(apart, b.and_(first.holds, second.holds))

    def _interval(self, value: Value) -> _Interval | None:
        if value not in self._known:
            self._known[value] = self._compute(value)
        return self._known[value]

    def _compute(self, value: Value) -> _Interval | None:
        program = self._program
        if value in program.buffers:
            return None
        if value in program.shifted:
            initial, amount = program.shifted[value]
            base = self._interval(initial)
            return None if base is None else self._checked(value, self._add(base, self._point(amount)))
        op = value.defining_op
        if op is None:
            return None
        match op.name:
            case "tt.splat":
                return self._point(program.scalars[op.operands[0]])
            case "tt.make_range":
                return _Interval(ir.Constant(I64, op.attributes["start"]), ir.Constant(I64, op.attributes["end"] - 1))
            case "arith.constant":
                dense = op.attributes["value"]
                if not isinstance(dense, Dense) or not dense.splat:
                    return None
                return self._point(constant(op.result.type, dense.value))
            case "tt.expand_dims" | "tt.broadcast" | "tt.trans" | "arith.extsi":
                return self._interval(op.operands[0])
        operands = [self._interval(operand) for operand in op.operands]
        known = [interval for interval in operands if interval is not None]
        if not known or len(known) < len(operands):
            return None
        result = self._arithmetic(op, known)
        return None if result is None else self._checked(value, result)

    def _arithmetic(self, op: Operation, operands: list[_Interval]) -> _Interval | None:
        b = self._b
        match op.name:
            case "arith.addi":
                return self._add(*operands)
            case "arith.subi":
                x, y = operands
                return _Interval(b.sub(x.low, y.high), b.sub(x.high, y.low), x.conditions + y.conditions)
            case "arith.muli":
                x, y = operands
                if y.low is not y.high:
                    x, y = y, x
                return self._scaled(x, y.low, y.conditions) if y.low is y.high else None
            case "tt.addptr":
                pointer = element_type(op.result.type)
                assert isinstance(pointer, PointerType)
                base, offset = operands
                return self._add(base, self._scaled(offset, ir.Constant(I64, size_of(pointer.pointee)), ()))
            case "arith.remsi":
                x, y = operands
                if y.low is not y.high:
                    return None
                # The remainder has the dividend's sign and is smaller than the divisor.
                one, zero = ir.Constant(I64, 1), ir.Constant(I64, 0)
                most = b.sub(y.low, one)
                positive = b.icmp_signed(">=", x.low, zero)
                divisor = b.icmp_signed(">", y.low, zero)
                low = b.select(positive, zero, b.neg(most))
                return _Interval(low, most, (*x.conditions, *y.conditions, divisor))
        return None

    def _point(self, scalar: Any) -> _Interval:
        wide = scalar if scalar.type == I64 else self._b.sext(scalar, I64)
        return _Interval(wide, wide)

    def _add(self, x: _Interval, y: _Interval) -> _Interval:
        b = self._b
        low = b.add(x.low, y.low)
        high = low if x.low is x.high and y.low is y.high else b.add(x.high, y.high)
        return _Interval(low, high, x.conditions + y.conditions)

    def _scaled(self, x: _Interval, factor: Any, conditions: tuple[Any, ...]) -> _Interval:
        b = self._b
        if x.low is x.high:
            low = b.mul(x.low, factor)
            return _Interval(low, low, x.conditions + conditions)
        # The product of an interval is the interval of its ends' products only where neither wraps.
        products = [b.smul_with_overflow(end, factor) for end in (x.low, x.high)]
        low, high = (b.extract_value(product, 0) for product in products)
        conditions += tuple(b.not_(b.extract_value(product, 1)) for product in products)
        if not isinstance(factor, ir.Constant):
            ordered = b.icmp_signed("<=", low, high)
            low, high = b.select(ordered, low, high), b.select(ordered, high, low)
        elif factor.constant < 0:
            low, high = high, low
        return _Interval(low, high, x.conditions + conditions)

    def _checked(self, value: Value, interval: _Interval) -> _Interval:
        """With the condition that nothing wrapped around in the type of `value`."""
        element = element_type(value.type)
        if not isinstance(element, ScalarType) or element.bits >= 64:
            return interval
        b, bound = self._b, 2 ** (element.bits - 1)
        fits = b.and_(
            b.icmp_signed(">=", interval.low, ir.Constant(I64, -bound)),
            b.icmp_signed("<", interval.high, ir.Constant(I64, bound)),
        )
        return _Interval(interval.low, interval.high, (*interval.conditions, fits))
