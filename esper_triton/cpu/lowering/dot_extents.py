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
    stores = _sinks(op)
    if stores is None:
        return None, None
    ranges, rank = Ranges(program), _rank(op.result)
    rows, columns = (_stored(program, ranges, stores, axis) for axis in (rank - 2, rank - 1))
    return rows, columns


def _rank(value: Value) -> int:
    assert isinstance(value.type, TensorType)
    return len(value.type.shape)


def _nonzero(ranges: Ranges, value: Value, axis: int) -> Any | None:
    """How many elements along an axis of an operand, from the first, its mask does not replace by zero."""
    op = value.defining_op
    while op is not None and (op.name in _CONVERSIONS or op.name == "tt.trans"):
        axis = op.attributes["order"][axis] if op.name == "tt.trans" else axis
        op = op.operands[0].defining_op
    if op is None or op.name != "tt.load":
        return None
    _, mask, other = load_operands(op)
    if mask is None or not (other is None or _is_zero(other)):
        return None
    return ranges.count(mask, axis)


def _is_zero(value: Value) -> bool:
    op = value.defining_op
    dense = op.attributes["value"] if op is not None and op.name == "arith.constant" else None
    if not isinstance(dense, Dense) or not dense.splat:
        return False
    return bool(dense.value == 0) and math.copysign(1, dense.value) > 0


def _stored(program: Program, ranges: Ranges, stores: list[Operation], axis: int) -> Any | None:
    """How many elements along an axis some store may write."""
    most: Any | None = None
    for store in stores:
        mask = mask_of(store)
        count = None if mask is None else ranges.count(mask, axis)
        if count is None:
            return None
        most = count if most is None else maximum(program.b, most, count)
    return most


def _sinks(op: Operation) -> list[Operation] | None:
    """The stores that are all there is to see of a result, element by element; None where there is anything else.

    On the way there are element-wise operations, loops that carry it, and products that are added to it. None of these
    minds what it finds in elements that do not count.
    """
    stores: dict[Operation, None] = {}
    reached: dict[Value, None] = {op.result: None}
    pending = [op.result]
    while pending:
        value = pending.pop()
        for user in value.users:
            places = [k for k, operand in enumerate(user.operands) if operand is value]
            following = _following(user, places)
            if following is None:
                return None
            if user.name == "tt.store":
                stores[user] = None
            pending += [v for v in following if v not in reached]
            reached.update(dict.fromkeys(following))
    return list(stores)


def _following(user: Operation, places: list[int]) -> list[Value] | None:
    """What an operation makes of the operands at `places`, the same elements of it from each; None if it is not so."""
    if user.name in TABLE and places:
        return [user.result]
    if (user.name == "tt.dot" and places == [2]) or (user.name == "tt.store" and places == [1]):
        return user.results
    if user.name == "scf.for" and places and min(places) >= 3:
        arguments = user.regions[0].block.arguments
        return [v for k in places for v in (arguments[k - 2], user.results[k - 3])]
    loop = user.parent
    if user.name == "scf.yield" and loop is not None and loop.name == "scf.for":
        arguments = loop.regions[0].block.arguments
        return [v for k in places for v in (arguments[k + 1], loop.results[k])]
    return None
