"""`tt.reduce` and `tt.scan`: any combine region, any axis, any number of operands.

The combine operation is taken to be associative and commutative, as Triton takes it: lanes are reduced side by side and
joined at the end. The order depends on the shape and the vector width only, so a result is the same on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Buffer, Index, Lanes, Uniform
from esper_triton.cpu.lowering.elements import ElementFunction
from esper_triton.cpu.lowering.elementwise import I32, I64
from esper_triton.cpu.lowering.nest import Nest, lane_axis
from esper_triton.cpu.lowering.vmath import undefined
from esper_triton.cpu.mlir import Operation, TensorType

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


def _across(combine: ElementFunction, b: ir.IRBuilder, vectors: Sequence[Any]) -> list[Any]:
    """Reduce the lanes of vectors to scalars, halving the width each time."""
    current = list(vectors)
    width = current[0].type.count
    while width > 1:
        width //= 2
        halves = []
        for start in (0, width):
            lanes = ir.Constant(ir.VectorType(I32, width), [ir.Constant(I32, start + k) for k in range(width)])
            halves.append([b.shuffle_vector(v, undefined(v.type), lanes) for v in current])
        current = combine(b, [*halves[0], *halves[1]])
    return [b.extract_element(v, ir.Constant(I32, 0)) for v in current]


def lower_reduce(program: Program, op: Operation) -> None:
    """Reduce along `axis`; a result of rank 0 is a scalar."""
    axis = op.attributes["axis"]
    combine = ElementFunction(program, op)
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    shape = source.shape
    nest = program.nest(op.operands, shape, op)
    outputs = [program.new_buffer(r) if isinstance(r.type, TensorType) else None for r in op.results]
    lanes = lane_axis(shape)
    index: list[Index] = [ZERO] * len(shape)
    others = [k for k, extent in enumerate(shape) if extent > 1 and k != axis]
    for k in others:
        index[k] = nest.open(shape[k], nest.width if k == lanes else 1, lanes=k == lanes)

    step = nest.width if axis == lanes else 1

    def at(position: Index) -> list[Any]:
        here = (*index[:axis], position, *index[axis + 1 :])
        nest.visit(here)
        return [nest.vector(operand, here) for operand in op.operands]

    level = len(nest.builders) - 1
    first = Index(ir.Constant(I64, 0), axis == lanes and shape[axis] > 1, level)
    results = at(first)
    if shape[axis] > step:
        position = nest.open(shape[axis], step, start=step, lanes=axis == lanes)
        if shape[axis] == 2 * step:  # one step, for which no loop was made
            results = combine(nest.b, [*results, *at(position)])
            nest.close()
        else:
            partial = [nest.b.phi(value.type) for value in results]
            following = combine(nest.b, [*partial, *at(position)])
            nest.close(list(zip(partial, results, following, strict=True)))
            results = following  # of the last step, which dominates the exit
    b = nest.b
    if axis == lanes and step > 1:
        results = _across(combine, b, results)
    target = tuple(at_k for k, at_k in enumerate(index) if k != axis)
    for output, result, value in zip(outputs, op.results, results, strict=True):
        if output is None:
            program.scalars[result] = value
        else:
            output.write(b, target, c.as_chunk(value), nest.width)
    for _ in others:
        nest.close()
    combine.finish()


def lower_scan(program: Program, op: Operation) -> None:
    """Inclusive scan along `axis`, one element after the other; lanes that run along another axis go side by side."""
    axis, reverse = op.attributes["axis"], bool(op.attributes.get("reverse"))
    inputs = [program.materialise(operand) for operand in op.operands]
    outputs = [program.new_buffer(result) for result in op.results]
    shape = inputs[0].shape
    combine = ElementFunction(program, op)
    extent = shape[axis]
    lanes = lane_axis(shape)
    nest = Nest(program, shape)
    index: list[Index] = [ZERO] * len(shape)
    others = [k for k, n in enumerate(shape) if n > 1 and k != axis]
    for k in others:
        lanes_here = k == lanes and axis != lanes
        index[k] = nest.open(shape[k], nest.width if lanes_here else 1, lanes=lanes_here)

    def at(position: Any) -> tuple[Index, ...]:
        return (*index[:axis], Index(position), *index[axis + 1 :])

    def read(buffers: list[Buffer], position: Any) -> list[Any]:
        chunks = [buffer.read(nest.b, at(position), nest.width) for buffer in buffers]
        return [chunk.value for chunk in chunks if isinstance(chunk, Uniform | Lanes)]

    def write(position: Any, values: Sequence[Any]) -> None:
        for output, value in zip(outputs, values, strict=True):
            output.write(nest.b, at(position), c.as_chunk(value), nest.width)

    last = ir.Constant(I64, extent - 1)
    start = last if reverse else ir.Constant(I64, 0)
    total = read(inputs, start)
    write(start, total)
    if extent == 2:
        position = ir.Constant(I64, 0 if reverse else 1)
        write(position, combine(nest.b, [*total, *read(inputs, position)]))
    elif extent > 2:
        counter = nest.open(extent, 1, start=1)
        partial = [nest.b.phi(value.type) for value in total]
        position = nest.b.sub(last, counter.value) if reverse else counter.value
        following = combine(nest.b, [*partial, *read(inputs, position)])
        write(position, following)
        nest.close(list(zip(partial, total, following, strict=True)))
    for _ in others:
        nest.close()
    combine.finish()
