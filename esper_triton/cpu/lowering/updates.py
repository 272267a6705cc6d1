"""Tiles carried around a loop that are updated as soon as that can be done, in the course of another nest.

The sums over rows in the gradient of a normalisation are such tiles: what a row adds to them is at hand while it is
reduced, and would have to be kept, or loaded again, until the end of the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper_triton.cpu.lowering.chunks import Buffer
from esper_triton.cpu.lowering.elementwise import TABLE
from esper_triton.cpu.lowering.nest import definition
from esper_triton.cpu.mlir import Block, Operation, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_VISITED_ONCE = ("tt.reduce", "tt.store")  # whose nests visit every chunk once, so that one may be added to there
_LONGEST = 8  # operations of one update


def may_be_early(argument: Value, yielded: Value, body: Block) -> bool:
    """Whether the operation that yields a tile, element by element, is all that reads what it is yielded in stead of;
    so that it may be done, and overwrite that, as soon as its other operands are there."""
    op = yielded.defining_op
    return (
        op is not None
        and op.block is body
        and op.name in TABLE
        and argument.users == [op]
        and yielded.users == [body.terminator]
        and body.terminator.operands.count(yielded) == 1
    )


def updates_along(
    program: Program, user: Operation | None, ready: set[Value], axis: int | None
) -> tuple[dict[Value, Buffer], list[Operation]]:
    """The updates that a nest for `user`, with lanes along `axis`, can make chunk by chunk, since they need no more
    than the tiles that it has `ready`: where they go, and the operations that they take."""
    updates: dict[Value, Buffer] = {}
    operations: list[Operation] = []
    if user is None or user.name not in _VISITED_ONCE:
        return updates, operations
    for value, target in program.updates.items():
        # A nest in an inner loop or a branch does not run just once in every step.
        if not program.is_lazy(value) or definition(value).block is not user.block or target.inner_axis != axis:
            continue
        steps = _steps_to(program, value, ready, target)
        if steps is not None and len(steps) <= _LONGEST:
            updates[value] = target
            operations += steps
    return updates, operations


def _steps_to(program: Program, value: Value, ready: set[Value], target: Buffer) -> list[Operation] | None:
    """The operations that make a tile, element by element, of what is `ready` and of what is in `target`; None where
    they need anything else, or anything else needs what they make."""
    if value in ready or (value in program.buffers and program.buffers[value].pointer is target.pointer):
        return []
    op = value.defining_op
    if op is None or op.name not in TABLE or len(value.users) > 1 or not isinstance(value.type, TensorType):
        return None
    steps = [op]
    for operand in op.operands:
        before = _steps_to(program, operand, ready, target)
        if before is None:
            return None
        steps += before
    return steps
