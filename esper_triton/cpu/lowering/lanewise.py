"""Accesses of a chunk that are more than one vector access: masked, strided and indirect ones.

LLVM has intrinsics for them (`llvm.masked.load` and so on); LLVM 22 was seen to read past a mask whose upper half is
known to be off, and to abort while selecting instructions for a gather. So what is masked goes lane by lane through a
small array in scratch memory (`slot`), or reads a whole vector and forgets some of it. Whole chunks of neighbours never
come here: they are ordinary vector accesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from esper_triton.cpu.lowering.chunks import (
    POINTER,
    Cases,
    load_scalar,
    load_vector,
    minimum,
    splat,
    store_scalar,
    store_vector,
    to_memory,
    to_register,
)
from esper_triton.cpu.lowering.elementwise import I1, I8, I32, I64, memory_type, register_type, size_of
from esper_triton.cpu.lowering.vmath import Value, call_out_of_line, undefined
from esper_triton.cpu.mlir import Type

_PAGE = 4096  # bytes: the smallest there is


def masked_load(b: ir.IRBuilder, slot: Value, pointer: Value, mask: Value, other: Value, element: Type) -> Value:
    """Neighbouring elements where `mask`, `other` elsewhere; masked-off addresses are not touched.

    `slot` is scratch memory for one vector of elements, here and below.
    """
    other = to_memory(b, other, element)
    memory, align = memory_type(element), size_of(element)
    b.store(other, slot, align=align)

    def copy(lane: Value) -> None:
        value = b.load(b.gep(pointer, [lane], source_etype=memory), typ=memory, align=align)
        b.store(value, b.gep(slot, [lane], source_etype=memory), align=align)

    for_each_lane(b, mask, copy)
    return to_register(b, b.load(slot, typ=other.type, align=align), element)


def masked_store(b: ir.IRBuilder, slot: Value, value: Value, pointer: Value, mask: Value, element: Type) -> None:
    """Writes neighbouring elements where `mask`."""
    memory, align = memory_type(element), size_of(element)
    b.store(to_memory(b, value, element), slot, align=align)

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


def load_few(
    b: ir.IRBuilder, slot: Value, pointer: Value, count: Value, other: Value, element: Type, inline: bool = True
) -> Value:
    """The first `count` of neighbouring elements, and `other`'s lanes after them.

    `count` (i64) is at most the number of lanes; where it is not positive no address is touched. Not `inline`: with
    less code for where the vector lies in two pages.
    """
    width, given = other.type.count, to_memory(b, other, element)
    align = size_of(element)
    cases = Cases(b)
    cases.when(b.icmp_signed("<=", count, ir.Constant(I64, 0)), lambda: given)

    def chosen() -> Value:
        vector = b.load(pointer, typ=given.type, align=align)
        return b.select(first_lanes(b, count, element, width), vector, given)

    cases.when(lies_in_one_page(b, pointer, element, width), chosen)
    b.store(given, slot, align=align)
    (_copy_elements if inline else _call_copy)(b, slot, pointer, count, align, width)
    return to_register(b, cases.otherwise(b.load(slot, typ=given.type, align=align)), element)


def load_first(b: ir.IRBuilder, slot: Value, pointer: Value, count: Value, other: Value, element: Type) -> Value:
    """`load_few` in a function of its own, for what is not often executed; `count` may be any number."""

    def body(inner: ir.IRBuilder, slot: Value, pointer: Value, count: Value, other: Value) -> Value:
        few = minimum(inner, count, ir.Constant(I64, other.type.count))
        return load_few(inner, slot, pointer, few, other, element, inline=False)

    name = f"load.{other.type.count}.{element}"
    return call_out_of_line(b, name, other.type, [slot, pointer, count, other], body)


def store_few(b: ir.IRBuilder, slot: Value, value: Value, pointer: Value, count: Value, element: Type) -> None:
    """Writes the first `count` (i64, at most the number of lanes, maybe negative) of neighbouring elements."""
    align = size_of(element)
    b.store(to_memory(b, value, element), slot, align=align)
    _copy_elements(b, pointer, slot, count, align, value.type.count)


def store_first(b: ir.IRBuilder, slot: Value, value: Value, pointer: Value, count: Value, element: Type) -> None:
    """`store_few` for what is not often executed; `count` may be any number."""
    few = minimum(b, count, ir.Constant(I64, value.type.count))
    align, width = size_of(element), value.type.count
    b.store(to_memory(b, value, element), slot, align=align)
    _call_copy(b, pointer, slot, few, align, width)


def _call_copy(b: ir.IRBuilder, target: Value, source: Value, count: Value, size: int, lanes: int) -> None:
    def body(inner: ir.IRBuilder, target: Value, source: Value, count: Value) -> None:
        _copy_elements(inner, target, source, count, size, lanes)

    call_out_of_line(b, f"copy.{lanes}.{size}", ir.VoidType(), [target, source, count], body)


def _copy_elements(b: ir.IRBuilder, target: Value, source: Value, count: Value, size: int, lanes: int) -> None:
    """Copies `count` of `lanes` elements of `size` bytes, none where it is negative: in two pieces, from either end."""
    done = b.append_basic_block("done")
    piece = lanes // 2
    while piece:
        copy, smaller = b.append_basic_block("copy"), b.append_basic_block("smaller")
        b.cbranch(b.icmp_signed(">=", count, ir.Constant(I64, piece)), copy, smaller)
        b.position_at_end(copy)
        type_ = ir.IntType(8 * size * piece) if size * piece <= 8 else ir.VectorType(I8, size * piece)
        last = b.mul(b.sub(count, ir.Constant(I64, piece)), ir.Constant(I64, size))
        offsets = [ir.Constant(I64, 0), last]
        values = [b.load(b.gep(source, [at], source_etype=I8), typ=type_, align=size) for at in offsets]
        for at, value in zip(offsets, values, strict=True):
            b.store(value, b.gep(target, [at], source_etype=I8), align=size)
        b.branch(done)
        b.position_at_end(smaller)
        piece //= 2
    b.branch(done)
    b.position_at_end(done)


def strided_load(b: ir.IRBuilder, base: Value, step: int, element: Type, width: int) -> Value:
    """`width` elements from the address `base` (i64) on, `step` bytes apart."""
    size = size_of(element)

    def at(offset: int) -> Value:
        return b.inttoptr(b.add(base, ir.Constant(I64, offset)), POINTER)

    if step == -size:
        return _picked(b, load_vector(b, at((width - 1) * step), element, width), None, range(width - 1, -1, -1))
    if step == 2 * size:  # what lies between two elements is in a page that one of them is in
        low, high = (load_vector(b, at(offset), element, width) for offset in (0, (width - 1) * size))
        half = width // 2
        return _picked(b, low, high, [2 * i if i < half else width + 2 * i - (width - 1) for i in range(width)])
    vector = undefined(ir.VectorType(register_type(element), width))
    for lane in range(width):
        vector = b.insert_element(vector, load_scalar(b, at(lane * step), element), ir.Constant(I32, lane))
    return vector


def strided_store(b: ir.IRBuilder, vector: Value, base: Value, step: int, element: Type) -> None:
    """Writes elements from the address `base` (i64) on, `step` bytes apart, lower lanes first."""
    width = vector.type.count
    if step == -size_of(element):
        turned = _picked(b, vector, None, range(width - 1, -1, -1))
        lowest = b.add(base, ir.Constant(I64, (width - 1) * step))
        store_vector(b, turned, b.inttoptr(lowest, POINTER), element)
        return
    for lane in range(width):
        pointer = b.inttoptr(b.add(base, ir.Constant(I64, lane * step)), POINTER)
        store_scalar(b, b.extract_element(vector, ir.Constant(I32, lane)), pointer, element)


def _picked(b: ir.IRBuilder, first: Value, second: Value | None, lanes: Sequence[int]) -> Value:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
    return b.shuffle_vector(first, undefined(first.type) if second is None else second, mask)


def are_neighbours(b: ir.IRBuilder, addresses: Value, element: Type) -> Value:
    """i1: whether the addresses (a vector of i64) follow one another in memory."""
    width, size = addresses.type.count, size_of(element)
    ramp = ir.Constant(addresses.type, [ir.Constant(I64, lane * size) for lane in range(width)])
    expected = b.add(splat(b, b.extract_element(addresses, ir.Constant(I32, 0)), width), ramp)
    return all_true(b, b.icmp_unsigned("==", addresses, expected))


def gather_all(b: ir.IRBuilder, addresses: Value, element: Type) -> Value:
    """Elements at a vector of addresses (i64)."""
    width = addresses.type.count
    result = ir.VectorType(memory_type(element), width)

    def body(inner: ir.IRBuilder, at: Value) -> Value:
        vector = undefined(result)
        for lane in range(width):
            pointer = inner.inttoptr(inner.extract_element(at, ir.Constant(I32, lane)), POINTER)
            one = inner.load(pointer, typ=result.element, align=size_of(element))
            vector = inner.insert_element(vector, one, ir.Constant(I32, lane))
        return vector

    name = f"gather.{width}.{result.element}"
    return to_register(b, call_out_of_line(b, name, result, [addresses], body), element)


def scatter_all(b: ir.IRBuilder, vector: Value, addresses: Value, element: Type) -> None:
    """Writes elements at a vector of addresses (i64), lower lanes first."""
    given = to_memory(b, vector, element)

    def body(inner: ir.IRBuilder, values: Value, at: Value) -> None:
        for lane in range(given.type.count):
            pointer = inner.inttoptr(inner.extract_element(at, ir.Constant(I32, lane)), POINTER)
            inner.store(inner.extract_element(values, ir.Constant(I32, lane)), pointer, align=size_of(element))

    name = f"scatter.{given.type.count}.{given.type.element}"
    call_out_of_line(b, name, ir.VoidType(), [given, addresses], body)


def gather(
    b: ir.IRBuilder, slots: tuple[Value, Value], addresses: Value, mask: Value, other: Value, element: Type
) -> Value:
    """Elements at a vector of addresses (i64) where `mask`, `other` elsewhere. `slots`: for elements, for addresses."""
    slot, address_slot = slots
    other = to_memory(b, other, element)
    memory, align = memory_type(element), size_of(element)
    b.store(other, slot, align=align)
    b.store(addresses, address_slot, align=8)

    def copy(lane: Value) -> None:
        address = b.load(b.gep(address_slot, [lane], source_etype=I64), typ=I64, align=8)
        value = b.load(b.inttoptr(address, POINTER), typ=memory, align=align)
        b.store(value, b.gep(slot, [lane], source_etype=memory), align=align)

    for_each_lane(b, mask, copy)
    return to_register(b, b.load(slot, typ=other.type, align=align), element)


def scatter(
    b: ir.IRBuilder, slots: tuple[Value, Value], value: Value, addresses: Value, mask: Value, element: Type
) -> None:
    """Writes elements at a vector of addresses (i64) where `mask`, lower lanes first."""
    slot, address_slot = slots
    memory, align = memory_type(element), size_of(element)
    b.store(to_memory(b, value, element), slot, align=align)
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


def all_true(b: ir.IRBuilder, mask: Value) -> Value:
    """Whether every lane of a vector of i1 is set, as an i1."""
    width = mask.type.count
    return b.icmp_unsigned("==", b.bitcast(mask, ir.IntType(width)), ir.Constant(ir.IntType(width), (1 << width) - 1))


def any_true(b: ir.IRBuilder, mask: Value) -> Value:
    """Whether any lane of a vector of i1 is set, as an i1."""
    integer = ir.IntType(mask.type.count)
    return b.icmp_unsigned("!=", b.bitcast(mask, integer), ir.Constant(integer, 0))
