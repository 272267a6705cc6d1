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
_PAGE = 4096  # bytes, or a multiple of it


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
class Lanes:
    """An LLVM vector."""

    value: Value


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


def _to_register(b: ir.IRBuilder, value: Value, element: Type) -> Value:
    if register_type(element) != I1:
        return value
    return b.icmp_unsigned("!=", value, splat_constant(value.type, 0))


def _to_memory(b: ir.IRBuilder, value: Value, element: Type) -> Value:
    if register_type(element) != I1:
        return value
    wide = ir.VectorType(I8, value.type.count) if isinstance(value.type, ir.VectorType) else I8
    return b.zext(value, wide)


def load_scalar(b: ir.IRBuilder, pointer: Value, element: Type) -> Value:
    """One element from memory at an LLVM pointer."""
    return _to_register(b, b.load(pointer, typ=memory_type(element), align=size_of(element)), element)


def store_scalar(b: ir.IRBuilder, value: Value, pointer: Value, element: Type) -> None:
    """One element to memory at an LLVM pointer."""
    b.store(_to_memory(b, value, element), pointer, align=size_of(element))


def load_vector(b: ir.IRBuilder, pointer: Value, element: Type, width: int) -> Value:
    """`width` neighbouring elements."""
    vector = b.load(pointer, typ=ir.VectorType(memory_type(element), width), align=size_of(element))
    return _to_register(b, vector, element)


def store_vector(b: ir.IRBuilder, value: Value, pointer: Value, element: Type) -> None:
    """Writes neighbouring elements."""
    b.store(_to_memory(b, value, element), pointer, align=size_of(element))


# Masked and indirect accesses go lane by lane through a small array in scratch memory. LLVM has intrinsics for them
# (`llvm.masked.load` and so on); LLVM 22 was seen to read past a mask whose upper half is known to be off, and to abort
# while selecting instructions for a gather. Whole chunks never come here: they are ordinary vector accesses.


def masked_load(b: ir.IRBuilder, slot: Value, pointer: Value, mask: Value, other: Value, element: Type) -> Value:
    """Neighbouring elements where `mask`, `other` elsewhere; masked-off addresses are not touched.

    `slot` is scratch memory for one vector of elements, here and below.
    """
    other = _to_memory(b, other, element)
    memory, align = memory_type(element), size_of(element)
    b.store(other, slot, align=align)

    def copy(lane: Value) -> None:
        value = b.load(b.gep(pointer, [lane], source_etype=memory), typ=memory, align=align)
        b.store(value, b.gep(slot, [lane], source_etype=memory), align=align)

    for_each_lane(b, mask, copy)
    return _to_register(b, b.load(slot, typ=other.type, align=align), element)


def masked_store(b: ir.IRBuilder, slot: Value, value: Value, pointer: Value, mask: Value, element: Type) -> None:
    """Writes neighbouring elements where `mask`."""
    memory, align = memory_type(element), size_of(element)
    b.store(_to_memory(b, value, element), slot, align=align)

    def copy(lane: Value) -> None:
        one = b.load(b.gep(slot, [lane], source_etype=memory), typ=memory, align=align)
        b.store(one, b.gep(pointer, [lane], source_etype=memory), align=align)

    for_each_lane(b, mask, copy)


def lies_in_one_page(b: ir.IRBuilder, pointer: Value, element: Type, width: int) -> Value:
    """i1: whether `width` elements from `pointer` on lie in one page of the smallest size there is."""
    offset = b.and_(b.ptrtoint(pointer, I64), ir.Constant(I64, _PAGE - 1))
    return b.icmp_unsigned("<=", offset, ir.Constant(I64, _PAGE - width * size_of(element)))


def first_lanes(b: ir.IRBuilder, count: Value, element: Type, width: int) -> Value:
    """<width x i1>: whether a lane is one of the first `count` (0 to `width`)."""
    integer = ir.IntType(8 * size_of(element))  # as wide as what is selected by it
    ramp = ir.Constant(ir.VectorType(integer, width), [ir.Constant(integer, lane) for lane in range(width)])
    bound = count if integer == I64 else b.trunc(count, integer)
    return b.icmp_unsigned("<", ramp, splat(b, bound, width))


def prefix_load(b: ir.IRBuilder, slot: Value, pointer: Value, count: Value, other: Value, element: Type) -> Value:
    """The first `count` (less than there are lanes) of neighbouring elements, and `other`'s lanes after them."""
    other = _to_memory(b, other, element)
    align = size_of(element)
    b.store(other, slot, align=align)
    _copy_elements(b, slot, pointer, count, align, other.type.count)
    return _to_register(b, b.load(slot, typ=other.type, align=align), element)


def prefix_store(b: ir.IRBuilder, slot: Value, value: Value, pointer: Value, count: Value, element: Type) -> None:
    """Writes the first `count` (less than there are lanes) of neighbouring elements."""
    align = size_of(element)
    b.store(_to_memory(b, value, element), slot, align=align)
    _copy_elements(b, pointer, slot, count, align, value.type.count)


def _copy_elements(b: ir.IRBuilder, target: Value, source: Value, count: Value, size: int, lanes: int) -> None:
    """Copies `count` < `lanes` elements of `size` bytes, none where it is negative, in as few pieces as it has bits."""
    module = b.function.module
    name = f"copy.{lanes}x{size}"
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I64]), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        _emit_copy(function, size, lanes)
    b.call(function, [target, source, count])


def _emit_copy(function: Value, size: int, lanes: int) -> None:
    b = ir.IRBuilder(function.append_basic_block("entry"))
    target, source, count = function.args
    done = function.append_basic_block("done")
    some = function.append_basic_block("some")
    b.cbranch(b.icmp_signed(">", count, ir.Constant(I64, 0)), some, done)
    b.position_at_end(some)
    offset: Value = ir.Constant(I64, 0)
    piece = lanes // 2
    while piece:
        here, copy, after = b.block, function.append_basic_block("copy"), function.append_basic_block("after")
        bit = b.and_(count, ir.Constant(I64, piece))
        b.cbranch(b.icmp_unsigned("!=", bit, ir.Constant(I64, 0)), copy, after)
        b.position_at_end(copy)
        type_ = ir.IntType(8 * size * piece) if size * piece <= 8 else ir.VectorType(I8, size * piece)
        b.store(
            b.load(b.gep(source, [offset], source_etype=I8), typ=type_, align=size),
            b.gep(target, [offset], source_etype=I8),
            align=size,
        )
        further = b.add(offset, ir.Constant(I64, size * piece))
        b.branch(after)
        b.position_at_end(after)
        merged = b.phi(I64)
        merged.add_incoming(offset, here)
        merged.add_incoming(further, copy)
        offset = merged
        piece //= 2
    b.branch(done)
    b.position_at_end(done)
    b.ret_void()


def gather(
    b: ir.IRBuilder, slots: tuple[Value, Value], addresses: Value, mask: Value, other: Value, element: Type
) -> Value:
    """Elements at a vector of addresses (i64) where `mask`, `other` elsewhere. `slots`: for elements, for addresses."""
    slot, address_slot = slots
    other = _to_memory(b, other, element)
    memory, align = memory_type(element), size_of(element)
    b.store(other, slot, align=align)
    b.store(addresses, address_slot, align=8)

    def copy(lane: Value) -> None:
        address = b.load(b.gep(address_slot, [lane], source_etype=I64), typ=I64, align=8)
        value = b.load(b.inttoptr(address, POINTER), typ=memory, align=align)
        b.store(value, b.gep(slot, [lane], source_etype=memory), align=align)

    for_each_lane(b, mask, copy)
    return _to_register(b, b.load(slot, typ=other.type, align=align), element)


def scatter(
    b: ir.IRBuilder, slots: tuple[Value, Value], value: Value, addresses: Value, mask: Value, element: Type
) -> None:
    """Writes elements at a vector of addresses (i64) where `mask`, lower lanes first."""
    slot, address_slot = slots
    memory, align = memory_type(element), size_of(element)
    b.store(_to_memory(b, value, element), slot, align=align)
    b.store(addresses, address_slot, align=8)

    def copy(lane: Value) -> None:
        address = b.load(b.gep(address_slot, [lane], source_etype=I64), typ=I64, align=8)
        one = b.load(b.gep(slot, [lane], source_etype=memory), typ=memory, align=align)
        b.store(one, b.inttoptr(address, POINTER), align=align)

    for_each_lane(b, mask, copy)


def for_each_lane(b: ir.IRBuilder, mask: Value, body: Callable[[Value], None]) -> None:
    """A loop over the set lanes of a vector of i1, in ascending order; `body` gets the lane as an i64."""
    bits = b.zext(b.bitcast(mask, ir.IntType(mask.type.count)), I64)
    before = b.block
    test, inside, after = (b.append_basic_block(name) for name in ("lanes", "lane", "lanes.done"))
    b.branch(test)
    b.position_at_end(test)
    left = b.phi(I64)
    left.add_incoming(bits, before)
    b.cbranch(b.icmp_unsigned("!=", left, ir.Constant(I64, 0)), inside, after)
    b.position_at_end(inside)
    body(b.cttz(left, ir.Constant(I1, 1)))
    left.add_incoming(b.and_(left, b.sub(left, ir.Constant(I64, 1))), b.block)
    b.branch(test)
    b.position_at_end(after)


class Cases:
    """A value that depends on which of several conditions holds first; what computes it runs only in that case."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self._b = b
        self._join: Any = None
        self._incoming: list[tuple[Value, Any]] = []

    def when(self, condition: Value, value: Callable[[], Value]) -> None:
        """`value()` where `condition` (i1) holds and no earlier one does."""
        b = self._b
        here, after = b.append_basic_block("case"), b.append_basic_block("else")
        self._join = self._join or b.append_basic_block("chosen")
        b.cbranch(condition, here, after)
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


def all_true(b: ir.IRBuilder, mask: Value) -> Value:
    """Whether every lane of a vector of i1 is set, as an i1."""
    width = mask.type.count
    return b.icmp_unsigned("==", b.bitcast(mask, ir.IntType(width)), ir.Constant(ir.IntType(width), (1 << width) - 1))


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
    """

    pointer: Value
    shape: tuple[int, ...]
    element: Type
    inner: int | None = None

    @property
    def inner_axis(self) -> int:
        """The axis, of those longer than 1 if there is one, along which neighbours lie side by side."""
        long = [axis for axis, extent in enumerate(self.shape) if extent > 1]
        return self.inner if self.inner is not None else long[-1] if long else 0

    def _address(self, b: ir.IRBuilder, index: tuple[Index, ...]) -> tuple[Value, int]:
        """Pointer to the (first) element, and the lanes' stride in elements (0 where no axis has lanes)."""
        offset: Any = ir.Constant(I64, 0)
        lane_stride, stride = 0, 1
        axes = [axis for axis in range(len(self.shape)) if axis != self.inner]
        if self.inner is not None:
            axes.append(self.inner)
        for axis in reversed(axes):
            position = index[axis]
            if position.lanes:
                lane_stride = stride
            if not (isinstance(position.value, ir.Constant) and position.value.constant == 0):
                term = position.value if stride == 1 else b.mul(position.value, ir.Constant(I64, stride))
                offset = b.add(offset, term)
            stride *= self.shape[axis]
        return b.gep(self.pointer, [offset], source_etype=memory_type(self.element)), lane_stride

    def read(self, b: ir.IRBuilder, index: tuple[Index, ...], width: int) -> Chunk:
        """The chunk at `index`."""
        pointer, stride = self._address(b, index)
        if stride == 0:
            return Uniform(load_scalar(b, pointer, self.element))
        if stride == 1:
            return Lanes(load_vector(b, pointer, self.element, width))
        vector: Any = undefined(ir.VectorType(register_type(self.element), width))
        for lane in range(width):
            at = b.gep(pointer, [ir.Constant(I64, lane * stride)], source_etype=memory_type(self.element))
            vector = b.insert_element(vector, load_scalar(b, at, self.element), ir.Constant(I32, lane))
        return Lanes(vector)

    def write(self, b: ir.IRBuilder, index: tuple[Index, ...], chunk: Chunk, width: int) -> None:
        """Stores a chunk at `index`."""
        pointer, stride = self._address(b, index)
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
