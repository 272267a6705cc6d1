"""Loop nests over a tile, inside which element-wise values are computed chunk by chunk.

A value that no loop nest has stored yet is *lazy*: it exists as its operation only, and `Nest.chunk` computes it
wherever it is needed, for the chunk that is needed. Whether that is right (no store may have come between) and worth it
(not computed twice) is decided by `Program`, which also says what the nest is to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import indices, lanewise, memory
from esper_triton.cpu.lowering.chunks import ZERO, Affine, Buffer, Chunk, Index, Lanes, Prefix, Uniform
from esper_triton.cpu.lowering.elementwise import (
    I1,
    I64,
    TABLE,
    constant,
    element_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.mlir import Dense, Operation, PointerType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.ahead import Upcoming
    from esper_triton.cpu.lowering.program import Program

_BLOCK, _WIDE_BLOCK = 8, 16  # rows and columns that are turned at once; and where a register holds a cache line
# Moves of elements that need no arithmetic on them, besides TABLE.
SHAPE_OPS = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.trans", "tt.make_range", "arith.constant"}


def is_tile(value: Value) -> bool:
    """Whether a value is a tensor of the program."""
    return isinstance(value.type, TensorType)


def definition(value: Value) -> Operation:
    """The operation that a value is a result of."""
    assert value.defining_op is not None
    return value.defining_op


def is_elementwise(op: Operation) -> bool:
    """Whether result element i depends on operand elements i only."""
    return op.name in TABLE or op.name in ("tt.addptr", "tt.load")


def is_lazy_operation(op: Operation) -> bool:
    """Whether the results need no loop nest of their own."""
    return is_elementwise(op) or op.name in SHAPE_OPS


def lane_axis(shape: Sequence[int]) -> int | None:
    """The axis that chunks run along: the last one longer than 1."""
    return max((axis for axis, extent in enumerate(shape) if extent > 1), default=None)


def operand_index(op: Operation, index: tuple[Index, ...]) -> tuple[Index, ...]:
    """Where the operand of a shape operation is read for the result's `index`."""
    shape = op.operands[0].type.shape if isinstance(op.operands[0].type, TensorType) else ()
    if op.name == "tt.expand_dims":
        axis = op.attributes["axis"]
        return index[:axis] + index[axis + 1 :]
    if op.name == "tt.broadcast":
        return tuple(ZERO if extent == 1 else at for extent, at in zip(shape, index, strict=True))
    order = op.attributes["order"]  # trans: result axis i is operand axis order[i]
    source = [ZERO] * len(index)
    for axis, at in zip(order, index, strict=True):
        source[axis] = at
    return tuple(source)


@dataclass(frozen=True)
class _Loop:
    """A loop that has been opened. Its header is entered from wherever the builder outside stands when it is closed."""

    header: Any
    position: LLVMValue
    start: LLVMValue
    stop: LLVMValue
    step: int
    may_be_empty: bool


def operand_axis(op: Operation, axis: int) -> int | None:
    """The axis of a shape operation's operand along which lanes run that run along `axis` of its result."""
    match op.name:
        case "tt.expand_dims":
            new = op.attributes["axis"]
            return None if axis == new else axis - (axis > new)
        case "tt.broadcast":
            source = op.operands[0].type
            return axis if isinstance(source, TensorType) and source.shape[axis] > 1 else None
        case "tt.trans":
            return int(op.attributes["order"][axis])
    return None


class Nest:
    """Loops opened one inside the other from the program's present position.

    Each level has a builder at the place where its body has got to, so that what depends on outer loops only is emitted
    once per step of those, before the inner loop begins.
    """

    def __init__(
        self,
        program: Program,
        shape: Sequence[int],
        keep: Mapping[Value, Buffer] | None = None,
        accesses: Sequence[Operation] = (),
        axis: int | None = None,
    ) -> None:
        """`keep` says where `visit` stores what; `accesses` lists the loads and stores to expect in the body, which
        may be split in two for their masks' sake (see `run`); lanes run along `axis`, the last one where it is None."""
        self.program = program
        self.shape = tuple(shape)
        self.axis = lane_axis(self.shape) if axis is None else axis
        self._kept = dict(keep or {})
        self.accesses = frozenset(accesses)
        self.upcoming: Sequence[Upcoming] = ()  # tiles of what comes next, see `ahead`
        self._accesses = [op for op in accesses if memory.mask_of(op) is not None]
        self.builders: list[ir.IRBuilder] = [program.b]
        self._open: list[_Loop | None] = []
        self._exact: dict[tuple[Any, ...], LLVMValue] = {}
        self._chunks: dict[tuple[Any, ...], tuple[Chunk, tuple[Index, ...]]] = {}
        self.width = 1 if self.axis is None else min(self.shape[self.axis], program.lanes)
        self.is_split = False  # whether chunks that masks leave on altogether have code of their own
        self._is_turning = False  # whether chunks are computed to be transposed in registers
        # A row is one chunk, of which masks may well leave on a part only.
        self.is_narrow = self.axis is not None and self.shape[self.axis] <= self.width
        # Kept with their neighbours along another axis than the lanes: computed and turned in square blocks.
        self._turned = [value for value, buffer in self._kept.items() if self._is_turned(buffer)]
        if self._turned:
            wide = program.lanes == 2 * _WIDE_BLOCK and all(size_of(v.type) <= 4 for v in self._turned)
            extents = [self.shape[self._kept[value].inner_axis] for value in self._turned]
            self.width = min(self.width, _WIDE_BLOCK if wide else _BLOCK, *extents)

    def _is_turned(self, buffer: Buffer) -> bool:
        return self.axis is not None and buffer.inner_axis != self.axis

    @property
    def is_masked(self) -> bool:
        """Whether there are loads or stores with masks in the body."""
        return bool(self._accesses)

    @property
    def is_keeping(self) -> bool:
        """Whether chunks that it visits are stored."""
        return bool(self._kept)

    @property
    def b(self) -> ir.IRBuilder:
        """The builder of the innermost open loop."""
        return self.builders[-1]

    # ------------------------------------------------------------------------------------------------------------ loops

    def open(self, extent: int, step: int = 1, start: int = 0, lanes: bool = False) -> Index:
        """Begin a loop over `range(start, extent, step)`. A single step needs no loop, and none is made."""
        if extent - start <= step:
            self._open.append(None)
            self.builders.append(self.b)
            return Index(ir.Constant(I64, start), lanes, len(self.builders) - 1 if start else 0)
        return self._open_loop(ir.Constant(I64, start), ir.Constant(I64, extent), step, lanes, may_be_empty=False)

    def open_between(
        self, start: LLVMValue, stop: LLVMValue, step: int, lanes: bool = False, may_be_empty: bool = True
    ) -> Index:
        """Begin a loop from `start` to `stop` (i64, known before it), which may have no step at all."""
        return self._open_loop(start, stop, step, lanes, may_be_empty)

    def _open_loop(self, start: LLVMValue, stop: LLVMValue, step: int, lanes: bool, may_be_empty: bool) -> Index:
        header = self.program.new_block("loop")
        inner = ir.IRBuilder(header)
        position = inner.phi(I64)
        self._open.append(_Loop(header, position, start, stop, step, may_be_empty))
        self.builders.append(inner)
        return Index(position, lanes, len(self.builders) - 1)

    def fold(
        self, first: Sequence[LLVMValue], step: Callable[[list[LLVMValue]], Sequence[LLVMValue]]
    ) -> Sequence[LLVMValue]:
        """Close the innermost loop, whose every step makes of the values so far (`first` to begin with) those after it;
        the values after the last one."""
        loop = self._open[-1]
        if loop is None:
            values = step(list(first))
            self.close()
            return values
        partial = [self.b.phi(value.type) for value in first]
        following = step(list(partial))
        self.close(list(zip(partial, first, following, strict=True)))
        if not loop.may_be_empty:
            return following  # of the last step, which dominates the exit
        results = [self.b.phi(value.type) for value in first]
        (_, entry), (_, latch) = loop.position.incomings
        for phi, initial, last in zip(results, first, following, strict=True):
            phi.add_incoming(initial, entry)
            phi.add_incoming(last, latch)
        return results

    def further(self, position: Index, distance: int) -> Index:
        """The index `distance` elements on."""
        if distance == 0:
            return position
        value, step = position.value, ir.Constant(I64, distance)
        if isinstance(value, ir.Constant):
            value = ir.Constant(I64, value.constant + distance)
        else:
            value = self.builders[position.level].add(value, step)
        return Index(value, position.lanes, position.level)

    def close(self, carried: Sequence[tuple[LLVMValue, LLVMValue, LLVMValue]] = ()) -> None:
        """End the innermost loop. `carried` lists (phi, value on entry, value for the next step)."""
        loop = self._open.pop()
        body = self.builders.pop()
        if loop is None:
            return
        outer = self.b
        entry = outer.block
        after = self.program.new_block("done")
        if loop.may_be_empty:
            outer.cbranch(outer.icmp_signed("<", loop.start, loop.stop), loop.header, after)
        else:
            outer.branch(loop.header)
        following = body.add(loop.position, ir.Constant(I64, loop.step))
        body.cbranch(body.icmp_signed("<", following, loop.stop), loop.header, after)
        loop.position.add_incoming(loop.start, entry)
        loop.position.add_incoming(following, body.block)
        for phi, first, following_value in carried:
            phi.add_incoming(first, entry)
            phi.add_incoming(following_value, body.block)
        outer.position_at_end(after)

    def run(self, body: Callable[[tuple[Index, ...]], None] | None = None) -> None:
        """Every chunk of the shape in row-major order; without a body, only what is kept is computed.

        Where the masks of the accesses inside leave a number of lanes on that is known before the loop over chunks, the
        chunks that are on altogether get a loop of their own without masks, and chunks in which nothing is stored are
        left out.
        """
        if self._turned and body is None:
            self._run_blocks()
            return
        axis = self.axis
        index: list[Index] = [ZERO] * len(self.shape)
        opened = 0
        for k, extent in enumerate(self.shape):
            if extent > 1 and k != axis:
                index[k] = self.open(extent)
                opened += 1

        def visit(at: Index | None) -> None:
            here = tuple(index) if at is None or axis is None else _moved(index, axis, at)
            self.visit(here)
            if body is not None:
                body(here)

        split = self.split(tuple(index), axis) if axis is not None else None
        if axis is None:
            visit(None)
        elif split is None:
            visit(self.open(self.shape[axis], self.width, lanes=True))
            self.close()
        else:
            full, end, masks = split
            at = self.open_between(ZERO.value, full, self.width, lanes=True)
            self.leave_on(masks, _moved(index, axis, at))
            visit(at)
            self.close()
            self.is_split = True
            visit(self.open_between(full, end, self.width, lanes=True))
            self.close()
        for _ in range(opened):
            self.close()

    def leave_on(self, masks: Iterable[Value], index: tuple[Index, ...]) -> None:
        """Take it from here that masks are on in every lane at `index`."""
        for mask in masks:
            self._chunks[_key(mask, index)] = (Uniform(ir.Constant(I1, 1)), index)

    def _run_blocks(self) -> None:
        """In square blocks, which are turned in registers before they are stored along the other axis."""
        axis, width = self.axis, self.width
        assert axis is not None
        inner = self._kept[self._turned[0]].inner_axis
        turned = [value for value in self._turned if self._kept[value].inner_axis == inner]
        index: list[Index] = [ZERO] * len(self.shape)
        others = [k for k, extent in enumerate(self.shape) if extent > 1 and k not in (axis, inner)]
        for k in others:
            index[k] = self.open(self.shape[k])
        corner = self.open(self.shape[inner], width)
        places = [
            Index(self.b.add(corner.value, ir.Constant(I64, k)), level=len(self.builders) - 1) for k in range(width)
        ]
        index[axis] = first = self.open(self.shape[axis], width, lanes=True)
        none, whole = ZERO.value, ir.Constant(I64, width)
        # Blocks that masks leave on altogether; the others go line by line, which a loop of no or of all steps decides.
        masks = dict.fromkeys(mask for op in self._accesses if (mask := memory.mask_of(op)) is not None)
        fast = whole
        for mask in masks:
            for place in places:
                fast = self.b.select(self._is_on(mask, _moved(index, inner, place)), fast, none)
        at = self.open_between(none, fast, width)
        # Known inside of this loop only, so that no load is made before it.
        index[axis] = Index(self.b.add(first.value, at.value), True, len(self.builders) - 1)
        lines = [_moved(index, inner, place) for place in places]
        for here in lines:
            self.leave_on(masks, here)
        for value in turned:
            self._is_turning = True
            rows = [self.vector(value, here) for here in lines]
            self._is_turning = False
            for k, column in enumerate(c.turned(self.b, rows)):
                along = Index(self.b.add(index[axis].value, ir.Constant(I64, k)), level=len(self.builders) - 1)
                here = _moved(_moved(index, axis, along), inner, replace(corner, lanes=True))
                self._kept[value].write(self.b, here, Lanes(column), width)
        for here in lines:
            self._visit(here, (value for value in self._kept if value not in turned))
        self.close()
        if masks:
            self.is_split = True
            at = self.open_between(fast, whole, 1)
            place = Index(self.b.add(corner.value, at.value), level=len(self.builders) - 1)
            self.visit(_moved(_moved(index, axis, first), inner, place))
            self.close()
        for _ in range(len(others) + 2):
            self.close()

    def _is_on(self, mask: Value, index: tuple[Index, ...]) -> LLVMValue:
        """i1: whether a mask is on in every lane of a chunk."""
        b = self.builder(index)
        match self.chunk(mask, index):
            case Prefix(count):
                return b.icmp_signed(">=", count, ir.Constant(I64, self.width))
            case Uniform(value):
                return value
        return lanewise.all_true(b, self.vector(mask, index))

    def split(self, index: tuple[Index, ...], axis: int) -> tuple[LLVMValue, LLVMValue, list[Value]] | None:
        """Where chunks that are on altogether end, where the loop ends, and the masks; None where one loop will do."""
        extent = self.shape[axis]
        if extent == self.width or not self._accesses:
            return None
        first = _moved(index, axis, Index(ZERO.value, lanes=True))
        b = self.builder(first)
        nothing, everything = ir.Constant(I64, 0), ir.Constant(I64, extent)
        full = everything
        end = nothing
        counted = False
        reach: dict[Value, LLVMValue] = {}  # of each mask: where it is off for good
        for op in self._accesses:
            mask = memory.mask_of(op)
            assert mask is not None
            if mask not in reach:
                match self.chunk(mask, first) if self.program.is_cheap(mask) else None:
                    case Prefix(count, certain):
                        counted = True
                        reach[mask] = c.minimum(b, count, everything)
                        full = reach[mask] if full is everything else c.minimum(b, full, reach[mask])
                        if certain is not None:
                            full = c.minimum(b, full, certain)
                            wraps = b.icmp_signed("<", certain, everything)
                            reach[mask] = b.select(wraps, everything, reach[mask])
                    case Uniform(value):
                        reach[mask] = b.select(value, everything, nothing)
                        full = b.select(value, full, nothing)
            if op.name == "tt.store":
                here = reach.get(mask, everything)
                end = here if end is nothing else b.select(b.icmp_signed("<", end, here), here, end)
        if not counted:  # all masks are the same along the row, which takes one test as it is
            return None
        if self._kept or end is nothing:
            end = everything
        # Rounded down to whole chunks; what is negative stays so, and its loop has no step.
        full = b.and_(full, ir.Constant(I64, -self.width))
        full = b.select(b.icmp_signed("<", full, nothing), nothing, full)
        return full, end, list(reach)

    def visit(self, index: tuple[Index, ...]) -> None:
        """Store the chunk of every kept value; and ask for a share of the tiles that come next, where it is whole."""
        if not self.is_split:
            for tile in self.upcoming:
                tile.fetch(self, index)
        self._visit(index, self._kept)

    def _visit(self, index: tuple[Index, ...], values: Iterable[Value]) -> None:
        for value in values:
            self._kept[value].write(self.b, index, self.exact(value, index), self.width)

    def note(
        self, op: Operation, layout: str, condition: Chunk | None, step: int | None = None, streamed: bool = False
    ) -> None:
        """Say that a tile's access was emitted under `condition`, None where all lanes are on; `step` is in bytes."""
        if self.program.record is None:
            return
        match condition:
            case None:
                mask = ""
            case Uniform():
                mask = "whole"
            case Prefix() if layout == "contiguous":
                mask = "prefix"
            case _:
                mask = "lanes"
        stride: int | float | None = None
        if step is not None:
            size = size_of(element_type((op.result if op.results else op.operands[1]).type))
            stride = step / size if step % size else step // size
        self.program.note(op, layout, mask, stride=stride, turned=self._is_turning, streamed=streamed)

    def note_apart(self, op: Operation, address: Chunk, condition: Chunk | None) -> None:
        """`note` of an access whose addresses are not known to be neighbours."""
        if isinstance(address, Affine):
            self.note(op, "strided", condition, address.step)
        else:
            self.note(op, "gathered" if op.name == "tt.load" else "scattered", condition)

    # ----------------------------------------------------------------------------------------------------------- values

    def builder(self, index: Sequence[Index]) -> ir.IRBuilder:
        """Where to emit what depends on `index`: as far out as it is known."""
        return self.builders[max((at.level for at in index), default=0)]

    def chunk(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        """The chunk of `value` at `index`."""
        program = self.program
        if value in program.scalars:
            return Uniform(program.scalars[value])
        key = _key(value, index)
        found = self._chunks.get(key)
        if found is None:  # the index is kept with it, so that no other object can come to have its id
            found = self._chunks[key] = (self._compute(value, index), index)
        return found[0]

    def vector(self, value: Value, index: tuple[Index, ...]) -> LLVMValue:
        """The chunk as an LLVM vector with the exact value of every lane, or as a scalar where `index` has no lanes."""
        chunk = self.chunk(value, index)
        if not any(at.lanes for at in index):
            assert isinstance(chunk, Uniform)
            return chunk.value
        if not indices.is_inexact(chunk):
            return c.as_vector(self.builder(index), chunk, self.width)
        key = _key(value, index)
        if key not in self._exact:
            self._exact[key] = self._widened(value, index)
        return self._exact[key]

    def exact(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        """The chunk, in a form that holds the exact value of every lane."""
        chunk = self.chunk(value, index)
        return Lanes(self.vector(value, index)) if indices.is_inexact(chunk) else chunk

    def _widened(self, value: Value, index: tuple[Index, ...]) -> LLVMValue:
        """Lane by lane, from the operands' exact values."""
        if value in self.program.shifted:
            initial, amount = self.program.shifted[value]
            b = self.builder(index)
            return b.add(self.vector(initial, index), c.splat(b, amount, self.width))
        op = value.defining_op
        assert op is not None
        if op.name in ("tt.expand_dims", "tt.broadcast", "tt.trans"):
            return self.vector(op.operands[0], operand_index(op, index))
        vectors = [self.vector(operand, index) for operand in op.operands]
        b = self.builder(index)
        if op.name != "tt.addptr":
            return self.program.emit(op, b, vectors)
        element = element_type(value.type)
        assert isinstance(element, PointerType)
        pointers = indices.add_pointer(b, Lanes(vectors[0]), Lanes(vectors[1]), size_of(element.pointee), self.width)
        return c.as_vector(b, pointers, self.width)

    def _compute(self, value: Value, index: tuple[Index, ...]) -> Chunk:
        program = self.program
        b = self.builder(index)
        buffer = program.buffers.get(value)
        if buffer is not None and value not in self._kept:  # what is kept is computed here, and stored by `visit`
            return buffer.read(b, index, self.width)
        if value in program.shifted:
            initial, amount = program.shifted[value]
            return indices.add(b, self.chunk(initial, index), Uniform(amount), 1, self.width)
        op = value.defining_op
        assert op is not None, f"block argument {value.name} has no buffer"
        match op.name:
            case "arith.constant":
                return self._constant(op, b, index)
            case "tt.splat":
                return Uniform(program.scalars[op.operands[0]])
            case "tt.make_range":
                (at,) = index
                start = ir.Constant(register_type(value.type), op.attributes["start"])
                if isinstance(at.value, ir.Constant):
                    base: LLVMValue = ir.Constant(start.type, at.value.constant + start.constant)
                else:
                    base = b.trunc(at.value, start.type)
                    base = b.add(base, start) if start.constant else base
                return Affine(base, 1, fits=True) if at.lanes else Uniform(base)
            case "tt.expand_dims" | "tt.broadcast" | "tt.trans":
                return self.chunk(op.operands[0], operand_index(op, index))
            case "tt.load":
                return memory.load(self, op, index)
            case "tt.addptr":
                pointer, offset = (self.chunk(operand, index) for operand in op.operands)
                if isinstance(pointer, Lanes) or isinstance(offset, Lanes):
                    pointer, offset = (self.exact(operand, index) for operand in op.operands)
                element = element_type(value.type)
                assert isinstance(element, PointerType)
                return indices.add_pointer(b, pointer, offset, size_of(element.pointee), self.width)
        return self._elementwise(op, index, b)

    def _constant(self, op: Operation, b: ir.IRBuilder, index: tuple[Index, ...]) -> Chunk:
        dense = op.attributes["value"]
        assert isinstance(dense, Dense)
        if dense.splat:
            return Uniform(constant(op.result.type, dense.value))
        return self.program.constant_buffer(op).read(b, index, self.width)

    def _elementwise(self, op: Operation, index: tuple[Index, ...], b: ir.IRBuilder) -> Chunk:
        emit = partial(self.program.emit, op)
        operands = [self.chunk(operand, index) for operand in op.operands]
        if all(isinstance(operand, Uniform) for operand in operands):
            return Uniform(emit(b, [operand.value for operand in operands if isinstance(operand, Uniform)]))
        affine = indices.affine(op, operands, b, self.width)
        if affine is not None:
            return affine
        return Lanes(emit(b, [self.vector(operand, index) for operand in op.operands]))


def _moved(index: Sequence[Index], axis: int, at: Index) -> tuple[Index, ...]:
    """`index` with another position along one axis."""
    return (*index[:axis], at, *index[axis + 1 :])


def _key(value: Value, index: tuple[Index, ...]) -> tuple[Any, ...]:
    return (id(value), *((id(at.value), at.lanes) for at in index))
