"""How much of a product has to be computed where masks cut its tiles: as many steps of K, rows and columns as count.

Tiles are as large as the kernel's blocks, whatever is left of the matrix. Beyond the masks of both operands a step of K
adds nothing but zeros; and rows and columns of the result that no store's mask leaves on are seen by nobody.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from esper_triton.cpu.lowering.chunks import maximum
from esper_triton.cpu.lowering.elementwise import TABLE
from esper_triton.cpu.lowering.memory import load_operands, mask_of
from esper_triton.cpu.lowering.ranges import Ranges
from esper_triton.cpu.mlir import Dense, Operation, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Of zero they make zero, in another type.
_CONVERSIONS = {
    "arith.extf", "arith.truncf", "tt.fp_to_fp", "arith.extsi", "arith.extui", "arith.trunci", "arith.sitofp",
    "arith.uitofp",
}  # fmt: skip


def steps_that_count(program: Program, op: Operation) -> Any | None:
    """Steps of K (i64) of a `tt.dot` from which on both operands are +0, whatever there is in memory; None where that
    cannot be said.

    One operand's zeros are not enough: the other's element may be infinite or no number.
    """
    ranges = Ranges(program)
    left, right = op.operands[:2]
    first, second = _nonzero(ranges, left, _rank(left) - 1), _nonzero(ranges, right, _rank(right) - 2)
    return None if first is None or second is None else maximum(program.b, first, second)


def seen(program: Program, op: Operation) -> tuple[Any | None, Any | None]:
    """Rows and columns (i64) of the result of a `tt.dot`, from the first, beyond which no element is ever seen; None
    for all of them."""
    ranges, rank = Ranges(program), _rank(op.result)
    rows, columns = (_stored(program, ranges, _sinks(op, axis)) for axis in (rank - 2, rank - 1))
    return rows, columns


def _shape(value: Value) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape


def _rank(value: Value) -> int:
    return len(_shape(value))


def _nonzero(ranges: Ranges, value: Value, axis: int) -> Any | None:
    """How many elements along an axis of an operand, from the first, the mask of its load, or of a choice between it
    and zero, does not replace by zero."""
    op = value.defining_op
    while op is not None and (op.name in _CONVERSIONS or op.name == "tt.trans"):
        axis = op.attributes["order"][axis] if op.name == "tt.trans" else axis
        op = op.operands[0].defining_op
    if op is None:
        return None
    mask: Value | None
    other: Value | None
    if op.name == "arith.select":
        mask, _, other = op.operands
    elif op.name == "tt.load":
        _, mask, other = load_operands(op)
    else:
        return None
    # A load without a value for what is masked gives zeros here.
    if not (other is None or _is_zero(other)) or mask is None or not isinstance(mask.type, TensorType):
        return None
    return ranges.count(mask, axis)


def _is_zero(value: Value) -> bool:
    op = value.defining_op
    dense = op.attributes["value"] if op is not None and op.name == "arith.constant" else None
    if not isinstance(dense, Dense) or not dense.splat:
        return False
    return bool(dense.value == 0) and math.copysign(1, dense.value) > 0


def _stored(program: Program, ranges: Ranges, stores: list[tuple[Operation, int]] | None) -> Any | None:
    """How many elements along the axis named with it some store may write."""
    most: Any | None = None
    for store, axis in stores or ():
        mask = mask_of(store)
        count = None if mask is None else ranges.count(mask, axis)
        if count is None:
            return None
        most = count if most is None else maximum(program.b, most, count)
    return most


def _sinks(op: Operation, axis: int) -> list[tuple[Operation, int]] | None:
    """The stores that are all there is to see of a result, and which of their axes goes along its `axis`; None where
    there is anything else to see.

    On the way there are operations that make an element, or a line across the axis, from the element or line at the
    same index alone. None of these minds what it finds where nothing counts.
    """
    stores: dict[tuple[Operation, int], None] = {}
    reached: dict[tuple[Value, int], None] = {(op.result, axis): None}
    pending = [(op.result, axis)]
    while pending:
        value, axis = pending.pop()
        for user in value.users:
            places = [k for k, operand in enumerate(user.operands) if operand is value]
            following = _following(user, places, axis)
            if following is None:
                return None
            if user.name == "tt.store":
                stores[user, axis] = None
            pending += [place for place in following if place not in reached]
            reached.update(dict.fromkeys(following))
    return list(stores)


def _following(user: Operation, places: list[int], axis: int) -> list[tuple[Value, int]] | None:
    """What an operation makes of the operands at `places`, and which of its axes is theirs; None if it makes several
    lines of one, or one of several."""
    if user.name in TABLE and places:
        return [(user.result, axis)]
    match user.name:
        case "tt.store" if places == [1]:
            return []
        case "tt.dot":
            # Rows of the left operand make rows, columns of the right one columns; and it is added to both.
            own = {0: _rank(user.result) - 2, 1: _rank(user.result) - 1, 2: axis}
            return [(user.result, axis)] if all(own[k] == axis for k in places) else None
        case "tt.reduce":
            summed = user.attributes["axis"]
            axes = summed if isinstance(summed, tuple) else (summed,)  # several, where `simplify` has made one of them
            if axis in axes:
                return None
            return [(result, axis - sum(other < axis for other in axes)) for result in user.results]
        case "tt.expand_dims":
            return [(user.result, axis + (user.attributes["axis"] <= axis))]
        case "tt.broadcast" if _shape(user.operands[0])[axis] > 1:
            return [(user.result, axis)]
        case "tt.trans":
            return [(user.result, list(user.attributes["order"]).index(axis))]
        case "scf.for" if places and min(places) >= 3:
            arguments = user.regions[0].block.arguments
            return [(v, axis) for k in places for v in (arguments[k - 2], user.results[k - 3])]
        case "scf.yield" if user.parent is not None and user.parent.name == "scf.for":
            arguments = user.parent.regions[0].block.arguments
            return [(v, axis) for k in places for v in (arguments[k + 1], user.parent.results[k])]
    return None
