"""Loads and stores of one chunk: the only places where a kernel's own memory is accessed by tiles.

An access goes one of these ways, by what is known of its addresses and its mask when it is emitted:

- neighbouring addresses, all lanes on: one vector access;
- neighbouring addresses, the first lanes on (`Prefix`): a vector access where all of them turn out to be on; else a
  load reads the whole vector if it lies in one page, which exists as one lane of it does, and a store, like a load
  that crosses pages, goes by the pieces that make up the number of lanes;
- neighbouring addresses, any other mask: a vector access where all lanes are on; else a load as before, and a store
  lane by lane;
- addresses a constant step apart: element by element without further ado where all lanes are on, else lane by lane;
- any other addresses: the same, but a load sees first whether they happen to be neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.chunks import Affine, Chunk, Index, Lanes, Prefix, Uniform
from esper_triton.cpu.lowering.elementwise import I32, I64, constant, element_type, size_of
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.mlir import Operation, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.nest import Nest


def load_operands(op: Operation) -> tuple[Value, Value | None, Value | None]:
    """Pointers, mask and other of a `tt.load`."""
    segments = op.attributes.get("operandSegmentSizes", (1, int(len(op.operands) > 1), int(len(op.operands) > 2)))
    operands = iter(op.operands)
    pointers, mask, other = (next(operands) if present else None for present in segments)
    assert pointers is not None
    return pointers, mask, other


def mask_of(op: Operation) -> Value | None:
    """The mask of a `tt.load` or `tt.store`."""
    if op.name == "tt.load":
        return load_operands(op)[1]
    return op.operands[2] if len(op.operands) > 2 else None


def is_volatile(op: Operation) -> bool:
    """Whether an operation is a load that stays where it is, since what it reads may change at any time."""
    return op.name == "tt.load" and bool(op.attributes.get("isVolatile"))


def load(nest: Nest, op: Operation, index: tuple[Index, ...]) -> Chunk:
    """The chunk of a `tt.load`. A masked-off element is `other`, zero where none is given; its address is not used."""
    pointers, mask, other = load_operands(op)
    element = element_type(op.result.type)
    address = nest.chunk(pointers, index)
    condition = None if mask is None else _unless_on(nest.chunk(mask, index))
    fallback = nest.exact(other, index) if other is not None else Uniform(constant(op.result.type, 0))
    b = nest.builder(index)  # a nested load may have moved on to another block
    width = nest.width
    if isinstance(address, Uniform):
        pointer = b.inttoptr(address.value, c.POINTER)
        if condition is None:
            nest.note(op, "scalar", None)
            return Uniform(c.load_scalar(b, pointer, element))
        if isinstance(condition, Uniform) and isinstance(fallback, Uniform):
            nest.note(op, "scalar", condition)
            return Uniform(c.guarded(b, condition.value, lambda: c.load_scalar(b, pointer, element), fallback.value))
    otherwise = c.as_vector(b, fallback, width)
    slots = _slots(nest)
    if not (isinstance(address, Affine) and address.step == size_of(element)):
        return Lanes(_load_apart(nest, op, index, condition, otherwise))
    pointer = b.inttoptr(address.base, c.POINTER)

    def whole() -> LLVMValue:
        return c.load_vector(b, pointer, element, width)

    if condition is None or isinstance(condition, Uniform):
        nest.note(op, "contiguous", condition)
        return Lanes(whole() if condition is None else c.guarded(b, condition.value, whole, otherwise))
    if not (nest.is_split and isinstance(condition, Prefix)):
        nest.note(op, "contiguous", None)
    nest.note(op, "contiguous", condition)
    if isinstance(condition, Prefix):
        if nest.is_split:  # and whole chunks have been dealt with
            return Lanes(lanewise.load_first(b, slots[0], pointer, condition.count, otherwise, element))
        cases = c.Cases(b)
        cases.when(b.icmp_signed(">=", condition.count, ir.Constant(I64, width)), whole, likely=not nest.is_narrow)
        few = lanewise.load_few if nest.is_narrow else lanewise.load_first
        return Lanes(cases.otherwise(few(b, slots[0], pointer, condition.count, otherwise, element)))
    cases = c.Cases(b)
    bits = c.as_vector(b, condition, width)
    cases.when(lanewise.all_true(b, bits), whole)
    one_page = b.and_(lanewise.any_true(b, bits), lanewise.lies_in_one_page(b, pointer, element, width))
    cases.when(one_page, lambda: b.select(bits, whole(), otherwise))
    return Lanes(cases.otherwise(lanewise.masked_load(b, slots[0], pointer, bits, otherwise, element)))


def _load_apart(
    nest: Nest, op: Operation, index: tuple[Index, ...], condition: Chunk | None, otherwise: LLVMValue
) -> LLVMValue:
    """The chunk of a load whose addresses are not known to be neighbours."""
    pointers, mask, _ = load_operands(op)
    element = element_type(op.result.type)
    address = nest.chunk(pointers, index)
    addresses = nest.vector(pointers, index)
    on = nest.vector(mask, index) if mask is not None else None
    uniform = condition if isinstance(condition, Uniform) else None
    b, width = nest.builder(index), nest.width

    def lane_by_lane() -> LLVMValue:
        assert on is not None
        nest.note_apart(op, address, condition)
        return lanewise.gather(b, _slots(nest), addresses, on, otherwise, element)

    def everywhere() -> LLVMValue:
        nest.note_apart(op, address, uniform)
        if isinstance(address, Affine):
            return lanewise.strided_load(b, address.base, address.step, element, width)
        nest.note(op, "adjacent", uniform)
        cases = c.Cases(b)
        if isinstance(address, Lanes) and address.run is not None and address.run.step == size_of(element):
            first, neighbours = address.run.base, address.run.holds
        else:
            first = b.extract_element(addresses, ir.Constant(I32, 0))
            neighbours = lanewise.are_neighbours(b, addresses, element)
        first = b.inttoptr(first, c.POINTER)
        cases.when(neighbours, lambda: c.load_vector(b, first, element, width))
        return cases.otherwise(lanewise.gather_all(b, addresses, element))

    if condition is None:
        return everywhere()
    if isinstance(condition, Uniform):
        return c.guarded(b, condition.value, everywhere, otherwise)
    if nest.is_split:  # and what is on everywhere has been dealt with
        return lane_by_lane()
    assert on is not None
    cases = c.Cases(b)
    cases.when(lanewise.all_true(b, on), everywhere)
    return cases.otherwise(lane_by_lane())


def store(nest: Nest, op: Operation, index: tuple[Index, ...]) -> None:
    """The chunk of a `tt.store`."""
    pointers, value = op.operands[:2]
    mask = mask_of(op)
    element = element_type(value.type)
    address, stored = nest.chunk(pointers, index), nest.exact(value, index)
    condition = None if mask is None else _unless_on(nest.chunk(mask, index))
    b, width = nest.b, nest.width
    if not any(at.lanes for at in index):
        assert isinstance(address, Uniform)
        assert isinstance(stored, Uniform)
        assert condition is None or isinstance(condition, Uniform)
        pointer = b.inttoptr(address.value, c.POINTER)
        nest.note(op, "scalar", condition)
        with c.only_if(b, condition and condition.value):
            c.store_scalar(b, stored.value, pointer, element)
        return
    vector = c.as_vector(b, stored, width)
    if not (isinstance(address, Affine) and address.step == size_of(element)):
        _store_apart(nest, op, index, condition, vector)
        return
    pointer = b.inttoptr(address.base, c.POINTER)
    if condition is None or isinstance(condition, Uniform):
        nest.note(op, "contiguous", condition)
        with c.only_if(b, condition and condition.value):
            streamed = nest.program.streams.store(b, nest.builders[0], op, vector, address.base)
        if streamed:
            nest.note(op, "contiguous", condition, streamed=True)
        return
    if not (nest.is_split and isinstance(condition, Prefix)):
        nest.note(op, "contiguous", None)
    nest.note(op, "contiguous", condition)
    if isinstance(condition, Prefix):
        if nest.is_split:  # and whole chunks have been dealt with
            lanewise.store_first(b, _slots(nest)[0], vector, pointer, condition.count, element)
            return
        few = lanewise.store_few if nest.is_narrow else lanewise.store_first
        whole = b.icmp_signed(">=", condition.count, ir.Constant(I64, width))
        with b.if_else(whole, likely=None if nest.is_narrow else True) as (full, partial):
            with full:
                c.store_vector(b, vector, pointer, element)
            with partial:
                few(b, _slots(nest)[0], vector, pointer, condition.count, element)
        return
    bits = c.as_vector(b, condition, width)
    with b.if_else(lanewise.all_true(b, bits)) as (full, partial):
        with full:
            c.store_vector(b, vector, pointer, element)
        with partial:
            lanewise.masked_store(b, _slots(nest)[0], vector, pointer, bits, element)


def _store_apart(
    nest: Nest, op: Operation, index: tuple[Index, ...], condition: Chunk | None, vector: LLVMValue
) -> None:
    """The chunk of a store whose addresses are not known to be neighbours."""
    pointers, mask = op.operands[0], mask_of(op)
    element = element_type(op.operands[1].type)
    address = nest.chunk(pointers, index)
    addresses = nest.vector(pointers, index)
    on = nest.vector(mask, index) if mask is not None else None
    uniform = condition if isinstance(condition, Uniform) else None
    b = nest.b

    def everywhere() -> None:
        nest.note_apart(op, address, uniform)
        if isinstance(address, Affine):
            lanewise.strided_store(b, vector, address.base, address.step, element)
        else:
            lanewise.scatter_all(b, vector, addresses, element)

    if condition is None or isinstance(condition, Uniform):
        with c.only_if(b, condition and condition.value):
            everywhere()
        return
    assert on is not None
    nest.note_apart(op, address, condition)
    if nest.is_split:  # and what is on everywhere has been dealt with
        lanewise.scatter(b, _slots(nest), vector, addresses, on, element)
        return
    with b.if_else(lanewise.all_true(b, on)) as (full, partial):
        with full:
            everywhere()
        with partial:
            lanewise.scatter(b, _slots(nest), vector, addresses, on, element)


def _unless_on(condition: Chunk) -> Chunk | None:
    """The mask's chunk, None where it is known to be on in every lane."""
    on = isinstance(condition, Uniform) and isinstance(condition.value, ir.Constant) and condition.value.constant
    return None if on else condition


def _slots(nest: Nest) -> tuple[LLVMValue, LLVMValue]:
    return nest.program.lane_slot(0), nest.program.lane_slot(1)
