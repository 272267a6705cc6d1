"""Which addresses a tile of pointers covers, worked out at run time before any of them is used.

Whether a load may be computed in the loop of a store that comes after it depends on whether the two overlap, and that
is known only when the kernel runs. Most tiles of pointers are made of scalars and ranges by sums and products, which
gives them an origin and one stride along each axis. From these and from how many elements a mask leaves on along each
axis follows an interval that holds every address used. Where arithmetic could have wrapped on the way, it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering.chunks import minimum
from esper_triton.cpu.lowering.elementwise import I64, constant, element_type, register_type, size_of
from esper_triton.cpu.mlir import Dense, Operation, PointerType, TensorType, Type, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_ZERO, _ONE = ir.Constant(I64, 0), ir.Constant(I64, 1)
_SLT, _SLE, _SGT, _SGE = 2, 3, 4, 5  # predicates of `arith.cmpi`


@dataclass(frozen=True)
class _Form:
    """Elements `origin + sum(index[k] * strides[k])`, plus something from [0, `slack`] where that is given.

    All of them i64. It holds provided that each of `conditions` (i1) does.
    """

    origin: Any
    strides: tuple[Any, ...]
    slack: Any = None
    conditions: tuple[Any, ...] = ()

    @property
    def is_uniform(self) -> bool:
        return self.slack is None and all(stride is _ZERO for stride in self.strides)


@dataclass(frozen=True)
class _Counts:
    """How many elements (i64) a mask leaves on at most `along` some axes, provided that each of `conditions` holds."""

    along: Mapping[int, Any]
    conditions: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) as i64; `holds` (i1): whether that could be worked out after all.

    `form`: what the addresses are made of. `counts`: how many elements a mask leaves on at most along some axes.
    """

    start: Any
    stop: Any
    holds: Any
    form: _Form
    shape: tuple[int, ...]
    size: int
    counts: Mapping[int, Any]


_NOTHING = _Counts({})


class Ranges:
    """The ranges of accesses at a program's present position."""

    def __init__(self, program: Program) -> None:
        self._program, self._b = program, program.b
        self._known: dict[Value, _Form | None] = {}
        self._counted: dict[Value, _Counts] = {}

    def of(self, pointers: Value, mask: Value | None) -> Range | None:
        """What an access covers; None where the addresses are not made of scalars and ranges."""
        b, type_ = self._b, pointers.type
        assert isinstance(type_, TensorType)
        assert isinstance(type_.element, PointerType)
        form = self._form(pointers)
        if form is None:
            return None
        counted = _NOTHING if mask is None else self._counts(mask)
        counts = counted.along
        low, high = self._bounds(form, type_.shape, counts)
        size = size_of(type_.element.pointee)
        stop = self._add(high, ir.Constant(I64, size))
        holds = b.icmp_unsigned("<", low, stop)  # or the addresses wrap around
        for condition in dict.fromkeys((*form.conditions, *counted.conditions)):
            holds = b.and_(holds, condition)
        return Range(low, stop, holds, form, type_.shape, size, counts)

    def count(self, mask: Value, axis: int) -> Any | None:
        """How many elements (i64) along an axis, from the first, a mask leaves on at most; None where it is not made of
        indices that count up and a bound."""
        counted = self._counts(mask)
        count = counted.along.get(axis)
        if count is None:
            return None
        assert isinstance(mask.type, TensorType)
        everything = ir.Constant(I64, mask.type.shape[axis])
        for condition in dict.fromkeys(counted.conditions):
            count = self._b.select(condition, count, everything)
        return count

    def are_apart(self, first: Range, second: Range) -> Any:
        """i1: no byte is in both, or both are the same elements at the same indices, no two at one address."""
        b = self._b
        apart = b.or_(b.icmp_unsigned("<=", first.stop, second.start), b.icmp_unsigned("<=", second.stop, first.start))
        same = self._are_same(first, second)
        apart = apart if same is None else b.or_(apart, same)
        return b.and_(apart, b.and_(first.holds, second.holds))

    def _are_same(self, first: Range, second: Range) -> Any | None:
        b = self._b
        long = [axis for axis, extent in enumerate(first.shape) if extent > 1]
        if first.form.slack is not None or second.form.slack is not None or len(long) > 2:
            return None
        if first.shape != second.shape or first.size != second.size:
            return None
        result = b.icmp_unsigned("==", first.form.origin, second.form.origin)
        for axis in long:
            one, other = first.form.strides[axis], second.form.strides[axis]
            if one is not other:
                if isinstance(one, ir.Constant) and isinstance(other, ir.Constant) and one.constant != other.constant:
                    return None
                result = b.and_(result, b.icmp_unsigned("==", one, other))
        strides = [self._magnitude(first.form.strides[axis]) for axis in long]
        size = ir.Constant(I64, first.size)
        if len(long) == 1:
            return b.and_(result, b.icmp_signed(">=", strides[0], size))
        if len(long) == 2:
            # Rows that do not reach into one another: neighbours lie along the one axis or the other.
            spans = []
            for axis, stride in zip(long, strides, strict=True):
                count = first.counts.get(axis)
                if count is not second.counts.get(axis):
                    count = None
                spans.append(self._add(self._mul(stride, self._last(first.shape[axis], count)), size))
            distinct = b.or_(b.icmp_signed(">=", strides[0], spans[1]), b.icmp_signed(">=", strides[1], spans[0]))
            for stride in strides:
                distinct = b.and_(distinct, b.icmp_signed(">=", stride, size))
            result = b.and_(result, distinct)
        return result

    # ------------------------------------------------------------------------------------------------------------ forms

    def _form(self, value: Value) -> _Form | None:
        if value not in self._known:
            self._known[value] = self._compute(value)
        return self._known[value]

    def _compute(self, value: Value) -> _Form | None:
        program = self._program
        assert isinstance(value.type, TensorType)
        rank = len(value.type.shape)
        if value in program.buffers:
            return None
        if value in program.shifted:
            initial, amount = program.shifted[value]
            base = self._form(initial)
            return self._checked(value.type, base and self._sum(base, self._uniform(amount, rank), 1))
        op = value.defining_op
        if op is None:
            return None
        match op.name:
            case "tt.splat":
                scalar = program.scalars.get(op.operands[0])  # None: it is computed after the present position only
                return None if scalar is None else self._uniform(scalar, rank)
            case "tt.make_range":
                return _Form(_constant(op.attributes["start"]), (_ONE,))
            case "arith.constant":
                dense = op.attributes["value"]
                if (
                    not isinstance(dense, Dense)
                    or not dense.splat
                    or not isinstance(register_type(value.type), ir.IntType)
                ):
                    return None
                return self._uniform(constant(op.result.type, dense.value), rank)
        operands = [self._form(operand) for operand in op.operands]
        known = [form for form in operands if form is not None]
        return self._arithmetic(op, known) if known and len(known) == len(operands) else None

    def _arithmetic(self, op: Operation, operands: list[_Form]) -> _Form | None:
        first, second = operands[0], operands[-1]
        match op.name:
            case "arith.extsi":
                return first
            case "tt.expand_dims" | "tt.broadcast" | "tt.trans":
                return _Form(first.origin, self._moved(op, first.strides), first.slack, first.conditions)
            case "arith.addi" | "arith.subi":
                return self._checked(op.result.type, self._sum(first, second, 1 if op.name == "arith.addi" else -1))
            case "arith.muli":
                if not second.is_uniform:
                    first, second = second, first
                if not second.is_uniform:
                    return None
                product = self._product(op.result.type, first, second.origin, second.conditions)
                return self._checked(op.result.type, product)
            case "tt.addptr":
                pointer = element_type(op.result.type)
                assert isinstance(pointer, PointerType)
                size = ir.Constant(I64, size_of(pointer.pointee))
                offset = self._product(op.operands[1].type, second, size, ())
                return None if offset is None else self._sum(first, offset, 1)
            case "arith.remsi" if second.is_uniform:
                return self._remainder(op.result.type, first, second)
        return None

    def _moved(self, op: Operation, strides: tuple[Any, ...]) -> tuple[Any, ...]:
        if op.name == "tt.expand_dims":
            axis = op.attributes["axis"]
            return (*strides[:axis], _ZERO, *strides[axis:])
        if op.name == "tt.trans":
            return tuple(strides[axis] for axis in op.attributes["order"])
        source = op.operands[0].type
        assert isinstance(source, TensorType)
        return tuple(_ZERO if extent == 1 else stride for extent, stride in zip(source.shape, strides, strict=True))

    def _uniform(self, scalar: Any, rank: int) -> _Form:
        if isinstance(scalar, ir.Constant):
            wide = _constant(scalar.constant)
        else:
            wide = scalar if scalar.type == I64 else self._b.sext(scalar, I64)
        return _Form(wide, (_ZERO,) * rank)

    def _sum(self, x: _Form, y: _Form, sign: int) -> _Form | None:
        if y.slack is not None and sign < 0:
            return None
        add = self._add if sign > 0 else self._sub
        strides = tuple(add(one, other) for one, other in zip(x.strides, y.strides, strict=True))
        slack = x.slack if y.slack is None else y.slack if x.slack is None else self._add(x.slack, y.slack)
        return _Form(add(x.origin, y.origin), strides, slack, x.conditions + y.conditions)

    def _product(self, type_: Type, x: _Form, factor: Any, conditions: tuple[Any, ...]) -> _Form | None:
        """All of `x` times a scalar. `type_`: of `x`, since products of what fits into 32 bits fit into 64."""
        if x.slack is not None and not (isinstance(factor, ir.Constant) and factor.constant > 0):
            return None
        assert isinstance(type_, TensorType)
        b = self._b
        conditions += x.conditions
        if register_type(type_) == I64:
            for end in self._bounds(x, type_.shape, {}):
                if not isinstance(end, ir.Constant):
                    conditions += (b.not_(b.extract_value(b.smul_with_overflow(end, factor), 1)),)
        strides = tuple(self._mul(stride, factor) for stride in x.strides)
        slack = None if x.slack is None else self._mul(x.slack, factor)
        return _Form(self._mul(x.origin, factor), strides, slack, conditions)

    def _remainder(self, type_: Type, x: _Form, divisor: _Form) -> _Form:
        # Of what is not negative, by what is positive.
        assert isinstance(type_, TensorType)
        b = self._b
        low, _ = self._bounds(x, type_.shape, {})
        most = b.sub(divisor.origin, _ONE)
        signs = (b.icmp_signed(">=", low, _ZERO), b.icmp_signed(">=", most, _ZERO))
        return _Form(_ZERO, (_ZERO,) * len(x.strides), most, (*x.conditions, *divisor.conditions, *signs))

    def _checked(self, type_: Type, form: _Form | None) -> _Form | None:
        """With the condition that no sum or product wrapped around in the type."""
        assert isinstance(type_, TensorType)
        bits = register_type(type_).width
        if form is None or bits >= 64:
            return form
        b, bound = self._b, 2 ** (bits - 1)
        low, high = self._bounds(form, type_.shape, {})
        conditions = form.conditions
        if not isinstance(low, ir.Constant):
            conditions += (b.icmp_signed(">=", low, ir.Constant(I64, -bound)),)
        if not isinstance(high, ir.Constant):
            conditions += (b.icmp_signed("<", high, ir.Constant(I64, bound)),)
        return _Form(form.origin, form.strides, form.slack, conditions)

    def _bounds(self, form: _Form, shape: tuple[int, ...], counts: Mapping[int, Any]) -> tuple[Any, Any]:
        """The least and the greatest element."""
        b = self._b
        low = high = form.origin
        for axis, stride in enumerate(form.strides):
            if stride is _ZERO or shape[axis] == 1:
                continue
            span = self._mul(stride, self._last(shape[axis], counts.get(axis)))
            if isinstance(stride, ir.Constant):
                if stride.constant > 0:
                    high = self._add(high, span)
                else:
                    low = self._add(low, span)
                continue
            upwards = b.icmp_signed(">", span, _ZERO)
            low = self._add(low, b.select(upwards, _ZERO, span))
            high = self._add(high, b.select(upwards, span, _ZERO))
        return low, high if form.slack is None else self._add(high, form.slack)

    # ------------------------------------------------------------------------------------------------------------ masks

    def _counts(self, mask: Value) -> _Counts:
        if mask not in self._counted:
            self._counted[mask] = self._count(mask)
        return self._counted[mask]

    def _count(self, mask: Value) -> _Counts:
        op = mask.defining_op
        if op is None or mask in self._program.buffers:
            return _NOTHING
        match op.name:
            case "arith.andi":
                one, other = (self._counts(operand) for operand in op.operands)
                along = dict(one.along)
                for axis, count in other.along.items():
                    along[axis] = minimum(self._b, along[axis], count) if axis in along else count
                return _Counts(along, one.conditions + other.conditions)
            case "tt.expand_dims" | "tt.broadcast" | "tt.trans":
                source = op.operands[0].type
                assert isinstance(source, TensorType)
                inner = self._counts(op.operands[0])
                places = self._moved(op, tuple(inner.along.get(axis, _ZERO) for axis in range(len(source.shape))))
                along = {axis: count for axis, count in enumerate(places) if count is not _ZERO}
                return _Counts(along, inner.conditions)
            case "arith.cmpi":
                return self._compared(op)
        return _NOTHING

    def _compared(self, op: Operation) -> _Counts:
        """For the comparison of indices that count up along one axis with a bound."""
        predicate, (index, bound) = op.attributes["predicate"], op.operands
        if predicate in (_SGT, _SGE):
            predicate, index, bound = predicate - 2, bound, index
        if predicate not in (_SLT, _SLE):
            return _NOTHING
        form, limit = self._form(index), self._form(bound)
        if form is None or limit is None or not limit.is_uniform or form.slack is not None:
            return _NOTHING
        assert isinstance(index.type, TensorType)
        shape = index.type.shape
        axes = [axis for axis, stride in enumerate(form.strides) if stride is not _ZERO and shape[axis] > 1]
        if len(axes) != 1 or form.strides[axes[0]] is not _ONE:
            return _NOTHING
        b, extent = self._b, shape[axes[0]]
        conditions = form.conditions + limit.conditions
        if register_type(index.type) == I64:  # in which sums and differences of 32-bit integers do not wrap
            last = ir.Constant(I64, extent)  # one more than there are, for `<=`
            for wraps in (b.sadd_with_overflow(form.origin, last), b.ssub_with_overflow(limit.origin, form.origin)):
                conditions += (b.not_(b.extract_value(wraps, 1)),)
        count = self._sub(limit.origin, form.origin)
        count = self._add(count, _ONE) if predicate == _SLE else count
        count = minimum(b, count, ir.Constant(I64, extent))
        count = b.select(b.icmp_signed("<", count, _ZERO), _ZERO, count)
        return _Counts({axes[0]: count}, conditions)

    # ------------------------------------------------------------------------------------------------------- arithmetic

    def _last(self, extent: int, count: Any | None) -> Any:
        """The last index of an axis of which `count` elements count."""
        return ir.Constant(I64, extent - 1) if count is None else self._sub(count, _ONE)

    def _magnitude(self, x: Any) -> Any:
        if isinstance(x, ir.Constant):
            return ir.Constant(I64, abs(x.constant))
        return self._b.select(self._b.icmp_signed("<", x, _ZERO), self._b.neg(x), x)

    def _add(self, x: Any, y: Any) -> Any:
        if isinstance(x, ir.Constant) and isinstance(y, ir.Constant):
            return _constant(x.constant + y.constant)
        return x if y is _ZERO else y if x is _ZERO else self._b.add(x, y)

    def _sub(self, x: Any, y: Any) -> Any:
        if isinstance(x, ir.Constant) and isinstance(y, ir.Constant):
            return _constant(x.constant - y.constant)
        return x if y is _ZERO else self._b.sub(x, y)

    def _mul(self, x: Any, y: Any) -> Any:
        if isinstance(x, ir.Constant) and isinstance(y, ir.Constant):
            return _constant(x.constant * y.constant)
        if x is _ZERO or y is _ZERO:
            return _ZERO
        return x if y is _ONE else y if x is _ONE else self._b.mul(x, y)


def _constant(value: int) -> Any:
    return {0: _ZERO, 1: _ONE}.get(value) or ir.Constant(I64, value)
