"""Regions that work on single elements: the combine functions of reductions and scans, and the functions of
`tl.map_elementwise`.

A region of element-wise arithmetic and conditions is applied to whole chunks: both sides of a condition are computed,
and each lane selects its own. Any other region, one with calls, loops or memory accesses, becomes a function of scalars
that is called lane by lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import POINTER, Buffer, Index, Uniform
from esper_triton.cpu.lowering.control import writes_memory
from esper_triton.cpu.lowering.elementwise import I32, I64, TABLE, Unlowered, constant, register_type
from esper_triton.cpu.lowering.function import GRID, lower_body
from esper_triton.cpu.lowering.nest import Nest, is_tile
from esper_triton.cpu.lowering.program import Program
from esper_triton.cpu.lowering.traps import leave_if_stopped
from esper_triton.cpu.lowering.vmath import undefined
from esper_triton.cpu.mlir import Block, Operation, Region, TensorType, Value

# What leaves the other operand as it is, signs of zero and NaNs included; for some a function of the width in bits.
_IDENTITIES: dict[str, float | Callable[[int], int]] = {
    "arith.addf": -0.0, "arith.mulf": 1.0, "arith.maximumf": -math.inf, "arith.minimumf": math.inf,
    "arith.maxnumf": math.nan, "arith.minnumf": math.nan,
    "arith.addi": 0, "arith.muli": 1, "arith.ori": 0, "arith.xori": 0, "arith.andi": -1,
    "arith.maxsi": lambda bits: -1 << (bits - 1), "arith.minsi": lambda bits: (1 << (bits - 1)) - 1,
    "arith.maxui": 0, "arith.minui": -1,
}  # fmt: skip


class ElementFunction:
    """The region of an operation as a function of LLVM values, all of them scalars or all vectors of one width.

    `in_lanes`: whether lanes are computed side by side, which is cheap, or one by one.
    """

    def __init__(self, program: Program, op: Operation) -> None:
        self._program, self._op = program, op
        (self._region,) = op.regions
        self.in_lanes = len(self._region.blocks) == 1 and all(_is_lanewise(each) for each in _inside(self._region))
        self._outlined: Any = None
        self._hidden: list[Any] = []

    def __call__(self, b: ir.IRBuilder, values: Sequence[Any]) -> list[Any]:
        """The results for `values`, emitted at `b`."""
        vector = values[0].type if isinstance(values[0].type, ir.VectorType) else None
        if self.in_lanes:
            block = self._region.block
            local = dict(zip(block.arguments, values, strict=True))
            return self._run(b, block, local, vector.count if vector else None)
        if self._outlined is None:
            self._outline()
        if vector is None:
            return self._call(b, values)
        results: list[Any] = []
        for k in range(vector.count):
            lane = ir.Constant(I32, k)
            ones = self._call(b, [b.extract_element(value, lane) for value in values])
            results = results or [undefined(ir.VectorType(one.type, vector.count)) for one in ones]
            results = [b.insert_element(all_, one, lane) for all_, one in zip(results, ones, strict=True)]
        return results

    def identity(self) -> list[Any] | None:
        """Constants e for which a combine function of one operand gives f(e, x) = x; None where none is known."""
        if not has_identity(self._op):
            return None
        op = self._region.block.operations[0]
        value = _IDENTITIES[op.name]
        return [constant(op.result.type, value(register_type(op.result.type).width) if callable(value) else value)]

    def finish(self) -> None:
        """To be called where the program goes on after the last call, which may have been stopped."""
        if not self.in_lanes:
            leave_if_stopped(self._program)

    def _run(self, b: ir.IRBuilder, block: Block, local: dict[Value, Any], width: int | None) -> list[Any]:
        """What the block's terminator passes on. `local`: the values of the region so far, those in here are added."""
        program = self._program

        def value_of(value: Value) -> Any:
            found = local[value] if value in local else program.scalars[value]
            return found if width is None or isinstance(found.type, ir.VectorType) else c.splat(b, found, width)

        for op in block.operations[:-1]:
            if op.name == "arith.constant":
                local[op.result] = constant(op.result.type, op.attributes["value"])
            elif op.name == "scf.if":
                then, otherwise = (
                    self._run(b, region.block, local, width) if region.blocks else [] for region in op.regions
                )
                condition = value_of(op.operands[0])
                for result, x, y in zip(op.results, then, otherwise, strict=True):
                    local[result] = b.select(condition, x, y)
            else:
                local[op.result] = program.emit(op, b, [value_of(v) for v in op.operands])
        return [value_of(v) for v in block.terminator.operands]

    def _call(self, b: ir.IRBuilder, values: Sequence[Any]) -> list[Any]:
        returned = b.call(self._outlined, [*values, *self._hidden])
        return [b.extract_value(returned, k) for k in range(len(self._outlined.function_type.return_type.elements))]

    def _outline(self) -> None:
        """Make the region a function of its arguments, the scalars it uses from outside, and what a program knows."""
        program, region = self._program, self._region
        outside = _captured(region, program.scalars)
        returned = next(b.terminator for b in region.blocks if not b.terminator.successors)
        arguments = region.blocks[0].arguments
        types = [register_type(value.type) for value in (*arguments, *outside)]
        result = ir.LiteralStructType([register_type(value.type) for value in returned.operands])
        hidden = [*[I32] * len(GRID), POINTER, POINTER]
        module = program.function.module
        name = module.get_unique_name(f"{program.function.name}.{self._op.name.removeprefix('tt.')}")
        function = ir.Function(module, ir.FunctionType(result, [*types, *hidden]), name)
        function.linkage = "internal"
        *grid, scratch, frame = function.args[len(types) :]
        positions = dict(zip(GRID, grid, strict=True))
        inner = Program(
            program.kernel, function, scratch, frame, positions, program.lanes, program.handlers, program.record
        )
        inner.scalars.update(zip((*arguments, *outside), function.args, strict=False))
        lower_body(inner, region, [], returned.name)
        reserved = program.reserve(name, inner.scratch_bytes)
        self._outlined = function
        self._hidden = [
            *[program.scalars[value] for value in outside],
            *[program.grid[name] for name in GRID],
            reserved,
            program.frame,
        ]


def has_identity(op: Operation) -> bool:
    """Whether the combine function of a reduction or scan is one operation for which an identity is known."""
    blocks = op.regions[0].blocks
    if len(blocks) != 1 or len(blocks[0].operations) != 2 or len(op.operands) != 1:
        return False
    combine, returned = blocks[0].operations
    return (
        combine.name in _IDENTITIES
        and set(combine.operands) == set(blocks[0].arguments)
        and list(returned.operands) == [combine.result]
    )


def _inside(region: Region) -> list[Operation]:
    """Operations of the region, nested ones too."""
    return [nested for block in region.blocks for op in block.operations for nested in op.walk()]


def _is_lanewise(op: Operation) -> bool:
    known = op.name in TABLE or op.name in ("arith.constant", "scf.if", "scf.yield") or op.name.endswith(".return")
    return known and not any(is_tile(value) for value in op.operands)


def _captured(region: Region, scalars: Mapping[Value, Any]) -> list[Value]:
    """Scalars that the region uses and that are known outside of it."""
    return list(dict.fromkeys(value for op in _inside(region) for value in op.operands if value in scalars))


def lower_map_elementwise(program: Program, op: Operation) -> None:
    """`tl.map_elementwise`: a function of `pack` neighbours of every operand, in row-major order."""
    if writes_memory(op):
        program.flush()
    function = ElementFunction(program, op)
    pack = op.attributes["pack"]
    type_ = op.operands[0].type
    assert isinstance(type_, TensorType)
    if pack > 1:
        _map_packs(program, op, function, pack)
    else:
        nest = program.nest(op.operands, type_.shape, op)
        outputs = [program.new_buffer(result) for result in op.results]

        def body(index: tuple[Index, ...]) -> None:
            values = function(nest.b, [nest.vector(operand, index) for operand in op.operands])
            for output, value in zip(outputs, values, strict=True):
                output.write(nest.b, index, c.as_chunk(value), nest.width)

        nest.run(body)
    function.finish()


def _map_packs(program: Program, op: Operation, function: ElementFunction, pack: int) -> None:
    """One call after the other, each for `pack` neighbours; arguments and results are grouped by tile."""
    inputs = [program.materialise(operand) for operand in op.operands]
    outputs = [program.new_buffer(result) for result in op.results]
    size = math.prod(inputs[0].shape)
    if size % pack:
        raise Unlowered(f"{size} elements in packs of {pack}")
    packs = (size // pack, pack)
    nest = Nest(program, ())
    at = nest.open(packs[0])
    places = [(at, Index(ir.Constant(I64, k))) for k in range(pack)]

    def rows(buffers: list[Buffer]) -> list[tuple[Buffer, tuple[Index, ...]]]:
        flat = [Buffer(buffer.pointer, packs, buffer.element) for buffer in buffers]
        return [(buffer, place) for buffer in flat for place in places]

    chunks = [buffer.read(nest.b, place, 1) for buffer, place in rows(inputs)]
    values = function(nest.b, [chunk.value for chunk in chunks if isinstance(chunk, Uniform)])
    for (buffer, place), value in zip(rows(outputs), values, strict=True):
        buffer.write(nest.b, place, Uniform(value), 1)
    nest.close()
