"""`tt.reduce`: any combine function, any axis, any number of operands.

The combine function is taken to be associative and commutative, as Triton takes it: lanes are reduced side by side, in
several accumulators where one would wait for itself, and joined at the end. The order depends on the shape, the masks'
bounds and the vector width only, so a result is the same on every run.

Reductions of tiles of one shape along one axis, none of which needs another's result, go through their tiles together:
what they share is loaded and computed once, and not kept in memory for the next of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Index
from esper_triton.cpu.lowering.elements import ElementFunction
from esper_triton.cpu.lowering.elementwise import I32, I64, TABLE, size_of
from esper_triton.cpu.lowering.nest import SHAPE_OPS, is_lazy_operation, is_tile
from esper_triton.cpu.lowering.vmath import undefined
from esper_triton.cpu.mlir import Operation, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_Chunks = list[Any]  # LLVM values of one chunk of every operand

_REGISTERS = 8  # of vectors, for accumulators: half of what AVX2 has
_FARTHEST = 256  # operations ahead that are searched for reductions to do along with one
_TOGETHER = 4  # reductions at most, whose sums so far have to stay in registers
_DEEPEST = 32  # operations ahead that a reduction done along with an earlier one may depend on, one on the other
# What comes between two reductions that are done together, besides arithmetic.
_HARMLESS = {"arith.constant", "tt.addptr", "tt.load", *SHAPE_OPS}
_LIGHT = 6  # instructions per chunk up to which the loop would wait for a single accumulator


def lower_reduce(program: Program, op: Operation) -> None:
    """Reduce along `axis`; a result of rank 0 is a scalar."""
    if _is_done(program, op):
        return
    combine = ElementFunction(program, op)
    together = {op: combine}
    if combine.in_lanes:
        others = ((other, function) for other, function in _alike(program, op) if function.in_lanes)
        together |= dict(islice(others, _TOGETHER - 1))
    _Reduction(program, together).lower()
    combine.finish()


def _alike(program: Program, op: Operation) -> Iterator[tuple[Operation, ElementFunction]]:
    """Later reductions that can be done along with `op`: those of the same shape and axis whose operands can be
    computed by now, with nothing between that touches memory or branches."""
    assert op.block is not None
    block = op.block.operations
    start = block.index(op)
    ahead = block[start : start + _FARTHEST]
    depths = {value: math.inf for each in ahead if not _is_arithmetic(each) for value in each.results}
    for other in ahead[1:]:
        if other.name == op.name and _shape_and_axis(other) == _shape_and_axis(op):
            if not _is_done(program, other) and all(depths.get(v, 0) <= _DEEPEST for v in other.operands):
                yield other, ElementFunction(program, other)
        elif other.regions or (other.name not in TABLE and other.name not in _HARMLESS):
            return
        elif _is_arithmetic(other):
            depths[other.results[0]] = 1 + max((depths.get(v, 0) for v in other.operands), default=0)


def _is_done(program: Program, op: Operation) -> bool:
    """Whether a reduction was computed along with an earlier one."""
    return op.results[0] in program.scalars or op.results[0] in program.buffers


def _is_arithmetic(op: Operation) -> bool:
    """Whether it computes a tile element by element, from nothing that is in memory."""
    return len(op.results) == 1 and is_tile(op.results[0]) and is_lazy_operation(op) and op.name != "tt.load"


def _shape_and_axis(op: Operation) -> tuple[Any, Any]:
    source = op.operands[0].type
    assert isinstance(source, TensorType)
    return source.shape, op.attributes["axis"]


class _Reduction:
    """Reductions of tiles of one shape along one axis, each with its combine function."""

    def __init__(self, program: Program, together: Mapping[Operation, ElementFunction]) -> None:
        self._program, self._together = program, together
        op, *others = together
        self._operands = [operand for each in together for operand in each.operands]
        self._results = [result for each in together for result in each.results]
        axis = op.attributes["axis"]
        self._axes: tuple[int, ...] = axis if isinstance(axis, tuple) else (axis,)  # several: all there are
        source = op.operands[0].type
        assert isinstance(source, TensorType)
        self._shape = source.shape
        light = together[op].in_lanes and program.weight(self._operands) <= _LIGHT
        along = program.reading_axis(self._operands)
        self._nest = program.nest(self._operands, self._shape, op, along, also=others)
        lanes = self._nest.axis
        inner = None if lanes is None or lanes in self._axes else lanes - (lanes > self._axes[0])
        self._outputs = [
            program.new_buffer(r, inner=inner) if isinstance(r.type, TensorType) else None for r in self._results
        ]
        self._index: list[Index] = [ZERO] * len(self._shape)
        width = self._nest.width
        sizes = [size_of(value.type) * width for value in self._operands]
        registers = sum(-(-size // (2 * program.lanes)) for size in sizes)
        chunks = 1 if lanes is None else self._shape[lanes] // width
        self._most = min(chunks, max(1, _REGISTERS // registers)) if light else 1
        identities = [combine.identity() for combine in together.values()]
        known = [value for identity in identities for value in identity or ()]
        self._identity = None if None in identities else [c.splat(program.b, v, width) for v in known]

    def lower(self) -> None:
        nest, lanes = self._nest, self._nest.axis
        # Neighbouring chunks of a row are reduced side by side; each has masks of its own, and those cost code.
        group = 1 if lanes in self._axes else min(self._most, 2) if nest.is_masked else self._most
        others = [k for k, extent in enumerate(self._shape) if extent > 1 and k not in self._axes]
        for k in others:
            self._index[k] = nest.open(self._shape[k], nest.width * group if k == lanes else 1, lanes=k == lanes)
        if lanes is None:
            self._write(self._index, self._at(self._index))
        elif lanes in self._axes:
            self._write(self._index, self._across(self._along_lanes(lanes)))
        else:
            beside = [self._with(lanes, nest.further(self._index[lanes], k * nest.width)) for k in range(group)]
            for index, values in zip(beside, self._along_rows(beside), strict=True):
                self._write(index, values)
        for _ in others:
            nest.close()

    def _with(self, axis: int, position: Index) -> list[Index]:
        return [*self._index[:axis], position, *self._index[axis + 1 :]]

    def _at(self, index: Sequence[Index]) -> _Chunks:
        here = tuple(index)
        self._nest.visit(here)
        return [self._nest.vector(operand, here) for operand in self._operands]

    def _write(self, index: Sequence[Index], values: _Chunks) -> None:
        nest = self._nest
        target = tuple(at for k, at in enumerate(index) if k not in self._axes)
        for output, result, value in zip(self._outputs, self._results, values, strict=True):
            if output is None:
                self._program.scalars[result] = value
            else:
                output.write(nest.b, target, c.as_chunk(value), nest.width)

    def _along_rows(self, beside: Sequence[Sequence[Index]]) -> list[_Chunks]:
        """Elements at the same place in every slice, for several places."""
        nest, (axis,) = self._nest, self._axes
        extent = self._shape[axis]

        def rows(position: Index) -> list[_Chunks]:
            return [self._at([*index[:axis], position, *index[axis + 1 :]]) for index in beside]

        if extent == 1:
            return rows(ZERO)
        if self._identity is None:
            first, start = rows(ZERO), 1
        else:
            first, start = [self._identity] * len(beside), 0
        position = nest.open(extent, 1, start=start)
        return self._accumulate(first, lambda: rows(position))

    def _along_lanes(self, lanes: int) -> _Chunks:
        """The chunks of a row, or of all rows, to one chunk."""
        nest, width, extent = self._nest, self._nest.width, self._shape[lanes]
        if self._identity is not None:
            rows = [k for k in self._axes if k != lanes and self._shape[k] > 1]
            return self._joined(self._all_rows(rows, lanes, [self._identity] * self._most))
        count = 1 if nest.is_masked else self._most
        first = self._abreast(Index(ZERO.value, lanes=True, level=len(nest.builders) - 1), lanes, count)
        if extent > width * count:
            position = nest.open(extent, width * count, start=width * count, lanes=True)
            first = self._accumulate(first, lambda: self._abreast(position, lanes, count))
        return self._joined(first)

    def _all_rows(self, axes: Sequence[int], lanes: int, parts: list[_Chunks]) -> list[_Chunks]:
        """The elements along `axes` and in the lanes, joined to `parts`."""
        if not axes:
            return self._row(lanes, parts)
        self._index[axes[0]] = self._nest.open(self._shape[axes[0]])
        return self._fold(parts, lambda so_far: self._all_rows(axes[1:], lanes, so_far))

    def _row(self, lanes: int, parts: list[_Chunks]) -> list[_Chunks]:
        nest, width, extent = self._nest, self._nest.width, self._shape[lanes]
        step = width * len(parts)
        if not nest.is_masked:
            position = nest.open(extent, step, lanes=True)
            return self._accumulate(parts, lambda: self._abreast(position, lanes, len(parts)))
        split = nest.split(tuple(self._index), lanes) if len(parts) > 1 else None
        if split is None:
            rest = nest.open(extent, width, lanes=True)
        else:
            whole = nest.b.and_(split[0], ir.Constant(I64, -step))
            unmasked = nest.open_between(ZERO.value, whole, step, lanes=True)
            parts = self._accumulate(parts, lambda: self._abreast(unmasked, lanes, len(parts), split[2]))
            # What is left is less than a step, or has masks.
            rest = nest.open_between(whole, ir.Constant(I64, extent), width, lanes=True)
        return [*self._accumulate(parts[:1], lambda: self._abreast(rest, lanes, 1)), *parts[1:]]

    def _abreast(self, position: Index, lanes: int, count: int, masks: Sequence[Value] = ()) -> list[_Chunks]:
        """Neighbouring chunks, in which `masks` are on."""
        places = [self._with(lanes, self._nest.further(position, k * self._nest.width)) for k in range(count)]
        for place in places:
            self._nest.leave_on(masks, tuple(place))
        return [self._at(place) for place in places]

    def _accumulate(self, first: list[_Chunks], more: Callable[[], list[_Chunks]]) -> list[_Chunks]:
        """Close the loop that has just been opened, in every step of which `more()` comes to what there is."""
        return self._fold(first, lambda parts: [self._both(x, y) for x, y in zip(parts, more(), strict=True)])

    def _fold(self, first: list[_Chunks], step: Callable[[list[_Chunks]], list[_Chunks]]) -> list[_Chunks]:
        size = len(self._operands)

        def grouped(flat: Sequence[Any]) -> list[_Chunks]:
            return [list(flat[k : k + size]) for k in range(0, len(flat), size)]

        def flat(parts: list[_Chunks]) -> list[Any]:
            return [value for part in parts for value in part]

        return grouped(self._nest.fold(flat(first), lambda values: flat(step(grouped(values)))))

    def _both(self, x: _Chunks, y: _Chunks) -> _Chunks:
        values: _Chunks = []
        for op, combine in self._together.items():
            own = slice(len(values), len(values) + len(op.operands))
            values += combine(self._nest.b, [*x[own], *y[own]])
        return values

    def _joined(self, parts: list[_Chunks]) -> _Chunks:
        while len(parts) > 1:
            odd = parts[len(parts) & ~1 :]
            parts = [self._both(x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)] + odd
        return parts[0]

    def _across(self, vectors: _Chunks) -> _Chunks:
        """Lanes to scalars, halving the width each time."""
        b = self._nest.b
        width = vectors[0].type.count
        while width > 1:
            width //= 2
            halves = []
            for start in (0, width):
                lanes = ir.Constant(ir.VectorType(I32, width), [ir.Constant(I32, start + k) for k in range(width)])
                halves.append([b.shuffle_vector(v, undefined(v.type), lanes) for v in vectors])
            vectors = self._both(*halves)
        return [b.extract_element(v, ir.Constant(I32, 0)) for v in vectors]
