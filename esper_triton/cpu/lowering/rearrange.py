"""Operations that move elements between tiles: join, split, cat, gather, histogram. All go through scratch memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.chunks import Buffer, Index
from esper_triton.cpu.lowering.elementwise import I32, I64, constant, memory_type, register_type, size_of
from esper_triton.cpu.lowering.nest import Nest
from esper_triton.cpu.lowering.vmath import splat_constant
from esper_triton.cpu.mlir import Operation, TensorType

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


def _shuffle(b: ir.IRBuilder, first: Any, second: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return b.shuffle_vector(first, second, mask)


def _pairs(b: ir.IRBuilder, buffer: Buffer, index: tuple[Index, ...]) -> Any:
    """Address of element (index, 0) of a tile whose last extent is 2."""
    linear: Any = ir.Constant(I64, 0)
    for extent, at in zip(buffer.shape[:-1], index, strict=True):
        linear = b.add(b.mul(linear, ir.Constant(I64, extent)), at.value)
    return b.gep(buffer.pointer, [b.shl(linear, ir.Constant(I64, 1))], source_etype=memory_type(buffer.element))


def lower_join(program: Program, op: Operation) -> None:
    """Two tiles side by side along a new last axis."""
    first, second = op.operands
    output = program.new_buffer(op.result)
    nest = program.nest(op.operands, output.shape[:-1], op)

    def chunk(index: tuple[Index, ...]) -> None:
        x, y = nest.vector(first, index), nest.vector(second, index)
        b, place = nest.b, _pairs(nest.b, output, index)
        if isinstance(x.type, ir.VectorType):
            width = nest.width
            order = [lane for k in range(width) for lane in (k, width + k)]
            c.store_vector(b, _shuffle(b, x, y, order), place, output.element)
            return
        for k, value in enumerate((x, y)):
            at = b.gep(place, [ir.Constant(I64, k)], source_etype=memory_type(output.element))
            c.store_scalar(b, value, at, output.element)

    nest.run(chunk)


def lower_split(program: Program, op: Operation) -> None:
    """The two halves of the last axis, which has two elements."""
    source = program.materialise(op.operands[0])
    outputs = [program.new_buffer(result) for result in op.results]
    nest = Nest(program, source.shape[:-1])

    def chunk(index: tuple[Index, ...]) -> None:
        b, place, width = nest.b, _pairs(nest.b, source, index), nest.width
        if any(at.lanes for at in index):
            both = c.load_vector(b, place, source.element, 2 * width)
            for k, output in enumerate(outputs):
                half = _shuffle(b, both, both, [2 * lane + k for lane in range(width)])
                output.write(b, index, c.Lanes(half), width)
            return
        for k, output in enumerate(outputs):
            at = b.gep(place, [ir.Constant(I64, k)], source_etype=memory_type(source.element))
            output.write(b, index, c.Uniform(c.load_scalar(b, at, source.element)), width)

    nest.run(chunk)


def lower_cat(program: Program, op: Operation) -> None:
    """One tile after the other along the first axis, in order even where the kernel allows any."""
    output = program.new_buffer(op.result)
    start = 0
    for operand in op.operands:
        assert isinstance(operand.type, TensorType)
        place = program.b.gep(output.pointer, [ir.Constant(I64, start)], source_etype=memory_type(output.element))
        program.copy(operand, Buffer(place, operand.type.shape, output.element))
        start += operand.type.size


def lower_gather(program: Program, op: Operation) -> None:
    """`result[..., i, ...] = source[..., indices[..., i, ...], ...]` along `axis`; an index outside gives 0."""
    axis = op.attributes["axis"]
    indices = op.operands[1]
    source = program.materialise(op.operands[0])
    output = program.new_buffer(op.result)
    nest = program.nest([indices], output.shape, op)
    strides = [1] * len(source.shape)
    for k in range(len(strides) - 2, -1, -1):
        strides[k] = strides[k + 1] * source.shape[k + 1]
    size = size_of(source.element)

    def chunk(index: tuple[Index, ...]) -> None:
        chosen = nest.vector(indices, index)
        b, width = nest.b, nest.width
        lanes = isinstance(chosen.type, ir.VectorType)
        wide = ir.VectorType(I64, width) if lanes else I64
        if (chosen.type.element if lanes else chosen.type) != I64:
            chosen = b.sext(chosen, wide)
        inside = b.icmp_unsigned("<", chosen, splat_constant(wide, source.shape[axis]))
        address = b.mul(chosen, splat_constant(wide, strides[axis] * size))
        base: Any = b.ptrtoint(source.pointer, I64)
        for k, at in enumerate(index):
            if k == axis:
                continue
            base = b.add(base, b.mul(at.value, ir.Constant(I64, strides[k] * size)))
            if at.lanes:
                ramp = [ir.Constant(I64, lane * strides[k] * size) for lane in range(width)]
                address = b.add(address, ir.Constant(wide, ramp))
        zero = constant(op.result.type, 0)
        if lanes:
            address = b.add(address, c.splat(b, base, width))
            slots = (program.lane_slot(0), program.lane_slot(1))
            value = lanewise.gather(b, slots, address, inside, c.splat(b, zero, width), source.element)
        else:
            pointer = b.inttoptr(b.add(address, base), c.POINTER)
            value = c.guarded(b, inside, lambda: c.load_scalar(b, pointer, source.element), zero)
        output.write(b, index, c.as_chunk(value), width)

    nest.run(chunk)


def lower_histogram(program: Program, op: Operation) -> None:
    """How often each of 0, 1, ... occurs; values outside of the bins, or masked off, are not counted."""
    values, *mask = op.operands
    assert isinstance(values.type, TensorType)
    assert isinstance(op.result.type, TensorType)
    output = program.new_buffer(op.result)
    bins = op.result.type.size
    memory = memory_type(output.element)
    clear = Nest(program, output.shape)
    clear.run(lambda index: output.write(clear.b, index, c.Uniform(constant(op.result.type, 0)), clear.width))
    nest = program.nest(op.operands, values.type.shape, op)

    def count(b: ir.IRBuilder, value: Any) -> None:
        place = b.gep(output.pointer, [value], source_etype=memory)
        b.store(b.add(b.load(place, typ=memory), ir.Constant(memory, 1)), place)

    def chunk(index: tuple[Index, ...]) -> None:
        given = [nest.vector(v, index) for v in op.operands]
        b, width = nest.b, nest.width
        value = given[0]
        lanes = isinstance(value.type, ir.VectorType)
        wide = ir.VectorType(I64, width) if lanes else I64
        if register_type(values.type) != I64:
            value = b.sext(value, wide)
        counted = b.icmp_unsigned("<", value, splat_constant(wide, bins))
        if mask:
            counted = b.and_(counted, given[1])
        if not lanes:
            with b.if_then(counted):
                count(b, value)
            return
        slot = program.lane_slot(1)
        b.store(value, slot, align=8)

        def one(lane: Any) -> None:
            count(b, b.load(b.gep(slot, [lane], source_etype=I64), typ=I64, align=8))

        lanewise.for_each_lane(b, counted, one)

    nest.run(chunk)
