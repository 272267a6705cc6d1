"""Chunks: what the lowering holds of a tensor at one step of an innermost loop, and how memory is read and written.

A chunk is W neighbouring elements along one axis (the lanes), at fixed positions along every other axis. It is kept in
the cheapest of three forms, so that addresses stay scalar and a contiguous access is seen to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering.elementwise import I1, I8, I32, I64, memory_type, register_type, size_of
from esper_triton.cpu.lowering.vmath import Value, first_lane, splat_constant, splat_of, undefined
from esper_triton.cpu.mlir import Type

POINTER = ir.PointerType()


@dataclass(frozen=True)
class Index:
    """A position along one axis: `value` (i64), or `value + lane` where `lanes`. `level` is the depth of the loop that
    it changes in, 0 for none."""

    value: Value
    lanes: bool = False
    level: int = 0


ZERO = Index(ir.Constant(I64, 0))


@dataclass(frozen=True)
class Uniform:
    """The same element in every lane: an LLVM scalar."""

    value: Value


@dataclass(frozen=True)
class Affine:
    """Lane i holds `base + i * step`: integers of any width, or addresses (then `step` is in bytes).

    `fits`: it is known that no lane wraps around in the type, as in `tl.arange`. `assumed`: it was widened from what
    was not known to fit. That no lane wrapped is taken for granted of addresses, since one that did would lie outside
    of its tensor; where the value itself is used, `Nest.vector` computes it lane by lane. `certain` (i64): lanes for
    which the assumption does hold, none where it is None.
    """

    base: Value
    step: int
    fits: bool = False
    assumed: bool = False
    certain: Value | None = None


@dataclass(frozen=True)
class Run:
    """That lane i holds `base + i * step` (in bytes for addresses), where `holds` (i1) turns out to be true."""

    base: Value
    step: int
    holds: Value


@dataclass(frozen=True)
class Lanes:
    """An LLVM vector, and what else is known of it."""

    value: Value
    run: Run | None = None


@dataclass(frozen=True)
class Prefix:
    """A mask (i1) whose lanes 0 to `count` - 1 are on; `count` is an i64 that may be negative or beyond the lanes.

    Made of a comparison of neighbouring indices with a bound. As with `Affine`, that no index wrapped is taken for
    granted where the mask guards an access, and not where its own value is used. `certain` (i64) counts the lanes
    before the first that may have wrapped, None where none does.
    """

    count: Value
    certain: Value | None = None

    def both(self, b: ir.IRBuilder, other: Prefix) -> Prefix:
        """Where this mask and another are on."""
        known = [certain for certain in (self.certain, other.certain) if certain is not None]
        certain = minimum(b, *known) if len(known) == 2 else known[0] if known else None
        return Prefix(minimum(b, self.count, other.count), certain)


Chunk = Uniform | Affine | Lanes | Prefix


def minimum(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    """The smaller of two signed integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def maximum(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    """The larger of two signed integers."""
    return b.select(b.icmp_signed("<", x, y), y, x)


def as_chunk(value: Value) -> Uniform | Lanes:
    """A computed LLVM value, vector or scalar, as a chunk."""
    return Lanes(value) if isinstance(value.type, ir.VectorType) else Uniform(value)


def as_vector(b: ir.IRBuilder, chunk: Chunk, width: int) -> Value:
    """The chunk as an LLVM vector of `width` lanes."""
    assert not isinstance(chunk, Prefix)  # see Nest.vector
    if isinstance(chunk, Lanes):
        return chunk.value
    scalar = chunk.value if isinstance(chunk, Uniform) else chunk.base
    vector = splat(b, scalar, width)
    if isinstance(chunk, Affine):
        ramp = ir.Constant(vector.type, [ir.Constant(scalar.type, i * chunk.step) for i in range(width)])
        vector = b.add(vector, ramp)
    return vector


def splat(b: ir.IRBuilder, scalar: Value, width: int) -> Value:
    """A vector with `scalar` in every lane."""
    type_ = ir.VectorType(scalar.type, width)
    if isinstance(scalar, ir.Constant):
        return splat_of(scalar, width)
    first = b.insert_element(undefined(type_), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined(type_), first_lane(width))


def to_register(b: ir.IRBuilder, value: Value, element: Type) -> Value:
    """An element, or a vector of them, as it is held in registers, from what it is in memory."""
    if register_type(element) != I1:
        return value
    return b.icmp_unsigned("!=", value, splat_constant(value.type, 0))


def to_memory(b: ir.IRBuilder, value: Value, element: Type) -> Value:
    """An element, or a vector of them, as it is held in memory, from what it is in registers."""
    if register_type(element) != I1:
        return value
    wide = ir.VectorType(I8, value.type.count) if isinstance(value.type, ir.VectorType) else I8
    return b.zext(value, wide)


def load_scalar(b: ir.IRBuilder, pointer: Value, element: Type) -> Value:
    """One element from memory at an LLVM pointer."""
    return to_register(b, b.load(pointer, typ=memory_type(element), align=size_of(element)), element)


def store_scalar(b: ir.IRBuilder, value: Value, pointer: Value, element: Type) -> None:
    """One element to memory at an LLVM pointer."""
    b.store(to_memory(b, value, element), pointer, align=size_of(element))


def load_vector(b: ir.IRBuilder, pointer: Value, element: Type, width: int) -> Value:
    """`width` neighbouring elements."""
    vector = b.load(pointer, typ=ir.VectorType(memory_type(element), width), align=size_of(element))
    return to_register(b, vector, element)


def store_vector(b: ir.IRBuilder, value: Value, pointer: Value, element: Type) -> None:
    """Writes neighbouring elements."""
    b.store(to_memory(b, value, element), pointer, align=size_of(element))


class Cases:
    """A value that depends on which of several conditions holds first; what computes it runs only in that case."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self._b = b
        self._join: Any = None
        self._incoming: list[tuple[Value, Any]] = []

    def when(self, condition: Value, value: Callable[[], Value], likely: bool = False) -> None:
        """`value()` where `condition` (i1) holds and no earlier one does; `likely`: which it nearly always does."""
        b = self._b
        here, after = b.append_basic_block("case"), b.append_basic_block("else")
        self._join = self._join or b.append_basic_block("chosen")
        branch = b.cbranch(condition, here, after)
        if likely:
            branch.set_weights((99, 1))
        b.position_at_end(here)
        self._incoming.append((value(), b.block))
        b.branch(self._join)
        b.position_at_end(after)

    def otherwise(self, value: Value) -> Value:
        """The chosen value, `value` (already computed at the present position) where no condition holds."""
        b = self._b
        self._incoming.append((value, b.block))
        b.branch(self._join)
        b.position_at_end(self._join)
        result = b.phi(value.type)
        for incoming, block in self._incoming:
            result.add_incoming(incoming, block)
        return result


@contextmanager
def only_if(b: ir.IRBuilder, condition: Value | None) -> Iterator[None]:
    """Emits what is inside under a scalar condition, or always where that is None."""
    if condition is None:
        yield
    else:
        with b.if_then(condition):
            yield


def guarded(b: ir.IRBuilder, condition: Value, then: Callable[[], Value], otherwise: Value) -> Value:
    """`then()` where the scalar condition holds, `otherwise` where not; what it emits runs only in that case."""
    before = b.block
    with b.if_then(condition):
        value = then()
        taken = b.block
    result = b.phi(value.type)
    result.add_incoming(otherwise, before)
    result.add_incoming(value, taken)
    return result


def turned(b: ir.IRBuilder, rows: list[Value]) -> list[Value]:
    """The columns of a square of vectors, whose size is a power of two: ever smaller blocks change places."""
    rows = list(rows)
    size = rows[0].type.count
    step = size // 2
    while step:
        for k in range(size):
            if k & step:
                continue
            upper, lower = rows[k], rows[k + step]
            for row, of_lower in ((k, 0), (k + step, step)):
                # Lane `size + i` is lane i of `lower`.
                order = [size + i - step + of_lower if i & step else i + of_lower for i in range(size)]
                lanes = ir.Constant(ir.VectorType(I32, size), [ir.Constant(I32, i) for i in order])
                rows[row] = b.shuffle_vector(upper, lower, lanes)
        step //= 2
    return rows


@dataclass(frozen=True)
class Buffer:
    """A tensor in scratch memory, dense. `pointer` is an LLVM pointer to its first element.

    Row-major, or where `inner` is given, with neighbours along that axis side by side and the other axes row-major.
    With `panel`, each matrix of the last two axes is cut into panels of that many columns that follow one another, each
    of them row-major: a column of vectors lies in one piece, whatever the width of the matrix. After each panel there
    is room for one more row, since panels a power of two apart would compete for the same few lines of the cache.
    """

    pointer: Value
    shape: tuple[int, ...]
    element: Type
    inner: int | None = None
    panel: int | None = None
    counts: Value | None = None  # i1: whether the elements, integers along one axis, turned out to count up by one

    @property
    def row_major(self) -> bool:
        """Whether the elements lie in the order of their indices."""
        return self.inner is None and self.panel is None

    @property
    def inner_axis(self) -> int:
        """The axis, of those longer than 1 if there is one, along which neighbours lie side by side."""
        long = [axis for axis, extent in enumerate(self.shape) if extent > 1]
        return self.inner if self.inner is not None else long[-1] if long else 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance of neighbours along each axis, in elements; within one panel where there are panels."""
        axes = sorted(range(len(self.shape)), key=lambda axis: axis == self.inner)
        strides, stride = [0] * len(axes), 1
        for axis in reversed(axes):
            strides[axis] = stride
            stride *= self.shape[axis] + (self.panel is not None and axis == len(axes) - 2)
        if self.panel is not None:
            strides[-2] = self.panel
        return tuple(strides)

    def address(self, b: ir.IRBuilder, index: tuple[Index, ...]) -> tuple[Value, int]:
        """Pointer to the (first) element, and the lanes' stride in elements (0 where no axis has lanes)."""
        offset: Any = (nowhere := ir.Constant(I64, 0))
        lane_stride = 0

        def advance(value: Value, stride: int) -> None:
            nonlocal offset
            if not (isinstance(value, ir.Constant) and value.constant == 0):
                term = value if stride == 1 else b.mul(value, ir.Constant(I64, stride))
                offset = term if offset is nowhere else b.add(offset, term)

        for position, stride in zip(index, self.strides, strict=True):
            if position.lanes:
                lane_stride = stride
            advance(position.value, stride)
        if self.panel is not None:
            # Columns of earlier panels count for all of their rows.
            before = b.and_(index[-1].value, ir.Constant(I64, -self.panel))
            advance(before, self.shape[-2])
        return b.gep(self.pointer, [offset], source_etype=memory_type(self.element)), lane_stride

    def read(self, b: ir.IRBuilder, index: tuple[Index, ...], width: int) -> Chunk:
        """The chunk at `index`."""
        pointer, stride = self.address(b, index)
        if stride == 0:
            return Uniform(load_scalar(b, pointer, self.element))
        if stride == 1:
            run = None if self.counts is None else Run(load_scalar(b, pointer, self.element), 1, self.counts)
            return Lanes(load_vector(b, pointer, self.element, width), run)
        vector: Any = undefined(ir.VectorType(register_type(self.element), width))
        for lane in range(width):
            at = b.gep(pointer, [ir.Constant(I64, lane * stride)], source_etype=memory_type(self.element))
            vector = b.insert_element(vector, load_scalar(b, at, self.element), ir.Constant(I32, lane))
        return Lanes(vector)

    def write(self, b: ir.IRBuilder, index: tuple[Index, ...], chunk: Chunk, width: int) -> None:
        """Stores a chunk at `index`."""
        pointer, stride = self.address(b, index)
        if stride == 0:
            assert isinstance(chunk, Uniform)
            store_scalar(b, chunk.value, pointer, self.element)
            return
        vector = as_vector(b, chunk, width)
        if stride == 1:
            store_vector(b, vector, pointer, self.element)
            return
        for lane in range(width):
            at = b.gep(pointer, [ir.Constant(I64, lane * stride)], source_etype=memory_type(self.element))
            store_scalar(b, b.extract_element(vector, ir.Constant(I32, lane)), at, self.element)
