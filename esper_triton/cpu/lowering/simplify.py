"""What is taken out of a kernel before it is lowered: reshapes that a reduction can do without.

`tl.sum(x)` and its like without an axis reshape the tile to one axis first, and a reshaped tile has to be in memory.
"""

from __future__ import annotations

from esper_triton.cpu.lowering.elements import has_identity
from esper_triton.cpu.mlir import Module, Operation, TensorType, Value


def drop_reshapes(module: Module) -> None:
    """Let the users of a reshape that changes nothing take its operand, and reduce all axes of a tile at once, as
    `axis` = (0, 1, ...), instead of the one axis of its flat form."""
    for function in module.functions.values():
        for op in list(function.walk()):
            if op.name == "tt.reshape" and op.result.type == op.operands[0].type:
                for user in list(op.result.users):
                    _replace(user, op.result, op.operands[0])
                _drop(op)
            elif op.name == "tt.reduce" and len(op.operands) == 1 and has_identity(op):
                (tile,) = op.operands
                reshape = tile.defining_op
                assert isinstance(tile.type, TensorType)
                if reshape is None or reshape.name != "tt.reshape" or len(tile.type.shape) != 1:
                    continue
                source = reshape.operands[0]
                assert isinstance(source.type, TensorType)
                _replace(op, tile, source)
                op.attributes["axis"] = tuple(range(len(source.type.shape)))
                if not tile.users:
                    _drop(reshape)


def _replace(user: Operation, value: Value, by: Value) -> None:
    user.operands = [by if operand is value else operand for operand in user.operands]
    user.successor_operands = [
        [by if operand is value else operand for operand in operands] for operands in user.successor_operands
    ]
    value.users.remove(user)
    if user not in by.users:
        by.users.append(user)


def _drop(op: Operation) -> None:
    assert op.block is not None
    op.block.operations.remove(op)
    for operand in op.operands:
        operand.users.remove(op)
