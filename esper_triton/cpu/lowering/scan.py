"""`tt.scan`: inclusive scans by any combine function, along any axis, in either direction.

Lanes that run along another axis are scanned side by side. A row is scanned chunk by chunk: log2(W) steps inside a
chunk of W lanes (Sklansky's network: the last lane of a left half joins every lane of the right half), then what has
been carried up to the chunk joins all of its lanes, so that a chunk waits for the one before it in one operation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Index, Lanes
from esper_triton.cpu.lowering.elements import ElementFunction
from esper_triton.cpu.lowering.elementwise import I1, I32, I64
from esper_triton.cpu.lowering.nest import Nest, lane_axis
from esper_triton.cpu.lowering.vmath import undefined
from esper_triton.cpu.mlir import Operation, TensorType

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


def lower_scan(program: Program, op: Operation) -> None:
    """An inclusive scan along `axis`, from its end where `reverse`."""
    combine = ElementFunction(program, op)
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    lanes = program.reading_axis(op.operands)
    lanes = lane_axis(source.shape) if lanes is None else lanes
    # Inside a chunk, a function that takes lanes one by one would be called log2(W) times for each of them.
    if op.attributes["axis"] == lanes and combine.in_lanes:
        _scan_rows(program, op, combine)
    else:
        _scan_one_by_one(program, op, combine, lanes)
    combine.finish()


def _scan_rows(program: Program, op: Operation, combine: ElementFunction) -> None:
    axis, reverse = op.attributes["axis"], bool(op.attributes.get("reverse"))
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    shape = source.shape
    nest = program.nest(op.operands, shape, op, axis)
    outputs = [program.new_buffer(result, inner=axis) for result in op.results]
    width, extent = nest.width, shape[axis]
    index = [ZERO] * len(shape)
    others = [k for k, n in enumerate(shape) if n > 1 and k != axis]
    for k in others:
        index[k] = nest.open(shape[k])

    def place(at: Index) -> tuple[Index, ...]:
        if reverse:
            value = nest.builders[at.level].sub(ir.Constant(I64, extent - width), at.value)
            at = Index(value, lanes=True, level=at.level)
        return (*index[:axis], at, *index[axis + 1 :])

    def scan(at: Index) -> tuple[tuple[Index, ...], list[Any]]:
        here = place(at)
        nest.visit(here)
        return here, _scan_lanes(nest, combine, [nest.vector(operand, here) for operand in op.operands], reverse)

    def keep(here: tuple[Index, ...], values: Sequence[Any]) -> list[Any]:
        """Writes a chunk of results; what they carry on: the lane that was scanned last, in every lane."""
        for output, value in zip(outputs, values, strict=True):
            output.write(nest.b, here, Lanes(value), width)
        return [_permuted(nest, value, [0 if reverse else width - 1] * width) for value in values]

    identity = combine.identity()
    if identity is None or extent == width:
        carried = keep(*scan(Index(ZERO.value, lanes=True, level=len(nest.builders) - 1)))
        start = width
    else:
        carried = [c.splat(nest.b, value, width) for value in identity]
        start = 0
    if extent > start:
        at = nest.open(extent, width, start=start, lanes=True)

        def step(carried: list[Any]) -> list[Any]:
            here, values = scan(at)
            # The last lane is carried from here, not from the results, so that the next chunk waits for less.
            last = [_permuted(nest, value, [0 if reverse else width - 1] * width) for value in values]
            for output, value in zip(outputs, combine(nest.b, [*carried, *values]), strict=True):
                output.write(nest.b, here, Lanes(value), width)
            return combine(nest.b, [*carried, *last])

        nest.fold(carried, step)
    for _ in others:
        nest.close()


def _scan_lanes(nest: Nest, combine: ElementFunction, values: list[Any], reverse: bool) -> list[Any]:
    width = nest.width
    half = 1
    while half < width:
        source = list(range(width))
        for lane in range(width):
            if (lane & half) != 0:
                source[lane] = (lane & -half) - 1
        joins = [at != lane for lane, at in enumerate(source)]
        if reverse:
            source, joins = [width - 1 - at for at in reversed(source)], joins[::-1]
        mask = ir.Constant(ir.VectorType(I1, width), [ir.Constant(I1, int(on)) for on in joins])
        joined = combine(nest.b, [*(_permuted(nest, value, source) for value in values), *values])
        values = [nest.b.select(mask, x, y) for x, y in zip(joined, values, strict=True)]
        half *= 2
    return values


def _permuted(nest: Nest, vector: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return nest.b.shuffle_vector(vector, undefined(vector.type), mask)


def _scan_one_by_one(program: Program, op: Operation, combine: ElementFunction, lanes: int | None) -> None:
    axis, reverse = op.attributes["axis"], bool(op.attributes.get("reverse"))
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    shape, extent = source.shape, source.shape[axis]
    if axis == lanes:
        for operand in op.operands:
            program.materialise(operand, axis)
    nest = program.nest(op.operands, shape, op, lanes)
    outputs = [program.new_buffer(result, inner=lanes) for result in op.results]
    index: list[Index] = [ZERO] * len(shape)
    others = [k for k, n in enumerate(shape) if n > 1 and k != axis]
    for k in others:
        index[k] = nest.open(shape[k], nest.width if k == lanes else 1, lanes=k == lanes)

    def at(position: Any, level: int) -> tuple[Index, ...]:
        return (*index[:axis], Index(position, level=level), *index[axis + 1 :])

    def read(here: tuple[Index, ...]) -> list[Any]:
        nest.visit(here)
        return [nest.vector(operand, here) for operand in op.operands]

    def write(here: tuple[Index, ...], values: Sequence[Any]) -> None:
        for output, value in zip(outputs, values, strict=True):
            output.write(nest.b, here, c.as_chunk(value), nest.width)

    last = ir.Constant(I64, extent - 1)
    here = at(last if reverse else ZERO.value, len(nest.builders) - 1)
    first = read(here)
    write(here, first)
    if extent > 1:
        counter = nest.open(extent, 1, start=1)

        def step(total: list[Any]) -> list[Any]:
            here = at(nest.b.sub(last, counter.value) if reverse else counter.value, counter.level)
            values = combine(nest.b, [*total, *read(here)])
            write(here, values)
            return values

        nest.fold(first, step)
    for _ in others:
        nest.close()
