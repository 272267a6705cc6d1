"""`tt.atomic_rmw`, `cas`, `load`, `store`, `poll` and volatile `tt.load`: atomic instructions for single elements.

Programs of one launch run on several threads, so these are real atomics, with the ordering that the kernel names. Tiles
are computed and loads that are pending are done before, since another program may wait for what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.elementwise import (
    I1,
    I8,
    I16,
    I32,
    I64,
    Unlowered,
    constant,
    element_type,
    float_to_float,
    memory_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.memory import load_operands
from esper_triton.cpu.lowering.traps import end_of_step
from esper_triton.cpu.lowering.vmath import splat_constant
from esper_triton.cpu.mlir import Operation, TensorType, Type, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Triton's RMWOp and MemSemantic.
_OPERATIONS = {
    1: "and", 2: "or", 3: "xor", 4: "add", 5: "fadd", 6: "max", 7: "min", 8: "umax", 9: "umin", 10: "xchg",
}  # fmt: skip
_ORDERINGS = {1: "monotonic", 2: "acquire", 3: "release", 4: "acq_rel"}
_CLOCK_MONOTONIC = 1


def lower_atomic_rmw(program: Program, op: Operation) -> None:
    """Read, modify, write; the result is what was there before, zero where the mask is off."""
    kind, ordering = _OPERATIONS[op.attributes["atomic_rmw_op"]], _ORDERINGS[op.attributes["sem"]]
    element = element_type(op.operands[1].type)
    _check(element)

    def emit(b: ir.IRBuilder, pointer: Any, operands: list[Any]) -> Any:
        (value,) = operands
        if kind == "fadd" and str(element) == "bf16":
            return _add_bfloat16(b, pointer, value, ordering)
        return b.atomic_rmw(kind, pointer, value, ordering)

    pointer, value, *mask = op.operands
    _each(program, op, pointer, [value], mask, emit)


def lower_atomic_cas(program: Program, op: Operation) -> None:
    """Compare bit by bit and swap; the result is what was there before."""
    ordering = _ORDERINGS[op.attributes["sem"]]
    element = element_type(op.operands[1].type)
    _check(element)
    bits = ir.IntType(8 * size_of(element))

    def emit(b: ir.IRBuilder, pointer: Any, operands: list[Any]) -> Any:
        expected, new = (_cast(b, value, bits) for value in operands)
        return _cast(b, _exchange(b, pointer, expected, new, ordering)[0], memory_type(element))

    pointer, *values = op.operands
    _each(program, op, pointer, values, [], emit)


def lower_atomic_load(program: Program, op: Operation) -> None:
    """The result is zero where the mask is off."""
    ordering, element = _ORDERINGS[op.attributes["sem"]], element_type(op.result.type)
    _check(element)
    pointer, *mask = op.operands
    memory, align = memory_type(element), size_of(element)
    _each(program, op, pointer, [], mask, lambda b, place, _: b.load_atomic(place, ordering, align, typ=memory))


def lower_volatile_load(program: Program, op: Operation) -> None:
    """Every element is read once and here: no other access of the program moves across it, no read is left out.

    So a program can wait in a loop for what another one stores. Where the mask is off, the result is `other`, or zero.
    """
    pointer, mask, other = load_operands(op)
    element = element_type(op.result.type)
    _check(element)
    memory, align = memory_type(element), size_of(element)

    def emit(b: ir.IRBuilder, place: Any, operands: list[Any]) -> Any:
        return b.load_atomic(place, "acquire", align, typ=memory)

    _each(program, op, pointer, [], [] if mask is None else [mask], emit, other)


def lower_atomic_store(program: Program, op: Operation) -> None:
    """Nothing is stored where the mask is off."""
    pointer, value, *mask = op.operands
    ordering, element = _ORDERINGS[op.attributes["sem"]], element_type(value.type)
    _check(element)
    # An exchange, for llvmlite's atomic store knows only pointers with the type of what they point to.
    _each(program, op, pointer, [value], mask, lambda b, place, new: b.atomic_rmw("xchg", place, new[0], ordering))


def lower_atomic_poll(program: Program, op: Operation) -> None:
    """Look at each element, one after the other, until it is what is expected; the result is whether it ever was.

    All elements share one time limit, and each is looked at once at least. Like any loop of a kernel, waiting ends with
    the launch's deadline.
    """
    ordering = _ORDERINGS[op.attributes["sem"]]
    pointer, expected, *limit = op.operands
    memory, align = memory_type(element_type(expected.type)), size_of(element_type(expected.type))
    until: Any = None
    if limit:
        started = program.b.call(_clock(program.b.module), [])
        total = program.b.add(started, program.scalars[limit[0]])
        # The limit is unsigned, and may be as good as none.
        wraps = program.b.icmp_unsigned("<", total, started)
        until = program.b.select(wraps, ir.Constant(I64, 2**64 - 1), total)

    def emit(b: ir.IRBuilder, place: Any, operands: list[Any]) -> Any:
        look, again, done = (b.append_basic_block(name) for name in ("look", "again", "seen"))
        b.branch(look)
        b.position_at_end(look)
        found = b.icmp_unsigned("==", b.load_atomic(place, ordering, align, typ=memory), operands[0])
        b.cbranch(found, done, again)
        b.position_at_end(again)
        end_of_step(program, op, b)
        late = ir.Constant(I1, 0)
        if until is not None:
            late = b.icmp_unsigned(">=", b.call(_clock(b.module), []), until)
        last = b.block
        b.cbranch(late, done, look)
        b.position_at_end(done)
        result = b.phi(I1)
        result.add_incoming(ir.Constant(I1, 1), look)
        result.add_incoming(ir.Constant(I1, 0), last)
        return result

    _each(program, op, pointer, [expected], [], emit)


def _clock(module: Any) -> Any:
    """`clock()`: nanoseconds, as an i64, since a moment that is the same for every call."""
    name = "atomic.clock"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(I64, []), name)
    function.linkage = "internal"
    read = module.globals.get("clock_gettime") or ir.Function(
        module, ir.FunctionType(I32, [I32, c.POINTER]), "clock_gettime"
    )
    b = ir.IRBuilder(function.append_basic_block("entry"))
    time = b.alloca(ir.ArrayType(I64, 2))  # a timespec: seconds and nanoseconds
    b.call(read, [ir.Constant(I32, _CLOCK_MONOTONIC), time])
    seconds, rest = (b.load(b.gep(time, [ir.Constant(I64, k)], source_etype=I64), typ=I64) for k in (0, 1))
    b.ret(b.add(b.mul(seconds, ir.Constant(I64, 10**9)), rest))
    return function


def _check(element: Type) -> None:
    if register_type(element) == I1:
        raise Unlowered("an atomic of bool")


def _cast(b: ir.IRBuilder, value: Any, type_: ir.Type) -> Any:
    return value if value.type == type_ else b.bitcast(value, type_)


def _exchange(b: ir.IRBuilder, pointer: Any, expected: Any, new: Any, ordering: str) -> tuple[Any, Any]:
    # A failed exchange writes nothing, so it can release nothing.
    failed = {"acq_rel": "acquire", "release": "monotonic"}.get(ordering, ordering)
    pair = b.cmpxchg(pointer, expected, new, ordering, failed)
    return b.extract_value(pair, 0), b.extract_value(pair, 1)


def _add_bfloat16(b: ir.IRBuilder, pointer: Any, value: Any, ordering: str) -> Any:
    """By exchange, until nobody came between: bf16 is an integer to LLVM."""
    first = b.load_atomic(pointer, "monotonic", 2, typ=I16)
    before, again, done = b.block, b.append_basic_block("again"), b.append_basic_block("added")
    b.branch(again)
    b.position_at_end(again)
    old = b.phi(I16)
    old.add_incoming(first, before)
    total = b.fadd(float_to_float(b, old, "bf16", "f32"), float_to_float(b, value, "bf16", "f32"))
    found, swapped = _exchange(b, pointer, old, float_to_float(b, total, "f32", "bf16"), ordering)
    old.add_incoming(found, b.block)
    b.cbranch(swapped, done, again)
    b.position_at_end(done)
    return old


def _each(
    program: Program,
    op: Operation,
    pointer: Value,
    values: Sequence[Value],
    masks: Sequence[Value],
    emit: Callable[[ir.IRBuilder, Any, list[Any]], Any],
    other: Value | None = None,
) -> None:
    """`emit(b, address, elements of values)` for every element that no mask (there is at most one) switches off.

    What it returns is the operation's result, if it has one, which is that of `other`, or zero, where the mask is off.
    """
    program.flush()
    mask = masks[0] if masks else None
    result = op.results[0] if op.results else None
    if not isinstance(pointer.type, TensorType):
        arguments = [program.scalars[v] for v in values]
        address = program.b.inttoptr(program.scalars[pointer], c.POINTER)
        condition = program.scalars[mask] if mask is not None else ir.Constant(I1, 1)
        program.note(op, "scalar", "" if isinstance(condition, ir.Constant) else "whole")
        otherwise = program.scalars[other] if other is not None else None
        old = _where(program.b, condition, lambda: emit(program.b, address, arguments), result, otherwise)
        if result is not None:
            program.scalars[result] = old
        return
    others = [] if other is None else [other]
    nest = program.nest([pointer, *values, *masks, *others], pointer.type.shape, op)
    output = program.new_buffer(result) if result is not None and result.users else None
    addresses, kept, *places = (program.lane_slot(k) for k in range(2 + len(values)))
    elements = [element_type(v.type) for v in values]

    def chunk(index: tuple[c.Index, ...]) -> None:
        pointers, *given = (nest.vector(v, index) for v in (pointer, *values))
        otherwise = nest.vector(other, index) if other is not None else None
        b = nest.b
        bits = nest.vector(mask, index) if mask is not None else splat_constant(ir.VectorType(I1, nest.width), 1)
        if not any(at.lanes for at in index):
            condition = bits if mask is not None else ir.Constant(I1, 1)
            program.note(op, "scalar", "" if isinstance(condition, ir.Constant) else "whole")
            here = b.inttoptr(pointers, c.POINTER)
            old = _where(b, condition, lambda: emit(b, here, given), result, otherwise)
            if output is not None:
                output.write(b, index, c.Uniform(old), nest.width)
            return
        program.note(op, "one by one", "" if isinstance(bits, ir.Constant) else "lanes")
        b.store(pointers, addresses, align=8)
        for place, vector, element in zip(places, given, elements, strict=True):
            b.store(vector, place, align=size_of(element))
        if output is not None:
            old_type, old_align = memory_type(output.element), size_of(output.element)
            if otherwise is None:
                otherwise = splat_constant(ir.VectorType(old_type, nest.width), 0)
            b.store(otherwise, kept, align=old_align)

        def one(lane: Any) -> None:
            address = b.load(b.gep(addresses, [lane], source_etype=I64), typ=I64, align=8)
            lanes = [
                b.load(
                    b.gep(place, [lane], source_etype=memory_type(element)),
                    typ=memory_type(element),
                    align=size_of(element),
                )
                for place, element in zip(places, elements, strict=True)
            ]
            old = emit(b, b.inttoptr(address, c.POINTER), lanes)
            if output is not None:
                old = b.zext(old, I8) if old.type == I1 else old
                b.store(old, b.gep(kept, [lane], source_etype=old_type), align=old_align)

        lanewise.for_each_lane(b, bits, one)
        if output is not None:
            vector = b.load(kept, typ=ir.VectorType(old_type, nest.width), align=old_align)
            if register_type(output.element) == I1:
                vector = b.trunc(vector, ir.VectorType(I1, nest.width))
            output.write(b, index, c.Lanes(vector), nest.width)

    nest.run(chunk)


def _where(b: ir.IRBuilder, condition: Any, act: Callable[[], Any], result: Value | None, otherwise: Any) -> Any:
    """What `act` returns; where the scalar condition does not hold `otherwise`, which is zero where it is None; None
    without a result."""
    if result is not None:
        return c.guarded(b, condition, act, constant(result.type, 0) if otherwise is None else otherwise)
    with b.if_then(condition):
        act()
    return None
