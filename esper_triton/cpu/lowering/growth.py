"""By how much values grow from one step of a loop, or from one program, to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.lowering.control import advance_of
from esper_triton.cpu.lowering.elementwise import I64, element_type, size_of
from esper_triton.cpu.lowering.nest import is_tile
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.mlir import Block, Operation, PointerType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_SAME_IN_EACH_ELEMENT = ("tt.splat", "tt.expand_dims", "tt.broadcast")
Growth = LLVMValue | None  # i64, in bytes for addresses
NOTHING = ir.Constant(I64, 0)  # the growth of what is known to stay what it is


def growth(program: Program, value: Value, block: Block) -> Growth:
    """By how much every element of a value grows from one run of `block` to the next, if that is known.

    The block is the body of a `scf.for`, or of a kernel. Programs of a kernel run in the order of their first index.
    """
    if value.block is block:
        return _of_argument(program, value, block)
    op = value.defining_op
    if op is None or op.block is not block:
        return NOTHING
    if op.name == "tt.get_program_id":
        return ir.Constant(I64, 1) if op.attributes["axis"] == 0 else NOTHING
    if op.name in (*_SAME_IN_EACH_ELEMENT, "arith.extsi", "arith.extui"):
        return growth(program, op.operands[0], block)
    if op.name not in ("tt.addptr", "arith.addi", "arith.subi", "arith.muli"):
        return NOTHING if op.name in ("tt.make_range", "arith.constant") else None
    first, second = (growth(program, operand, block) for operand in op.operands)
    if first is None or second is None:
        return None
    if op.name == "arith.muli":
        return _of_product(program, op, first, second)
    if second is NOTHING:
        return first
    if op.name == "arith.subi":
        return program.b.sub(first, second)
    second = program.b.mul(second, _element_size(op.result))
    return second if first is NOTHING else program.b.add(first, second)


def _of_argument(program: Program, value: Value, block: Block) -> Growth:
    """The growth of a kernel's argument, or of a loop's counter or what is carried around it."""
    around = block.region.parent
    assert around is not None
    if around.name != "scf.for":
        return NOTHING
    if value.index == 0:
        return _wide(program.b, program.scalars[around.operands[2]])
    yielded = block.terminator.operands[value.index - 1]
    if is_tile(value):
        return advance_of(program, value, yielded)
    op = yielded.defining_op
    if op is None or op.name not in ("tt.addptr", "arith.addi") or op.operands[0] is not value:
        return None
    step = program.scalars.get(op.operands[1])
    return None if step is None else program.b.mul(_wide(program.b, step), _element_size(value))


def _of_product(program: Program, op: Operation, first: LLVMValue, second: LLVMValue) -> Growth:
    """The growth of a product, one factor of which stays what it is, from that of its factors."""
    if first is NOTHING and second is NOTHING:
        return NOTHING
    for growing, other, still in ((first, op.operands[1], second), (second, op.operands[0], first)):
        factor = _scalar(program, other) if still is NOTHING else None
        if factor is not None:
            return program.b.mul(growing, _wide(program.b, factor))
    return None


def _scalar(program: Program, value: Value) -> LLVMValue | None:
    """The LLVM value of a scalar, or of what every element of a tile is."""
    while value.defining_op is not None and value.defining_op.name in _SAME_IN_EACH_ELEMENT:
        value = value.defining_op.operands[0]
    return program.scalars.get(value)


def _element_size(value: Value) -> ir.Constant:
    """How many bytes an address grows by when an element is added to it; 1 for an integer."""
    type_ = element_type(value.type)
    return ir.Constant(I64, size_of(type_.pointee) if isinstance(type_, PointerType) else 1)


def _wide(b: ir.IRBuilder, value: LLVMValue) -> LLVMValue:
    return value if value.type == I64 else b.sext(value, I64)
