"""From which of a function's arguments a pointer is computed."""

from __future__ import annotations

from collections.abc import Sequence

from esper_triton.cpu.mlir import Operation, Value

# The result points where the first operand does.
_SAME_STORAGE = {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape", "tt.bitcast"}


def origins(value: Value) -> set[Value | None]:
    """The arguments of its function that a pointer, or a tile of them, is computed from; None among them for anything
    else."""
    return _origins(value, set())


def _origins(value: Value, seen: set[Value]) -> set[Value | None]:
    if value in seen:
        return set()
    seen.add(value)
    op = value.defining_op
    if op is not None:
        if op.name in _SAME_STORAGE:
            return _origins(op.operands[0], seen)
        return _of_all(_passed(op, value.index) if op.name != "arith.select" else op.operands[1:], seen)
    assert value.block is not None
    parent = value.block.region.parent
    assert parent is not None
    if parent.name == "tt.func":
        # The arguments of other blocks come from several places, and are not followed.
        return {value if value.block is parent.regions[0].blocks[0] else None}
    if parent.name == "scf.while" and value.block is parent.regions[1].block:
        return _origins(parent.regions[0].block.terminator.operands[1 + value.index], seen)
    number = value.index - (parent.name == "scf.for")  # the first argument of a for loop's body is the counter
    if parent.name == "scf.for":
        first, body = parent.operands[3:], parent.regions[0].block
    elif parent.name == "scf.while":
        first, body = parent.operands, parent.regions[1].block
    else:
        return {None}
    return _of_all([first[number], body.terminator.operands[number]], seen)


def _passed(op: Operation, number: int) -> list[Value]:
    """The values that result `number` of a loop or branch is one of; none for another operation."""
    match op.name:
        case "scf.for":
            return [op.operands[3 + number], op.regions[0].block.terminator.operands[number]]
        case "scf.while":
            return [op.regions[0].block.terminator.operands[1 + number]]
        case "scf.if":
            return [region.block.terminator.operands[number] for region in op.regions]
    return []


def _of_all(values: Sequence[Value], seen: set[Value]) -> set[Value | None]:
    if not values:
        return {None}
    return set().union(*(_origins(value, seen) for value in values))
