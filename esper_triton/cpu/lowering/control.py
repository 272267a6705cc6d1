"""Control flow: `scf.if`, `scf.for` and `scf.while`, with scalars and tiles as results and carried values.

Scalars become phis. A tile that a branch yields is written to one buffer by both branches. A tile carried around a loop
alternates between two buffers; or has one, where products are added to it and nothing else reads it, or where its
elements are only needed for those in the same places afterwards; or, where each step adds one scalar to all of it (a
pointer that advances), is its first value and a scalar that is carried instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering.chunks import Buffer
from esper_triton.cpu.lowering.elementwise import I64, TABLE, constant, element_type, register_type, size_of
from esper_triton.cpu.lowering.memory import is_volatile
from esper_triton.cpu.lowering.nest import definition, is_elementwise, is_lazy_operation, is_tile
from esper_triton.cpu.lowering.traps import end_of_step
from esper_triton.cpu.lowering.updates import may_be_early
from esper_triton.cpu.mlir import Block, Operation, PointerType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

# Or what another program may have written by then.
_MEMORY_EFFECTS = {
    "tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store", "tt.atomic_poll", "tt.call",
    "tt.print", "tt.assert",
}  # fmt: skip


def _enter(program: Program, op: Operation) -> None:
    """Compute what control flow uses from outside, and what it could change under a pending load."""
    for nested in op.walk():
        for value in nested.operands if nested is not op else ():
            if program.is_lazy(value) and _defined_outside(value, op):
                program.make_cheap(value)
    if writes_memory(op):
        program.flush()


def lower_if(program: Program, op: Operation) -> None:
    """Two branches that join; a branch that is not there yields nothing."""
    _enter(program, op)
    results = [program.new_buffer(r) if is_tile(r) else None for r in op.results]
    then, otherwise, join = (program.new_block(n) for n in ("then", "else", "endif"))
    program.b.cbranch(program.scalars[op.operands[0]], then, otherwise)
    incoming: list[list[tuple[Any, Any]]] = [[] for _ in results]
    for block, region in zip((then, otherwise), op.regions, strict=True):
        program.b.position_at_end(block)
        with program.scope():
            yields = program.run(region.block, "scf.yield").operands if region.blocks else []
            for yielded, buffer in zip(yields, results, strict=True):
                if buffer is not None:
                    program.copy(yielded, buffer)
        for k, yielded in enumerate(yields):
            if results[k] is None:
                incoming[k].append((program.scalars[yielded], program.b.block))
        program.b.branch(join)
    program.b.position_at_end(join)
    for result, pairs in zip(op.results, incoming, strict=True):
        if pairs:
            phi = program.scalars[result] = program.b.phi(register_type(result.type))
            for value, block in pairs:
                phi.add_incoming(value, block)


def lower_for(program: Program, op: Operation) -> None:
    """A counted loop, tested before the first step."""
    _enter(program, op)
    lower, upper, step = (program.scalars[v] for v in op.operands[:3])
    body = op.regions[0].block
    counter, arguments = body.arguments[0], body.arguments[1:]
    initial = op.operands[3:]
    yields = body.terminator.operands
    before, header, inside, after = program.b, *(program.new_block(n) for n in ("for", "body", "endfor"))

    advances = [_advance(program, a, y) if is_tile(a) else None for a, y in zip(arguments, yields, strict=True)]
    in_place = _updated_in_place(program, body, advances)
    entry_values: list[Any] = []
    spare: list[Any] = []
    for argument, first, yielded, advance in zip(arguments, initial, yields, advances, strict=True):
        spare.append(None)
        if not is_tile(argument):
            entry_values.append(program.scalars[first])
        elif advance is not None:
            program.make_cheap(first)
            entry_values.append(ir.Constant(advance, 0))
        else:
            here = program.new_buffer(argument, register=False)
            program.copy(first, here)
            entry_values.append(here.pointer)
            alone = argument in in_place or _is_summed_in_place(argument, yielded)
            there = here if alone else program.new_buffer(argument, register=False)
            spare[-1] = there.pointer

    entry = before.block
    before.branch(header)
    program.b.position_at_end(header)
    index = program.b.phi(lower.type)
    index.add_incoming(lower, entry)
    phis: list[Any] = []
    spare_phis: list[Any] = []
    for value, other in zip(entry_values, spare, strict=True):
        phis.append(program.b.phi(value.type))
        phis[-1].add_incoming(value, entry)
        if other is None or other is value:
            spare_phis.append(other and phis[-1])
        else:
            spare_phis.append(program.b.phi(other.type))
            spare_phis[-1].add_incoming(other, entry)
    compare = program.b.icmp_unsigned if op.attributes.get("unsignedCmp") else program.b.icmp_signed
    program.b.cbranch(compare("<", index, upper), inside, after)

    program.b.position_at_end(inside)
    program.scalars[counter] = index
    for argument, first, phi, advance in zip(arguments, initial, phis, advances, strict=True):
        _bind(program, argument, first, phi, advance)
    for argument, yielded, other in zip(arguments, yields, spare_phis, strict=True):
        if other is not None and _can_target(program, yielded, body):
            program.targets[yielded] = other
        elif argument in in_place and may_be_early(argument, yielded, body):
            assert isinstance(yielded.type, TensorType)
            program.updates[yielded] = Buffer(other, yielded.type.shape, yielded.type.element)
    following = []
    copies: dict[tuple[int, ...], list[tuple[Value, Buffer]]] = {}
    with program.scope():
        terminator = program.run(body, "scf.yield")
        for yielded, phi, other, advance in zip(yields, phis, spare_phis, advances, strict=True):
            if advance is not None:
                following.append(program.b.add(phi, _uniform(program, definition(yielded), yielded)))
            elif other is None:
                following.append(program.scalars[yielded])
            else:
                following.append(other)
                made = program.buffers.get(yielded)
                if made is None or made.pointer is not other:
                    assert isinstance(yielded.type, TensorType)
                    there = Buffer(other, yielded.type.shape, yielded.type.element)
                    copies.setdefault(there.shape, []).append((yielded, there))
        for together in copies.values():
            program.copy_together(together, terminator)
    end_of_step(program, op)
    latch = program.b.block
    index.add_incoming(program.b.add(index, step), latch)
    program.b.branch(header)
    for value, phi, other in zip(following, phis, spare_phis, strict=True):
        phi.add_incoming(value, latch)
        if other is not None and other is not phi:
            other.add_incoming(phi, latch)

    program.b.position_at_end(after)
    for result, first, phi, advance in zip(op.results, initial, phis, advances, strict=True):
        _bind(program, result, first, phi, advance)


def lower_while(program: Program, op: Operation) -> None:
    """A loop with a test of its own: what the test passes on are the body's arguments and, at the end, the results."""
    _enter(program, op)
    before, body = (region.block for region in op.regions)
    carried: list[Any] = []  # buffers of tiles, phis of scalars
    for argument, first in zip(before.arguments, op.operands, strict=True):
        if is_tile(argument):
            carried.append(program.new_buffer(argument))
            program.copy(first, carried[-1])
        else:
            carried.append(None)
    entry = program.b.block
    header, inside, after = (program.new_block(n) for n in ("while", "body", "endwhile"))
    program.b.branch(header)
    program.b.position_at_end(header)
    for k, (argument, first) in enumerate(zip(before.arguments, op.operands, strict=True)):
        if carried[k] is None:
            phi = program.scalars[argument] = carried[k] = program.b.phi(register_type(argument.type))
            phi.add_incoming(program.scalars[first], entry)
    results = [program.new_buffer(r) if is_tile(r) else None for r in op.results]
    with program.scope():
        condition, *passed = program.run(before, "scf.condition").operands
        for value, buffer in zip(passed, results, strict=True):
            if buffer is not None:
                program.copy(value, buffer)
    for value, argument, result in zip(passed, body.arguments, op.results, strict=True):
        if is_tile(value):
            program.buffers[argument] = program.buffers[result]
        else:
            program.scalars[argument] = program.scalars[result] = program.scalars[value]
    program.b.cbranch(program.scalars[condition], inside, after)
    program.b.position_at_end(inside)
    with program.scope():
        yields = program.run(body, "scf.yield").operands
        for yielded, place in zip(yields, carried, strict=True):
            if isinstance(place, Buffer):
                program.copy(yielded, place)
        end_of_step(program, op)
        for yielded, place in zip(yields, carried, strict=True):
            if not isinstance(place, Buffer):
                place.add_incoming(program.scalars[yielded], program.b.block)
    program.b.branch(header)
    program.b.position_at_end(after)


def _bind(program: Program, value: Value, first: Value, phi: Any, advance: Any) -> None:
    """Make a loop's argument or result known: a scalar, a buffer, or its first value shifted."""
    if advance is not None:
        program.shifted[value] = (first, phi)
    elif is_tile(value):
        assert isinstance(value.type, TensorType)
        program.buffers[value] = Buffer(phi, value.type.shape, value.type.element)
    else:
        program.scalars[value] = phi


def _advance(program: Program, argument: Value, yielded: Value) -> Any | None:
    """The LLVM type of the scalar that a carried tile of indices or pointers grows by, None for other tiles."""
    op = yielded.defining_op
    if op is None or op.name not in ("tt.addptr", "arith.addi") or argument not in op.operands:
        return None
    if not _is_uniform(program, _other(op, argument)):
        return None
    return I64 if op.name == "tt.addptr" else register_type(argument.type)


def _is_uniform(program: Program, value: Value) -> bool:
    op = value.defining_op
    if op is None or value in program.buffers:
        return False
    if op.name in ("tt.expand_dims", "tt.broadcast"):
        return _is_uniform(program, op.operands[0])
    return op.name == "tt.splat" or (op.name == "arith.constant" and bool(op.attributes["value"].splat))


def advance_of(program: Program, argument: Value, yielded: Value) -> Any | None:
    """By how much (in bytes) a carried tile of pointers will have advanced at the end of the step, if known already."""
    op = yielded.defining_op
    if op is None or op.name != "tt.addptr" or argument is not op.operands[0] or argument not in program.shifted:
        return None
    source = definition(_spread(op.operands[1]))
    if source.name == "tt.splat" and source.operands[0] not in program.scalars:
        return None
    return _uniform(program, op, yielded)


def _spread(value: Value) -> Value:
    """What is the same in every element of a tile, as the smallest tile that there is of it."""
    while (source := definition(value)).name in ("tt.expand_dims", "tt.broadcast"):
        value = source.operands[0]
    return value


def _uniform(program: Program, op: Operation, yielded: Value) -> Any:
    """What `op` adds to every element of its carried operand, in bytes for pointers."""
    argument = next(v for v in op.operands if v in program.shifted)
    value = _spread(_other(op, argument))
    source = definition(value)
    amount = (
        program.scalars[source.operands[0]]
        if source.name == "tt.splat"
        else constant(value.type, source.attributes["value"].value)
    )
    if op.name == "arith.addi":
        return amount
    pointer = element_type(yielded.type)
    assert isinstance(pointer, PointerType)
    wide = amount if amount.type == I64 else program.b.sext(amount, I64)
    return program.b.mul(wide, ir.Constant(I64, size_of(pointer.pointee)))


def _can_target(program: Program, yielded: Value, body: Block) -> bool:
    """Whether a yielded tile may be computed straight into the buffer of the next iteration."""
    op = yielded.defining_op
    return op is not None and op.block is body and op.name == "tt.dot" and body.terminator.operands.count(yielded) == 1


def _is_summed_in_place(argument: Value, yielded: Value) -> bool:
    """Whether a carried tile is read for the sum of the product alone that is yielded in its stead.

    Its elements may go through element-wise operations and other products on the way. A product reads an element of its
    accumulator before it writes the result's there.
    """
    value, product = argument, yielded.defining_op
    while product is not None and product.name == "tt.dot" and len(value.users) == 1:
        (user,) = value.users
        if user is product:
            return value is product.operands[2] and value not in product.operands[:2]
        if user.block is not product.block or not (user.name in TABLE or user.name == "tt.dot"):
            return False
        value = user.result
    return False


def _updated_in_place(program: Program, body: Block, advances: list[Any]) -> set[Value]:
    """The carried tiles that may be overwritten, at the end of a step, by what is yielded in their stead.

    Tiles of one shape are computed chunk by chunk there, all of them before any is written. So an element may be read
    for elements in the same place, and for nothing else that is computed as late as that.
    """
    arguments, yields = body.arguments[1:], body.terminator.operands
    own = dict(zip(arguments, yields, strict=True))
    plain = {
        yielded
        for argument, yielded, advance in zip(arguments, yields, advances, strict=True)
        if advance is None and is_tile(argument) and not _can_target(program, yielded, body)
    }
    needed: dict[Value, set[tuple[tuple[int, ...], bool]]] = {}  # by tiles of which shape, and whether in one place

    def visit(value: Value, reader: tuple[int, ...], beside: bool, seen: set[tuple[Value, bool]]) -> None:
        if (value, beside) in seen or not is_tile(value):
            return
        seen.add((value, beside))
        if value in own:
            needed.setdefault(value, set()).add((reader, beside))
        op = value.defining_op
        if op is not None and op.block is body and is_lazy_operation(op):
            for operand in op.operands:
                visit(operand, reader, beside and is_elementwise(op), seen)

    def shape(value: Value) -> tuple[int, ...]:
        assert isinstance(value.type, TensorType)
        return value.type.shape

    for yielded in plain:
        visit(yielded, shape(yielded), True, set())
    return {a for a, yielded in own.items() if yielded in plain and needed.get(a, set()) <= {(shape(yielded), True)}}


def _other(op: Operation, value: Value) -> Value:
    first, second = op.operands
    return second if first is value else first


def _defined_outside(value: Value, op: Operation) -> bool:
    """Whether a value comes from outside the operation's regions."""
    block = value.defining_op.block if value.defining_op else value.block
    while block is not None:
        parent = block.region.parent
        if parent is op:
            return False
        block = parent.block if parent else None
    return True


def writes_memory(op: Operation) -> bool:
    """Whether the operation, or one inside of it, may change memory, wait for others to, or be seen from outside."""
    return any(nested.name in _MEMORY_EFFECTS or is_volatile(nested) for nested in op.walk())
