"""Loop nests over a tile, inside which element-wise values are computed chunk by chunk.

A value that no loop nest has stored yet is *lazy*: it exists as its operation only, and `Nest.chunk` computes it
wherever it is needed, for the chunk that is needed. Whether that is right (no store may have come between) and worth it
(not computed twice) is decided by `Program`, which also says what the nest is to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Affine, Chunk, Index, Lanes, Prefix, Uniform
from esper_triton.cpu.lowering.elementwise import (
    I1,
    I64,
    TABLE,
    constant,
    element_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.lowering.vmath import intrinsic
from esper_triton.cpu.mlir import Dense, Operation, PointerType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Moves of elements that need no arithmetic on them, besides TABLE.
SHAPE_OPS = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.trans", "tt.make_range", "arith.constant"}


def is_tile(value: Value) -> bool:
    """Whether a value is a tensor of the program."""
    return isinstance(value.type, TensorType)


def definition(value: Value) -> Operation:
    """The operation that a value is a result of."""
    assert value.defining_op is not None
    return value.defining_op


def is_elementwise(op: Operation) -> bool:
    """Whether result element i depends on operand elements i only."""
    return op.name in TABLE or op.name in ("tt.addptr", "tt.load")


def is_lazy_operation(op: Operation) -> bool:
    """Whether the results need no loop nest of their own."""
    return is_elementwise(op) or op.name in SHAPE_OPS


def lane_axis(shape: Sequence[int]) -> int | None:
    """The axis that chunks run along: the last one longer than 1."""
    return max((axis for axis, extent in enumerate(shape) if extent > 1), default=None)


def operand_index(op: Operation, index: tuple[Index, ...]) -> tuple[Index, ...]:
    """Where the operand of a shape operation is read for the result's `index`."""
    shape = op.operands[0].type.shape if isinstance(op.operands[0].type, TensorType) else ()
    if op.name == "tt.expand_dims":
        axis = op.attributes["axis"]
        return index[:axis] + index[axis + 1 :]
    if op.name == "tt.broadcast":
        return tuple(ZERO if extent == 1 else at for extent, at in zip(shape, index, strict=True))
    order = op.attributes["order"]  # trans: result axis i is operand axis order[i]
    source = [ZERO] * len(index)
    for axis, at in zip(order, index, strict=True):
        source[axis] = at
    return tuple(source)


class Nest:
    """Loops opened one inside the other from the program's present position.

    Each level has a builder at the place where its body has got to, so that what depends on outer loops only is emitted
    once per step of those, before the inner loop begins.
    """

    def __init__(self, program: Program, shape: Sequence[int], keep: Sequence[Value] = ()) -> None:
        self.program = program
        self.shape = tuple(shape)
        self._kept = {value: program.new_buffer(value) for value in keep}
        self.builders: list[ir.IRBuilder] = [program.b]
        self._open: list[tuple[Any, Any, int, int, int]] = []
        self._exact: dict[tuple[Any, ...], LLVMValue] = {}
        self._chunks: dict[tuple[Any, ...], tuple[Chunk, tuple[Index, ...]]] = {}
        axis = lane_axis(self.shape)
        self.width = 1 if axis is None else min(self.shape[axis], program.lanes)

    @property
    def b(self) -> ir.IRBuilder:
        """The builder of the innermost open loop."""
        return self.builders[-1]

    # ------------------------------------------------------------------------------------------------------------ loops

    def open(self, extent: int, step: int = 1, start: int = 0, lanes: bool = False) -> Index:
        """Begin a loop over `range(start, extent, step)`. A single step needs no loop, and none is made."""
        if extent - start <= step:
            self._open.append((None, None, 0, 0, 0))
            self.builders.append(self.b)
            return Index(ir.Constant(I64, start), lanes, len(self.builders) - 1 if start else 0)
        header = self.program.new_block("loop")
        inner = ir.IRBuilder(header)
        position = inner.phi(I64)
        self._open.append((header, position, extent, step, start))
        self.builders.append(inner)
        return Index(position, lanes, len(self.builders) - 1)

    def close(self, carried: Sequence[tuple[LLVMValue, LLVMValue, LLVMValue]] = ()) -> None:
        """End the innermost loop. `carried` lists (phi, value on entry, value for the next step)."""
        header, position, extent, step, start = self._open.pop()
        body = self.builders.pop()
        if header is None:
            return
        outer = self.b
        entry = outer.block
        outer.branch(header)
        following = body.add(position, ir.Constant(I64, step))
        after = self.program.new_block("done")
        body.cbranch(body.icmp_unsigned("<", following, ir.Constant(I64, extent)), header, after)
        position.add_incoming(ir.Constant(I64, start), entry)
        position.add_incoming(following, body.block)
        for phi, first, following_value in carried:
            phi.add_incoming(first, entry)
            phi.add_incoming(following_value, body.block)
        outer.position_at_end(after)

    def run(self, body: Callable[[tuple[Index, ...]], None] | None = None) -> None:
        """Every chunk of the shape in row-major order; without a body, only what is kept is computed."""
        axis = lane_axis(self.shape)
        index: list[Index] = [ZERO] * len(self.shape)
        opened = 0
        for k, extent in enumerate(self.shape):
            if extent > 1:
                index[k] = self.open(extent, self.width if k == axis else 1, lanes=k == axis)
                opened += 1
        self.visit(tuple(index))
        if body is not None:
            body(tuple(index))
        for _ in range(opened):
            self.close()

    def visit(self, index: tuple[Index, ...]) -> None:
        """Store the chunk of every kept value."""
        for value, buffer in self._kept.items():
            buffer.write(self.b, index, self.exact(value, index), self.width)

    # ----------------------------------------------------------------------------------------------------------- values

    def builder(self, index: Sequence[Index]) -> ir.IRBuilder:
        """Where to emit what depends on `index`: as far out as it is known."""
        return self.builders[max((at.level for at in index), default=0)]

    def chunk(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        """The chunk of `value` at `index`."""
        program = self.program
        if value in program.scalars:
            return Uniform(program.scalars[value])
        key = _key(value, index)
        found = self._chunks.get(key)
        if found is None:  # the index is kept with it, so that no other object can come to have its id
            found = self._chunks[key] = (self._compute(value, index), index)
        return found[0]

    def vector(self, value: Value, index: tuple[Index, ...]) -> LLVMValue:
        """The chunk as an LLVM vector with the exact value of every lane, or as a scalar where `index` has no lanes."""
        chunk = self.chunk(value, index)
        if not any(at.lanes for at in index):
            assert isinstance(chunk, Uniform)
            return chunk.value
        if not _is_inexact(chunk):
            return c.as_vector(self.builder(index), chunk, self.width)
        key = _key(value, index)
        if key not in self._exact:
            self._exact[key] = self._widened(value, index)
        return self._exact[key]

    def exact(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        """The chunk, in a form that holds the exact value of every lane."""
        chunk = self.chunk(value, index)
        return Lanes(self.vector(value, index)) if _is_inexact(chunk) else chunk

    def _widened(self, value: Value, index: tuple[Index, ...]) -> LLVMValue:
        """Lane by lane, from the operands' exact values."""
        if value in self.program.shifted:
            initial, amount = self.program.shifted[value]
            b = self.builder(index)
            return b.add(self.vector(initial, index), c.splat(b, amount, self.width))
        op = value.defining_op
        assert op is not None
        if op.name in ("tt.expand_dims", "tt.broadcast", "tt.trans"):
            return self.vector(op.operands[0], operand_index(op, index))
        vectors = [self.vector(operand, index) for operand in op.operands]
        b = self.builder(index)
        if op.name != "tt.addptr":
            return self.program.emit(op, b, vectors)
        element = element_type(value.type)
        assert isinstance(element, PointerType)
        pointers = self._add_pointer(b, Lanes(vectors[0]), Lanes(vectors[1]), size_of(element.pointee))
        return c.as_vector(b, pointers, self.width)

    def _compute(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        program = self.program
        b = self.builder(index)
        buffer = program.buffers.get(value)
        if buffer is not None and value not in self._kept:  # what is kept is computed here, and stored by `visit`
            return buffer.read(b, index, self.width)
        if value in program.shifted:
            initial, amount = program.shifted[value]
            return self._add(b, self.chunk(initial, index), Uniform(amount), 1)
        op = value.defining_op
        assert op is not None, f"block argument {value.name} has no buffer"
        match op.name:
            case "arith.constant":
                return self._constant(op, b, index)
            case "tt.splat":
                return Uniform(program.scalars[op.operands[0]])
            case "tt.make_range":
                (at,) = index
                start = ir.Constant(register_type(value.type), op.attributes["start"])
                base = b.add(b.trunc(at.value, start.type), start)
                return Affine(base, 1, fits=True) if at.lanes else Uniform(base)
            case "tt.expand_dims" | "tt.broadcast" | "tt.trans":
                return self.chunk(op.operands[0], operand_index(op, index))
            case "tt.load":
                return self._load(op, index)
            case "tt.addptr":
                pointer, offset = (self.chunk(operand, index) for operand in op.operands)
                if isinstance(pointer, Lanes) or isinstance(offset, Lanes):
                    pointer, offset = (self.exact(operand, index) for operand in op.operands)
                element = element_type(value.type)
                assert isinstance(element, PointerType)
                return self._add_pointer(b, pointer, offset, size_of(element.pointee))
        return self._elementwise(op, index, b)

    def _constant(self, op: Operation, b: ir.IRBuilder, index: tuple[Index, ...]) -> Chunk:
        dense = op.attributes["value"]
        assert isinstance(dense, Dense)
        if dense.splat:
            return Uniform(constant(op.result.type, dense.value))
        return self.program.constant_buffer(op).read(b, index, self.width)

    def _add(self, b: ir.IRBuilder, x: Chunk, y: Chunk, sign: int) -> Chunk:
        assert not isinstance(x, Prefix)
        assert not isinstance(y, Prefix)
        if isinstance(x, Lanes) or isinstance(y, Lanes):
            combine = b.add if sign > 0 else b.sub
            return Lanes(combine(c.as_vector(b, x, self.width), c.as_vector(b, y, self.width)))
        base_x, base_y = (v.value if isinstance(v, Uniform) else v.base for v in (x, y))
        step = (x.step if isinstance(x, Affine) else 0) + sign * (y.step if isinstance(y, Affine) else 0)
        base = (b.add if sign > 0 else b.sub)(base_x, base_y)
        assumed = any(isinstance(v, Affine) and v.assumed for v in (x, y))
        # With steps that cancel, what was assumed may still not hold: it stays in a form that remembers it.
        return Affine(base, step, assumed=assumed) if step or assumed else Uniform(base)

    def _add_pointer(self, b: ir.IRBuilder, pointer: Chunk, offset: Chunk, size: int) -> Chunk:
        scale = ir.Constant(I64, size)
        assert not isinstance(offset, Prefix)
        if isinstance(offset, Lanes):
            wide = offset.value
            if wide.type.element != I64:
                wide = b.sext(wide, ir.VectorType(I64, self.width))
            return self._add(b, pointer, Lanes(b.mul(wide, c.splat(b, scale, self.width))), 1)
        base = offset.value if isinstance(offset, Uniform) else offset.base
        widened = base.type != I64
        base = b.mul(b.sext(base, I64) if widened else base, scale)
        scaled: Chunk = Uniform(base)
        if isinstance(offset, Affine):
            scaled = Affine(base, offset.step * size, assumed=offset.assumed or (widened and not offset.fits))
        return self._add(b, pointer, scaled, 1)

    def _elementwise(self, op: Operation, index: tuple[Index, ...], b: ir.IRBuilder) -> Chunk:
        emit = partial(self.program.emit, op)
        operands = [self.chunk(operand, index) for operand in op.operands]
        if all(isinstance(operand, Uniform) for operand in operands):
            return Uniform(emit(b, [operand.value for operand in operands if isinstance(operand, Uniform)]))
        affine = self._affine(op, operands, b)
        if affine is not None:
            return affine
        return Lanes(emit(b, [self.vector(operand, index) for operand in op.operands]))

    def _affine(self, op: Operation, operands: list[Chunk], b: ir.IRBuilder) -> Chunk | None:
        """Index arithmetic that keeps its scalar form; None where it cannot."""
        if any(isinstance(operand, Lanes) for operand in operands):
            return None
        first = operands[0]
        match op.name:
            case "arith.addi" | "arith.subi" if register_type(op.result.type) != I1:
                return self._add(b, first, operands[1], 1 if op.name == "arith.addi" else -1)
            case "arith.muli":
                for x, y in (operands, reversed(operands)):
                    if isinstance(x, Affine) and isinstance(y, Uniform) and isinstance(y.value, ir.Constant):
                        step = x.step * y.value.constant
                        # Steps that cancelled leave an assumed tile with step 0, and a base that counts.
                        if step or x.assumed:
                            return Affine(b.mul(x.base, y.value), step, assumed=x.assumed)
                        return Uniform(y.value)
            case "arith.cmpi":
                return self._prefix(op.attributes["predicate"], first, operands[1], b)
            case "arith.andi" if register_type(op.result.type) == I1:
                for x, y in (operands, reversed(operands)):
                    if isinstance(x, Prefix) and isinstance(y, Prefix):
                        return Prefix(b.select(b.icmp_signed("<", x.count, y.count), x.count, y.count))
                    if isinstance(x, Prefix) and isinstance(y, Uniform):
                        return Prefix(b.select(y.value, x.count, ir.Constant(I64, 0)))
            case "arith.extsi" if isinstance(first, Affine):
                wide = b.sext(first.base, register_type(op.result.type))
                return Affine(wide, first.step, fits=first.fits, assumed=first.assumed or not first.fits)
        return None

    def _prefix(self, predicate: int, first: Chunk, second: Chunk, b: ir.IRBuilder) -> Chunk | None:
        """The comparison of indices that count up by one with a bound; None for any other."""
        if predicate in (4, 5):  # bound > index, bound >= index
            predicate, first, second = predicate - 2, second, first
        if predicate not in (2, 3) or not (
            isinstance(first, Affine) and first.step == 1 and isinstance(second, Uniform)
        ):
            return None
        bound, base = (v if v.type == I64 else b.sext(v, I64) for v in (second.value, first.base))
        saturated = bound.type == second.value.type  # i64 might wrap, and a mask must not come on by that
        count = intrinsic(b, "ssub.sat", (bound, base)) if saturated else b.sub(bound, base)
        if predicate == 3:
            one = ir.Constant(I64, 1)
            count = intrinsic(b, "sadd.sat", (count, one)) if saturated else b.add(count, one)
        return Prefix(count)

    def _load(self, op: Operation, index: tuple[Index, ...]) -> Chunk:
        """A tile load. A masked-off element is `other`, zero where none is given; its address is not touched."""
        pointers, mask, other = load_operands(op)
        element = element_type(op.result.type)
        address = self.chunk(pointers, index)
        condition = self.chunk(mask, index) if mask is not None else None
        fallback = self.exact(other, index) if other is not None else Uniform(constant(op.result.type, 0))
        b = self.builder(index)  # a nested load may have moved on to another block
        if isinstance(address, Uniform):
            pointer = b.inttoptr(address.value, c.POINTER)
            if condition is None:
                return Uniform(c.load_scalar(b, pointer, element))
            if isinstance(condition, Uniform) and isinstance(fallback, Uniform):
                value = c.guarded(b, condition.value, lambda: c.load_scalar(b, pointer, element), fallback.value)
                return Uniform(value)
        width, slots = self.width, (self.program.lane_slot(0), self.program.lane_slot(1))
        contiguous = isinstance(address, Affine) and address.step == size_of(element)
        if condition is None:
            if contiguous:
                assert isinstance(address, Affine)
                return Lanes(c.load_vector(b, b.inttoptr(address.base, c.POINTER), element, width))
            everywhere = c.splat(b, ir.Constant(I1, 1), width)
            return Lanes(
                c.gather(b, slots, self.vector(pointers, index), everywhere, c.as_vector(b, fallback, width), element)
            )
        other_vector = c.as_vector(b, fallback, width)
        if not contiguous:
            assert mask is not None
            addresses, bits = self.vector(pointers, index), self.vector(mask, index)
            return Lanes(c.gather(b, slots, addresses, bits, other_vector, element))
        assert isinstance(address, Affine)
        pointer = b.inttoptr(address.base, c.POINTER)
        if isinstance(condition, Uniform):
            return Lanes(c.guarded(b, condition.value, lambda: c.load_vector(b, pointer, element, width), other_vector))
        full, partial, join = (self.program.new_block(n) for n in ("full", "partial", "loaded"))
        if isinstance(condition, Prefix):
            b.cbranch(b.icmp_signed(">=", condition.count, ir.Constant(I64, width)), full, partial)
        else:
            bits = c.as_vector(b, condition, width)
            b.cbranch(c.all_true(b, bits), full, partial)
        b.position_at_end(full)
        whole = c.load_vector(b, pointer, element, width)
        b.branch(join)
        b.position_at_end(partial)
        if isinstance(condition, Prefix):
            masked = c.prefix_load(b, slots[0], pointer, condition.count, other_vector, element)
        else:
            masked = c.masked_load(b, slots[0], pointer, bits, other_vector, element)
        masked_end = b.block
        b.branch(join)
        b.position_at_end(join)
        result = b.phi(whole.type)
        result.add_incoming(whole, full)
        result.add_incoming(masked, masked_end)
        return Lanes(result)

    def store(self, op: Operation, index: tuple[Index, ...]) -> None:
        """A tile store of one chunk."""
        pointers, value = op.operands[:2]
        mask = op.operands[2] if len(op.operands) > 2 else None
        element = element_type(value.type)
        address, stored = self.chunk(pointers, index), self.exact(value, index)
        condition: Chunk = self.chunk(mask, index) if mask is not None else Uniform(ir.Constant(I1, 1))
        b, width, slots = self.b, self.width, (self.program.lane_slot(0), self.program.lane_slot(1))
        if not any(at.lanes for at in index):
            assert isinstance(address, Uniform)
            assert isinstance(stored, Uniform)
            assert isinstance(condition, Uniform)
            with b.if_then(condition.value):
                c.store_scalar(b, stored.value, b.inttoptr(address.value, c.POINTER), element)
            return
        vector = c.as_vector(b, stored, width)
        if not (isinstance(address, Affine) and address.step == size_of(element)):
            addresses = self.vector(pointers, index)
            bits = c.splat(b, ir.Constant(I1, 1), width) if mask is None else self.vector(mask, index)
            c.scatter(b, slots, vector, addresses, bits, element)
            return
        pointer = b.inttoptr(address.base, c.POINTER)
        if isinstance(condition, Uniform):
            with b.if_then(condition.value):
                c.store_vector(b, vector, pointer, element)
            return
        if isinstance(condition, Prefix):
            whole = b.icmp_signed(">=", condition.count, ir.Constant(I64, width))
        else:
            bits = c.as_vector(b, condition, width)
            whole = c.all_true(b, bits)
        with b.if_else(whole) as (full, partial):
            with full:
                c.store_vector(b, vector, pointer, element)
            with partial:
                if isinstance(condition, Prefix):
                    c.prefix_store(b, slots[0], vector, pointer, condition.count, element)
                else:
                    c.masked_store(b, slots[0], vector, pointer, bits, element)


def _is_inexact(chunk: Chunk) -> bool:
    """Whether lanes that wrapped around would not be what the chunk says."""
    return isinstance(chunk, Prefix) or (isinstance(chunk, Affine) and chunk.assumed)


def _key(value: Value, index: tuple[Index, ...]) -> tuple[Any, ...]:
    return (id(value), *((id(at.value), at.lanes) for at in index))


def load_operands(op: Operation) -> tuple[Value, Value | None, Value | None]:
    """Pointers, mask and other of a `tt.load`."""
    segments = op.attributes.get("operandSegmentSizes", (1, int(len(op.operands) > 1), int(len(op.operands) > 2)))
    operands = iter(op.operands)
    pointers, mask, other = (next(operands) if present else None for present in segments)
    assert pointers is not None
    return pointers, mask, other
