"""Loads and stores of one chunk: the only places where a kernel's own memory is accessed by tiles.

An access goes one of these ways, by what is known of its addresses and its mask when it is emitted:

- neighbouring addresses, all lanes on: one vector access;
- neighbouring addresses, the first lanes on (`Prefix`): a vector access where all of them turn out to be on; else a
  load reads the whole vector if it lies in one page, which exists as one lane of it does, and a store, like a load
  that crosses pages, goes by the pieces that make up the number of lanes;
- neighbouring addresses, any other mask: a vector access where all lanes are on, else lane by lane;
- any other addresses: lane by lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import Affine, Chunk, Index, Lanes, Prefix, Uniform
from esper_triton.cpu.lowering.elementwise import I1, I64, constant, element_type, size_of
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
            return Uniform(c.load_scalar(b, pointer, element))
        if isinstance(condition, Uniform) and isinstance(fallback, Uniform):
            return Uniform(c.guarded(b, condition.value, lambda: c.load_scalar(b, pointer, element), fallback.value))
    if not (isinstance(address, Affine) and address.step == size_of(element)):
        addresses = nest.vector(pointers, index)
        bits = c.splat(b, ir.Constant(I1, 1), width) if mask is None else nest.vector(mask, index)
        return Lanes(c.gather(b, _slots(nest), addresses, bits, c.as_vector(b, fallback, width), element))
    pointer = b.inttoptr(address.base, c.POINTER)
    if condition is None:
        return Lanes(c.load_vector(b, pointer, element, width))
    otherwise = c.as_vector(b, fallback, width)
    if isinstance(condition, Uniform):
        return Lanes(c.guarded(b, condition.value, lambda: c.load_vector(b, pointer, element, width), otherwise))
    cases = c.Cases(b)
    if isinstance(condition, Prefix):
        count = condition.count
        cases.when(
            b.icmp_signed(">=", count, ir.Constant(I64, width)), lambda: c.load_vector(b, pointer, element, width)
        )
        cases.when(b.icmp_signed("<=", count, ir.Constant(I64, 0)), lambda: otherwise)
        cases.when(
            c.lies_in_one_page(b, pointer, element, width),
            lambda: b.select(
                c.first_lanes(b, count, element, width), c.load_vector(b, pointer, element, width), otherwise
            ),
        )
        return Lanes(cases.otherwise(c.prefix_load(b, _slots(nest)[0], pointer, count, otherwise, element)))
    bits = c.as_vector(b, condition, width)
    cases.when(c.all_true(b, bits), lambda: c.load_vector(b, pointer, element, width))
    return Lanes(cases.otherwise(c.masked_load(b, _slots(nest)[0], pointer, bits, otherwise, element)))


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
        with c.only_if(b, condition and condition.value):
            c.store_scalar(b, stored.value, pointer, element)
        return
    vector = c.as_vector(b, stored, width)
    if not (isinstance(address, Affine) and address.step == size_of(element)):
        addresses = nest.vector(pointers, index)
        bits = c.splat(b, ir.Constant(I1, 1), width) if mask is None else nest.vector(mask, index)
        c.scatter(b, _slots(nest), vector, addresses, bits, element)
        return
    pointer = b.inttoptr(address.base, c.POINTER)
    if condition is None or isinstance(condition, Uniform):
        with c.only_if(b, condition and condition.value):
            c.store_vector(b, vector, pointer, element)
        return
    if isinstance(condition, Prefix):
        with b.if_else(b.icmp_signed(">=", condition.count, ir.Constant(I64, width))) as (full, partial):
            with full:
                c.store_vector(b, vector, pointer, element)
            with partial:
                c.prefix_store(b, _slots(nest)[0], vector, pointer, condition.count, element)
        return
    bits = c.as_vector(b, condition, width)
    with b.if_else(c.all_true(b, bits)) as (full, partial):
        with full:
            c.store_vector(b, vector, pointer, element)
        with partial:
            c.masked_store(b, _slots(nest)[0], vector, pointer, bits, element)


def _unless_on(condition: Chunk) -> Chunk | None:
    """The mask's chunk, None where it is known to be on in every lane."""
    on = isinstance(condition, Uniform) and isinstance(condition.value, ir.Constant) and condition.value.constant
    return None if on else condition


def _slots(nest: Nest) -> tuple[LLVMValue, LLVMValue]:
    return nest.program.lane_slot(0), nest.program.lane_slot(1)
