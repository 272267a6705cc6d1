"""`tt.atomic_rmw` and `tt.atomic_cas`: one atomic instruction for each element whose mask is set.

Programs of one launch run on several threads, so these are real atomics, with the ordering that the kernel names. Tiles
are computed and loads that are pending are done before, since another program may wait for what comes after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.elementwise import (
    I1,
    I16,
    I64,
    Unlowered,
    constant,
    element_type,
    float_to_float,
    memory_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.nest import is_tile
from esper_triton.cpu.lowering.vmath import splat_constant
from esper_triton.cpu.mlir import Operation, TensorType, Type

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Triton's RMWOp and MemSemantic.
_OPERATIONS = {
    1: "and", 2: "or", 3: "xor", 4: "add", 5: "fadd", 6: "max", 7: "min", 8: "umax", 9: "umin", 10: "xchg",
}  # fmt: skip
_ORDERINGS = {1: "monotonic", 2: "acquire", 3: "release", 4: "acq_rel"}


def lower_atomic_rmw(program: Program, op: Operation) -> None:
    """Read, modify, write; the result is what was there before, zero where the mask is off."""
    kind, ordering = _OPERATIONS[op.attributes["atomic_rmw_op"]], _ORDERINGS[op.attributes["sem"]]
    element = element_type(op.operands[1].type)
    _check(element)

    def emit(b: ir.IRBuilder, pointer: Any, operands: list[Any]) -> Any:
        (value,) = operands
        if kind == "fadd" and str(element) == "bf16":
            return _add_bfloat16(b, pointer, value, ordering)
        return b.atomic_rmw(kind, pointer, value, ordering)

    _each(program, op, 1, emit)


def lower_atomic_cas(program: Program, op: Operation) -> None:
    """Compare bit by bit and swap; the result is what was there before."""
    ordering = _ORDERINGS[op.attributes["sem"]]
    element = element_type(op.operands[1].type)
    _check(element)
    bits = ir.IntType(8 * size_of(element))

    def emit(b: ir.IRBuilder, pointer: Any, operands: list[Any]) -> Any:
        expected, new = (_cast(b, value, bits) for value in operands)
        return _cast(b, _exchange(b, pointer, expected, new, ordering)[0], memory_type(element))

    _each(program, op, 2, emit)


def _check(element: Type) -> None:
    if register_type(element) == I1:
        raise Unlowered("an atomic of bool")


def _cast(b: ir.IRBuilder, value: Any, type_: ir.Type) -> Any:
    return value if value.type == type_ else b.bitcast(value, type_)


def _exchange(b: ir.IRBuilder, pointer: Any, expected: Any, new: Any, ordering: str) -> tuple[Any, Any]:
    # A failed exchange writes nothing, so it can release nothing.
    failed = {"acq_rel": "acquire", "release": "monotonic"}.get(ordering, ordering)
    pair = b.cmpxchg(pointer, expected, new, ordering, failed)
    return b.extract_value(pair, 0), b.extract_value(pair, 1)


def _add_bfloat16(b: ir.IRBuilder, pointer: Any, value: Any, ordering: str) -> Any:
    """By exchange, until nobody came between: bf16 is an integer to LLVM."""
    first = b.load_atomic(pointer, "monotonic", 2, typ=I16)
    before, again, done = b.block, b.append_basic_block("again"), b.append_basic_block("added")
    b.branch(again)
    b.position_at_end(again)
    old = b.phi(I16)
    old.add_incoming(first, before)
    total = b.fadd(float_to_float(b, old, "bf16", "f32"), float_to_float(b, value, "bf16", "f32"))
    found, swapped = _exchange(b, pointer, old, float_to_float(b, total, "f32", "bf16"), ordering)
    old.add_incoming(found, b.block)
    b.cbranch(swapped, done, again)
    b.position_at_end(done)
    return old


def _each(program: Program, op: Operation, count: int, emit: Any) -> None:
    """`emit` for every element that is not masked off; operands are pointer, `count` values and perhaps a mask."""
    program.flush()
    pointer, *rest = op.operands
    values, mask = rest[:count], (rest[count] if len(rest) > count else None)
    result = op.result
    element = element_type(values[0].type)
    if not is_tile(result):
        arguments = [program.scalars[v] for v in values]
        address = program.b.inttoptr(program.scalars[pointer], c.POINTER)
        condition = program.scalars[mask] if mask is not None else ir.Constant(I1, 1)
        program.note(op, "scalar", "" if isinstance(condition, ir.Constant) else "whole")
        program.scalars[result] = c.guarded(
            program.b, condition, lambda: emit(program.b, address, arguments), constant(result.type, 0)
        )
        return
    assert isinstance(result.type, TensorType)
    nest = program.nest(op.operands, result.type.shape, op)
    output = program.new_buffer(result) if result.users else None
    addresses, kept, *places = (program.lane_slot(k) for k in range(2 + count))
    memory, align = memory_type(element), size_of(element)

    def chunk(index: tuple[c.Index, ...]) -> None:
        pointers, *given = (nest.vector(v, index) for v in (pointer, *values))
        b = nest.b
        lanes = any(at.lanes for at in index)
        bits = nest.vector(mask, index) if mask is not None else splat_constant(ir.VectorType(I1, nest.width), 1)
        if not lanes:
            condition = bits if mask is not None else ir.Constant(I1, 1)
            program.note(op, "scalar", "" if isinstance(condition, ir.Constant) else "whole")
            here = b.inttoptr(pointers, c.POINTER)
            old = c.guarded(b, condition, lambda: emit(b, here, given), constant(result.type, 0))
            if output is not None:
                output.write(b, index, c.Uniform(old), nest.width)
            return
        program.note(op, "one by one", "" if isinstance(bits, ir.Constant) else "lanes")
        b.store(pointers, addresses, align=8)
        for place, vector in zip(places, given, strict=True):
            b.store(vector, place, align=align)
        if output is not None:
            b.store(splat_constant(given[0].type, 0), kept, align=align)

        def one(lane: Any) -> None:
            address = b.load(b.gep(addresses, [lane], source_etype=I64), typ=I64, align=8)
            here = [b.gep(place, [lane], source_etype=memory) for place in places]
            old = emit(b, b.inttoptr(address, c.POINTER), [b.load(p, typ=memory, align=align) for p in here])
            if output is not None:
                b.store(old, b.gep(kept, [lane], source_etype=memory), align=align)

        lanewise.for_each_lane(b, bits, one)
        if output is not None:
            output.write(b, index, c.Lanes(b.load(kept, typ=given[0].type, align=align)), nest.width)

    nest.run(chunk)
