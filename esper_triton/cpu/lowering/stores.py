"""`tt.store`: in what order a store and the loads that it depends on are done.

Nothing that a store writes may be seen by a load that comes before it. The loads that what is stored is made of are
computed in the store's own loop where they read the very elements that it writes, or where their addresses turn out, at
run time, not to overlap with its; and before it otherwise. All other loads so far are computed before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import memory
from esper_triton.cpu.lowering.elementwise import I1, element_type
from esper_triton.cpu.lowering.layout import WORTH_TURNING, contiguous_axis, steps
from esper_triton.cpu.lowering.memory import load_operands, mask_of
from esper_triton.cpu.lowering.nest import definition, is_tile
from esper_triton.cpu.lowering.ranges import Ranges
from esper_triton.cpu.mlir import Operation, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


def lower_store(program: Program, op: Operation) -> None:
    """A scalar or a tile."""
    pointer, value = op.operands[:2]
    if not is_tile(pointer):
        program.flush()
        address = program.b.inttoptr(program.scalars[pointer], c.POINTER)
        condition = program.scalars[op.operands[2]] if len(op.operands) > 2 else ir.Constant(I1, 1)
        program.note(op, "scalar", "whole" if len(op.operands) > 2 else "")
        with program.b.if_then(condition):
            c.store_scalar(program.b, program.scalars[value], address, element_type(value.type))
        return
    in_place = _steps_through_memory(program, pointer)
    program.prepare(op.operands, _store_axis(program, op))
    hazards = [
        v
        for v in program.closure(op.operands)
        if v in program.pending and not (in_place and load_operands(definition(v))[0] is pointer)
    ]
    program.flush(but=program.closure(op.operands))
    apart = _apart(program, op, hazards)
    if apart is None:
        for value in hazards:
            program.materialise(value)
        _store_tile(program, op)
    else:
        _store_either_way(program, op, apart, hazards)


def _store_tile(program: Program, op: Operation) -> None:
    pointer = op.operands[0]
    assert isinstance(pointer.type, TensorType)
    nest = program.nest(op.operands, pointer.type.shape, op, _store_axis(program, op))
    nest.run(lambda index: memory.store(nest, op, index))


def _apart(program: Program, op: Operation, hazards: Sequence[Value]) -> Any | None:
    """i1: whether no load that a store depends on can see what it writes; None where that cannot be asked."""
    ranges = Ranges(program)
    stored = ranges.of(op.operands[0], mask_of(op)) if hazards else None
    if stored is None:
        return None
    result: Any = ir.Constant(I1, 1)
    accesses = dict.fromkeys(load_operands(definition(v))[:2] for v in hazards)
    for pointers, mask in accesses:
        loaded = ranges.of(pointers, mask)
        if loaded is None:
            return None
        result = program.b.and_(result, ranges.are_apart(stored, loaded))
    return result


def _store_either_way(program: Program, op: Operation, apart: Any, hazards: Sequence[Value]) -> None:
    """Loads computed in the store's own loop where they cannot overlap it, and before it otherwise."""
    visited = program.closure(op.operands)
    before = dict(program.buffers)
    fused, separate, join = (program.new_block(n) for n in ("apart", "overlapping", "stored"))
    program.b.cbranch(apart, fused, separate)
    program.b.position_at_end(fused)
    with program.scope():
        _store_tile(program, op)
        kept = {value: buffer for value, buffer in program.buffers.items() if value not in before}
    program.b.branch(join)
    program.b.position_at_end(separate)
    program.terse = True
    with program.scope():
        # What is needed afterwards has to be found in the same place whichever way was taken.
        program.targets.update(kept)
        for value in (*hazards, *kept):
            program.materialise(value, kept[value].inner if value in kept else None)
        _store_tile(program, op)
    program.terse = False
    program.b.branch(join)
    program.b.position_at_end(join)
    program.buffers.update(kept)
    for value in visited:
        program.pending.pop(value, None)


def _store_axis(program: Program, op: Operation) -> int | None:
    pointer = op.operands[0]
    assert isinstance(pointer.type, TensorType)
    along = contiguous_axis(program, pointer)
    return along if along is not None and pointer.type.shape[along] >= WORTH_TURNING else None


def _steps_through_memory(program: Program, pointer: Value) -> bool:
    """Whether a tile of pointers is one row of addresses, no two of them equal, in order."""
    assert isinstance(pointer.type, TensorType)
    axes = [axis for axis, extent in enumerate(pointer.type.shape) if extent > 1]
    return not axes or (len(axes) == 1 and steps(program, pointer)[axes[0]] not in (0, None))
