"""`tt.reduce`: any combine function, any axis, any number of operands.

The combine function is taken to be associative and commutative, as Triton takes it: lanes are reduced side by side, in
several accumulators where one would wait for itself, and joined at the end. The order depends on the shape, the masks'
bounds and the vector width only, so a result is the same on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Index
from esper_triton.cpu.lowering.elements import ElementFunction
from esper_triton.cpu.lowering.elementwise import I32, I64, size_of
from esper_triton.cpu.lowering.nest import lane_axis
from esper_triton.cpu.lowering.vmath import undefined
from esper_triton.cpu.mlir import Operation, TensorType

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_Chunks = list[Any]  # LLVM values of one chunk of every operand

_REGISTERS = 8  # of vectors, for accumulators: half of what AVX2 has
_LIGHT = 6  # instructions per chunk up to which the loop would wait for a single accumulator


def lower_reduce(program: Program, op: Operation) -> None:
    """Reduce along `axis`; a result of rank 0 is a scalar."""
    reduction = _Reduction(program, op)
    reduction.lower()
    reduction.combine.finish()


class _Reduction:
    def __init__(self, program: Program, op: Operation) -> None:
        self._program, self._op = program, op
        self.combine = ElementFunction(program, op)
        self._axis: int = op.attributes["axis"]
        source = op.operands[0].type
        assert isinstance(source, TensorType)
        self._shape = source.shape
        light = self.combine.in_lanes and program.weight(op.operands) <= _LIGHT
        self._nest = program.nest(op.operands, self._shape, op)
        self._outputs = [program.new_buffer(r) if isinstance(r.type, TensorType) else None for r in op.results]
        self._lanes = lane_axis(self._shape)
        self._index: list[Index] = [ZERO] * len(self._shape)
        width = self._nest.width
        sizes = [size_of(value.type) * width for value in op.operands]
        registers = sum(-(-size // (2 * program.lanes)) for size in sizes)
        chunks = 1 if self._lanes is None else self._shape[self._lanes] // width
        self._most = min(chunks, max(1, _REGISTERS // registers)) if light else 1
        identity = self.combine.identity()
        self._identity = None if identity is None else [c.splat(program.b, v, width) for v in identity]

    def lower(self) -> None:
        nest, axis, lanes = self._nest, self._axis, self._lanes
        # Neighbouring chunks of a row are reduced side by side; each has masks of its own, and those cost code.
        group = 1 if axis == lanes else min(self._most, 2) if nest.is_masked else self._most
        others = [k for k, extent in enumerate(self._shape) if extent > 1 and k != axis]
        for k in others:
            self._index[k] = nest.open(self._shape[k], nest.width * group if k == lanes else 1, lanes=k == lanes)
        if axis == lanes:
            self._write(self._index, self._across(self._along_lanes()))
        else:
            beside = [list(self._index) for _ in range(group)]
            for k in range(group if lanes is not None else 0):
                assert lanes is not None
                beside[k][lanes] = nest.further(self._index[lanes], k * nest.width)
            for index, values in zip(beside, self._along_rows(beside), strict=True):
                self._write(index, values)
        for _ in others:
            nest.close()

    def _at(self, position: Index, beside: Sequence[Index]) -> _Chunks:
        here = (*beside[: self._axis], position, *beside[self._axis + 1 :])
        self._nest.visit(here)
        return [self._nest.vector(operand, here) for operand in self._op.operands]

    def _write(self, index: Sequence[Index], values: _Chunks) -> None:
        nest = self._nest
        target = tuple(at for k, at in enumerate(index) if k != self._axis)
        for output, result, value in zip(self._outputs, self._op.results, values, strict=True):
            if output is None:
                self._program.scalars[result] = value
            else:
                output.write(nest.b, target, c.as_chunk(value), nest.width)

    def _along_rows(self, beside: Sequence[Sequence[Index]]) -> list[_Chunks]:
        """Elements at the same place in every slice, for several places."""
        nest, extent = self._nest, self._shape[self._axis]

        def rows(position: Index) -> list[_Chunks]:
            return [self._at(position, index) for index in beside]

        if extent == 1:
            return rows(ZERO)
        if self._identity is None:
            first, start = rows(ZERO), 1
        else:
            first, start = [self._identity] * len(beside), 0
        position = nest.open(extent, 1, start=start)
        return self._accumulate(first, lambda: rows(position))

    def _along_lanes(self) -> _Chunks:
        """The chunks of a row, to one chunk."""
        nest, width, extent = self._nest, self._nest.width, self._shape[self._axis]
        split = None
        if self._most > 1 and nest.is_masked and self._identity is not None:
            split = nest.split(tuple(self._index), self._axis)
        count = 1 if nest.is_masked and split is None else self._most
        step = count * width

        def abreast(position: Index) -> list[_Chunks]:
            places = [nest.further(position, k * width) for k in range(count)]
            if split is not None:
                for place in places:
                    nest.leave_on(split[2], (*self._index[: self._axis], place, *self._index[self._axis + 1 :]))
            return [self._at(place, self._index) for place in places]

        if split is None:
            if self._identity is None:
                first = abreast(Index(ZERO.value, lanes=True, level=len(nest.builders) - 1))
                if extent == step:
                    return self._joined(first)
                position = nest.open(extent, step, start=step, lanes=True)
            else:
                first = [self._identity] * count
                position = nest.open(extent, step, lanes=True)
            return self._joined(self._accumulate(first, lambda: abreast(position)))
        assert self._identity is not None
        whole = nest.b.and_(split[0], ir.Constant(I64, -step))
        position = nest.open_between(ZERO.value, whole, step, lanes=True)
        total = self._joined(self._accumulate([self._identity] * count, lambda: abreast(position)))
        # What is left is less than a step, or has masks.
        rest = nest.open_between(whole, ir.Constant(I64, extent), width, lanes=True)
        return self._accumulate([total], lambda: [self._at(rest, self._index)])[0]

    def _accumulate(self, first: Sequence[_Chunks], more: Callable[[], Sequence[_Chunks]]) -> list[_Chunks]:
        """Close the loop that has just been opened, in every step of which `more()` comes to what there is."""
        operands = len(self._op.operands)

        def step(flat: list[Any]) -> list[Any]:
            return [v for x, y in zip(_grouped(flat, operands), more(), strict=True) for v in self._both(x, y)]

        return _grouped(self._nest.fold([value for values in first for value in values], step), operands)

    def _both(self, x: _Chunks, y: _Chunks) -> _Chunks:
        return self.combine(self._nest.b, [*x, *y])

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


def _grouped(flat: Sequence[Any], size: int) -> list[_Chunks]:
    return [list(flat[k : k + size]) for k in range(0, len(flat), size)]
