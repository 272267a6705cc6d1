"""`tt.dot`: `c + a @ b` over tiles in scratch memory, with a block of the result held in registers.

f16 and bf16 operands are widened to float32 first: their products are exact there, so this is at least as accurate as
the hardware that Triton was made for. `inputPrecision` asks for no less than float32 and gets it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import Buffer, Index, Lanes, Uniform
from esper_triton.cpu.lowering.elementwise import F32, F64, I64, Unlowered, float_to_float
from esper_triton.cpu.lowering.nest import Nest
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.lowering.vmath import fma, splat_constant
from esper_triton.cpu.mlir import Dense, Operation, ScalarType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Rows of the register block. With two vectors a row: 8 accumulators, enough to hide an FMA's latency on two units, and
# room in 16 registers for the operands.
_ROWS = 4


def lower_dot(program: Program, op: Operation) -> None:
    """Batches (leading axes) are looped over; M, N and K may be any extents."""
    a, b, accumulator = op.operands
    names = [str(v.type.element) for v in op.operands if isinstance(v.type, TensorType)]
    single = ("f16", "bf16", "f32")
    if names[0] in single and names[1] in single and names[2] in single:
        compute = ScalarType("f32")
    elif set(names) == {"f64"}:
        compute = ScalarType("f64")
    else:
        raise Unlowered(f"operands {names[0]} and {names[1]} with accumulator {names[2]}")
    # The left operand is read one element at a time, so its transposition is a matter of the index.
    turned = _turned(a)
    left, right = (_in_type(program, op, v, compute) for v in (turned or a, b))
    initial = None if _is_zero(accumulator) else program.materialise(accumulator)
    output = program.new_buffer(op.result)
    *batch, rows, columns = output.shape
    depth = left.shape[-2 if turned else -1]

    nest = Nest(program, (*batch, rows, columns))
    leading = [nest.open(extent) for extent in batch]
    width = min(columns, program.lanes)
    height = next(n for n in range(min(_ROWS, rows), 0, -1) if rows % n == 0)
    column = nest.open(columns, width)
    row = nest.open(rows, height)
    lanes = Index(column.value, columns > 1, column.level)
    register = F32 if compute.name == "f32" else F64
    vector = ir.VectorType(register, width) if columns > 1 else register

    def position(k: int) -> tuple[Index, ...]:
        return (*leading, Index(nest.b.add(row.value, ir.Constant(I64, k))), lanes)

    sums: list[LLVMValue] = []
    for k in range(height):
        if initial is None:
            sums.append(splat_constant(vector, 0.0))
        else:
            value = initial.read(nest.b, position(k), width)
            assert isinstance(value, Lanes | Uniform)
            sums.append(float_to_float(nest.b, value.value, names[2], compute.name))

    def step(at: Any, partial: list[LLVMValue]) -> list[LLVMValue]:
        line = right.read(nest.b, (*leading, Index(at), lanes), width)
        assert isinstance(line, Lanes | Uniform)
        result = []
        for k, total in enumerate(partial):
            here = (Index(at), position(k)[-2]) if turned else (position(k)[-2], Index(at))
            factor = left.read(nest.b, (*leading, *here), 1)
            assert isinstance(factor, Uniform)
            spread = c.splat(nest.b, factor.value, width) if columns > 1 else factor.value
            result.append(fma(nest.b, spread, line.value, total))
        return result

    if depth == 1:
        sums = step(ir.Constant(I64, 0), sums)
    else:
        at = nest.open(depth)
        partial = [nest.b.phi(vector) for _ in sums]
        following = step(at.value, partial)
        nest.close(list(zip(partial, sums, following, strict=True)))
        sums = following
    for k, value in enumerate(sums):
        value = float_to_float(nest.b, value, compute.name, names[2])
        output.write(nest.b, position(k), c.as_chunk(value), width)
    for _ in range(len(leading) + 2):
        nest.close()


def _turned(value: Value) -> Value | None:
    """What `value` is the transposition of, where that exchanges the last two axes; None otherwise."""
    op = value.defining_op
    if op is None or op.name != "tt.trans":
        return None
    axes = list(range(len(op.attributes["order"])))
    axes[-2:] = reversed(axes[-2:])
    return op.operands[0] if list(op.attributes["order"]) == axes else None


def _is_zero(value: Value) -> bool:
    op = value.defining_op
    if op is None or op.name != "arith.constant":
        return False
    dense = op.attributes["value"]
    return isinstance(dense, Dense) and dense.splat and dense.value == 0


def _in_type(program: Program, user: Operation, value: Value, element: ScalarType) -> Buffer:
    """The tile in scratch memory with its elements widened to `element`."""
    assert isinstance(value.type, TensorType)
    source = str(value.type.element)
    if source == element.name:
        return program.materialise(value)
    wide = Value(value.name, TensorType(value.type.shape, element))
    buffer = program.new_buffer(wide, register=False)
    nest = program.nest([value], value.type.shape, user)

    def convert(index: tuple[Index, ...]) -> None:
        chunk = float_to_float(nest.b, nest.vector(value, index), source, element.name)
        buffer.write(nest.b, index, c.as_chunk(chunk), nest.width)

    nest.run(convert)
    return buffer
