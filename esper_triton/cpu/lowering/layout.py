"""How the elements of a tile of indices or addresses change along its axes, as far as the kernel's text says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_triton.cpu.lowering.elementwise import TABLE, element_type, size_of
from esper_triton.cpu.mlir import Operation, PointerType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

WORTH_TURNING = 4  # extent from which a tile that lies across the lanes is turned rather than read lane by lane

Steps = tuple[int | None, ...]


def steps(program: Program, value: Value) -> Steps:
    """The constant difference between neighbours along each axis, None where it is not known to be constant.

    Addresses count in bytes. Integers that wrap around are not looked for.
    """
    return _steps(program, value, {})


def _steps(program: Program, value: Value, known: dict[Value, Steps]) -> Steps:
    if value not in known:
        known[value] = _compute(program, value, known)
    return known[value]


def _compute(program: Program, value: Value, known: dict[Value, Steps]) -> Steps:
    assert isinstance(value.type, TensorType)
    unknown: Steps = (None,) * len(value.type.shape)
    if value in program.shifted:
        return _steps(program, program.shifted[value][0], known)
    op = value.defining_op
    if op is None or value in program.buffers:
        return unknown
    match op.name:
        case "tt.make_range":
            return (1,)
        case "tt.splat":
            return (0,) * len(unknown)
        case "arith.constant":
            return (0,) * len(unknown) if op.attributes["value"].splat else unknown
        case "tt.expand_dims":
            inner, axis = _steps(program, op.operands[0], known), op.attributes["axis"]
            return (*inner[:axis], 0, *inner[axis:])
        case "tt.broadcast":
            source = op.operands[0].type
            assert isinstance(source, TensorType)
            pairs = zip(source.shape, _steps(program, op.operands[0], known), strict=True)
            return tuple(0 if extent == 1 else step for extent, step in pairs)
        case "tt.trans":
            inner = _steps(program, op.operands[0], known)
            return tuple(inner[axis] for axis in op.attributes["order"])
    if op.name != "tt.addptr" and op.name not in TABLE:
        return unknown
    operands = [_steps(program, operand, known) for operand in op.operands]
    return tuple(_combined(op, along) for along in zip(*operands, strict=True))


def _combined(op: Operation, along: Steps) -> int | None:
    """The step of an operation's result along one axis, from its operands'."""
    if all(step == 0 for step in along):
        return 0
    if any(step is None for step in along):
        return None
    first, *rest = (step or 0 for step in along)
    match op.name:
        case "arith.extsi":
            return first
        case "arith.addi":
            return first + rest[0]
        case "arith.subi":
            return first - rest[0]
        case "tt.addptr":
            pointer = element_type(op.result.type)
            assert isinstance(pointer, PointerType)
            return first + rest[0] * size_of(pointer.pointee)
        case "arith.muli":
            for step, other in ((first, op.operands[1]), (rest[0], op.operands[0])):
                factor = other.defining_op
                if factor is not None and factor.name == "arith.constant" and factor.attributes["value"].splat:
                    return step * int(factor.attributes["value"].value)
    return None


def contiguous_axis(program: Program, pointers: Value) -> int | None:
    """The axis along which a tile of pointers steps from one element of memory to the next, None if there is none."""
    pointer = element_type(pointers.type)
    assert isinstance(pointers.type, TensorType)
    assert isinstance(pointer, PointerType)
    size = size_of(pointer.pointee)
    extents_and_steps = enumerate(zip(pointers.type.shape, steps(program, pointers), strict=True))
    return max((axis for axis, (extent, step) in extents_and_steps if extent > 1 and step == size), default=None)
