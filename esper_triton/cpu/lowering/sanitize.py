"""The sanitizer: every access of a kernel to memory is checked against the storages that were passed to the launch.

Before each load, store and atomic of the parsed module stands an operation of our own, `esper.access`, which computes
the addresses once more and ends the program before anything is touched where one lies outside. An address computed from
a pointer argument must lie within that argument's storage; where it is not known from which (pointers that were loaded,
chosen between, or passed to a function that is not inlined), within any.

With `race`, every element that a store writes is also marked as written by its program, in memory beside the storages,
and the program ends where another one has written it. Such launches run on one thread. A store that comes after a
compare-and-swap or an atomic exchange, as in a lock, is taken to be protected by it: it marks, but does not ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.accesses import OPERATIONS
from esper_triton.cpu.lowering.chunks import Affine
from esper_triton.cpu.lowering.elementwise import I1, I32, I64, element_type, size_of
from esper_triton.cpu.lowering.memory import load_operands
from esper_triton.cpu.lowering.nest import is_tile
from esper_triton.cpu.lowering.origins import origins
from esper_triton.cpu.lowering.traps import trap_unless
from esper_triton.cpu.lowering.vmath import splat_constant
from esper_triton.cpu.mlir import Block, Module, Operation, PointerType, Region, TensorType, Value
from esper_triton.cpu.storages import BASE, ENTRY_WORDS, FIRST_MARK, HEADER_WORDS, SHADOW, SHIFT, SIZE, UNLIMITED
from esper_triton.cpu.trap import FRAME_STORAGES, Status

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

ACCESS = "esper.access"

_MASK = {"tt.store": 2, "tt.atomic_rmw": 2, "tt.atomic_load": 1, "tt.atomic_store": 2}  # which operand it is
_EXCHANGE = 10  # Triton's RMWOp
_WAITS = {"tt.atomic_cas", "tt.atomic_load", "tt.atomic_poll"}


def add_access_checks(module: Module, kernel: str, race: bool) -> None:
    """Put an `esper.access` before every access to memory, in place; a second time does nothing."""
    arguments = module.functions[kernel].regions[0].blocks[0].arguments
    for function in module.functions.values():
        if not any(op.name == ACCESS for op in function.walk()):
            for region in function.regions:
                _Insertion(module, arguments, race).into(region, locked=False)


class _Insertion:
    """Walks a function in order. `race`: stores are to mark what they write."""

    def __init__(self, module: Module, arguments: Sequence[Value], race: bool) -> None:
        self._module, self._arguments, self._race = module, arguments, race

    def into(self, region: Region, locked: bool) -> None:
        """`locked`: an operation that could take a lock came before."""
        for block in region.blocks:
            output: list[Operation] = []
            for op in block.operations:
                for nested in op.regions:
                    self.into(nested, locked)
                if op.name in OPERATIONS:
                    marks = ("after a lock" if locked else "alone") if self._race and op.name == "tt.store" else ""
                    output.append(_check(op, block, self._arguments, marks))
                output.append(op)
                locked = locked or (self._race and self._takes_a_lock(op, set()))
            block.operations[:] = output

    def _takes_a_lock(self, op: Operation, seen: set[str]) -> bool:
        for nested in op.walk():
            if nested.name in _WAITS or nested.attributes.get("atomic_rmw_op") == _EXCHANGE:
                return True
            if nested.name == "tt.call":
                callee: str = nested.attributes["callee"]
                if callee not in seen and self._takes_a_lock(self._module.functions[callee], seen | {callee}):
                    return True
        return False


def _check(op: Operation, block: Block, arguments: Sequence[Value], marks: str) -> Operation:
    if op.name == "tt.load":
        pointers, mask, _ = load_operands(op)
    else:
        at = _MASK.get(op.name, len(op.operands))
        pointers, mask = op.operands[0], op.operands[at] if at < len(op.operands) else None
    origin = origins(pointers)
    (argument,) = origin if len(origin) == 1 else (None,)
    known = argument in arguments
    attributes = {
        "access": OPERATIONS[op.name],
        "argument": arguments.index(argument) if known and argument is not None else None,
        "name": argument.name.lstrip("%") if known and argument is not None else "",
        "marks": marks,
    }
    operands = [pointers] if mask is None else [pointers, mask]
    check = Operation(ACCESS, operands, [], attributes, [], [], [], op.location, block)
    for value in operands:
        value.users.append(check)
    return check


def lower_access(program: Program, op: Operation) -> None:
    """`esper.access`: a trap where an address that is not masked off lies in no storage, or another program wrote."""
    pointers, *masks = op.operands
    mask = masks[0] if masks else None
    element = element_type(pointers.type)
    assert isinstance(element, PointerType)
    check = _Access(program, op, size_of(element.pointee))
    if not is_tile(pointers):
        condition = program.scalars[mask] if mask is not None else ir.Constant(I1, 1)
        with program.b.if_then(condition):
            check.one(program.b, program.scalars[pointers])
        return
    assert isinstance(pointers.type, TensorType)
    nest = program.nest(op.operands, pointers.type.shape, op)

    def bits(index: tuple[c.Index, ...]) -> Any:
        if mask is not None:
            return nest.vector(mask, index)
        return splat_constant(ir.VectorType(I1, nest.width), 1)

    def chunk(index: tuple[c.Index, ...]) -> None:
        at = nest.chunk(pointers, index)
        if not any(axis.lanes for axis in index):
            condition = nest.vector(mask, index) if mask is not None else ir.Constant(I1, 1)
            address = nest.vector(pointers, index)
            with nest.b.if_then(condition):
                check.one(nest.b, address)
        elif isinstance(at, Affine) and check.is_known and (not check.marks or at.step == check.width):
            b = nest.b
            last = b.add(at.base, ir.Constant(I64, (nest.width - 1) * at.step))
            inside = b.and_(check.is_inside(b, at.base), check.is_inside(b, last))
            addresses = c.as_vector(b, at, nest.width)
            if check.marks:
                on = bits(index)
                check.neighbours(nest.b, at.base, addresses, on, nest.b.and_(inside, lanewise.all_true(nest.b, on)))
                return
            # Between two addresses within a storage there is none outside of it, whatever the mask says.
            with b.if_then(b.not_(inside)):
                check.lanes(b, addresses, bits(index))
        else:
            addresses, on = nest.vector(pointers, index), bits(index)
            check.lanes(nest.b, addresses, on)

    nest.run(chunk)


class _Access:
    """Checks of addresses for one access. What belongs to the storage is loaded once, where the program is now."""

    def __init__(self, program: Program, op: Operation, width: int) -> None:
        """`width`: bytes that each element takes."""
        self._program, self._op, self.width = program, op, width
        self.marks, self._asks = bool(op.attributes["marks"]), op.attributes["marks"] == "alone"
        self.is_known = op.attributes["argument"] is not None
        self._message = f"{op.attributes['access']}\n{op.attributes['name']}"
        b = program.b
        slot = b.gep(program.frame, [ir.Constant(I64, FRAME_STORAGES)], source_etype=I64)
        self._table = b.load(slot, typ=c.POINTER)
        if self.is_known:
            self._base, self._size, self._shadow, self._shift = self._entry(
                b, ir.Constant(I64, op.attributes["argument"])
            )
            self._limit = self._first_outside(b, self._size)

    def _entry(self, b: ir.IRBuilder, number: Any) -> tuple[Any, Any, Any, Any]:
        words = ir.Constant(I64, ENTRY_WORDS)
        first = b.add(b.mul(number, words), ir.Constant(I64, HEADER_WORDS))
        base, size, shadow, shift = (
            b.load(b.gep(self._table, [b.add(first, ir.Constant(I64, k))], source_etype=I64), typ=I64)
            for k in (BASE, SIZE, SHADOW, SHIFT)
        )
        return base, size, shadow, shift

    def _first_outside(self, b: ir.IRBuilder, size: Any) -> Any:
        """The first offset at which an element is no longer within a storage of `size` bytes."""
        if self.width == 1:
            return size
        fits = b.icmp_unsigned(">=", size, ir.Constant(I64, self.width))
        return b.select(fits, b.sub(size, ir.Constant(I64, self.width - 1)), ir.Constant(I64, 0))

    def is_inside(self, b: ir.IRBuilder, address: Any) -> Any:
        """Whether the element at an address (or each of a vector) is within the known argument's storage."""
        base, limit = self._base, self._limit
        if isinstance(address.type, ir.VectorType):
            base, limit = (c.splat(b, value, address.type.count) for value in (base, limit))
        return b.icmp_unsigned("<", b.sub(address, base), limit)

    def lanes(self, b: ir.IRBuilder, addresses: Any, on: Any) -> None:
        """Check a vector of addresses where `on`."""
        if self.is_known and not self.marks:
            on = b.and_(on, b.not_(self.is_inside(b, addresses)))  # lanes that will not pass, for the report
        slot = self._program.lane_slot(0)
        b.store(addresses, slot, align=8)
        lanewise.for_each_lane(
            b, on, lambda lane: self.one(b, b.load(b.gep(slot, [lane], source_etype=I64), typ=I64, align=8))
        )

    def one(self, b: ir.IRBuilder, address: Any) -> None:
        """Check, and mark, a single element."""
        if self.is_known:
            base, size, shadow, shift = self._base, self._size, self._shadow, self._shift
            inside = self.is_inside(b, address)
        else:
            base, size, shadow, shift = self._entry(b, b.call(_find_function(b.module), [self._table, address]))
            inside = b.icmp_unsigned("<", b.sub(address, base), self._first_outside(b, size))
        offset, width = b.sub(address, base), ir.Constant(I64, self.width)
        report = self._program, b, inside, Status.OUT_OF_BOUNDS, self._op, self._message
        trap_unless(*report, offset if self.is_known else address, width, size)
        if self.marks:
            # A shadow of larger elements cannot tell smaller ones apart.
            has_shadow = b.icmp_unsigned("!=", shadow, ir.Constant(I64, 0))
            with b.if_then(b.and_(has_shadow, b.icmp_unsigned("<=", shift, self._own_shift()))):
                self._mark(b, shadow, shift, offset)

    def neighbours(self, b: ir.IRBuilder, base: Any, addresses: Any, on: Any, whole: Any) -> None:
        """Check, and mark, neighbouring elements; at once where `whole` (all of them on and inside) holds."""
        new_block = self._program.new_block
        all_at_once, alone, one_by_one, done = (new_block(n) for n in ("marks", "alone", "each", "marked"))
        same = b.icmp_unsigned("==", self._shift, self._own_shift())
        has_shadow = b.icmp_unsigned("!=", self._shadow, ir.Constant(I64, 0))
        b.cbranch(b.and_(whole, b.and_(same, has_shadow)), all_at_once, one_by_one)
        b.position_at_end(all_at_once)
        place = self._place(b, self._shadow, self._shift, b.sub(base, self._base))
        width = addresses.type.count
        writers = b.load(place, typ=ir.VectorType(I32, width), align=4)
        own = c.splat(b, self._own(b), width)
        free = b.icmp_unsigned("<", writers, c.splat(b, self._first_mark(b), width))
        b.cbranch(lanewise.all_true(b, b.or_(free, b.icmp_unsigned("==", writers, own))), alone, one_by_one)
        b.position_at_end(alone)
        b.store(own, place, align=4)
        b.branch(done)
        b.position_at_end(one_by_one)
        self.lanes(b, addresses, on)
        b.branch(done)
        b.position_at_end(done)

    def _own_shift(self) -> Any:
        return ir.Constant(I64, self.width.bit_length() - 1)

    def _first_mark(self, b: ir.IRBuilder) -> Any:
        slot = b.gep(self._table, [ir.Constant(I64, FIRST_MARK)], source_etype=I64)
        return b.trunc(b.load(slot, typ=I64), I32)

    def _own(self, b: ir.IRBuilder) -> Any:
        """What this program marks elements with: its number in the grid on top of the first mark."""
        grid = self._program.grid
        x, y, z, nx, ny = (grid[name] for name in ("id0", "id1", "id2", "size0", "size1"))
        linear = b.add(b.mul(b.add(b.mul(z, ny), y), nx), x)
        return b.add(self._first_mark(b), linear)

    @staticmethod
    def _place(b: ir.IRBuilder, shadow: Any, shift: Any, offset: Any) -> Any:
        return b.inttoptr(b.add(shadow, b.mul(b.lshr(offset, shift), ir.Constant(I64, 4))), c.POINTER)

    def _mark(self, b: ir.IRBuilder, shadow: Any, shift: Any, offset: Any) -> None:
        own, place = self._own(b), self._place(b, shadow, shift, offset)
        if self._asks:
            writer = b.load(place, typ=I32)
            first = self._first_mark(b)
            alone = b.or_(b.icmp_unsigned("<", writer, first), b.icmp_unsigned("==", writer, own))
            other = b.zext(b.sub(writer, first), I64)
            report = self._program, b, alone, Status.RACE, self._op, self._message
            trap_unless(*report, offset, ir.Constant(I64, self.width), other)
        b.store(own, place)


def emit_default_table(b: ir.IRBuilder, frame: Any, count: int) -> None:
    """Where the launch has passed no table of its `count` storages, let every access pass."""
    entry = [0] * ENTRY_WORDS
    entry[SIZE] = UNLIMITED
    header = [0] * HEADER_WORDS
    header[0] = max(count, 1)
    words = header + entry * max(count, 1)
    array = ir.ArrayType(I64, len(words))
    table = ir.GlobalVariable(b.module, array, "storages.unlimited")
    table.linkage, table.global_constant = "internal", True
    table.initializer = ir.Constant(array, [ir.Constant(I64, word) for word in words])
    slot = b.gep(frame, [ir.Constant(I64, FRAME_STORAGES)], source_etype=I64)
    missing = b.icmp_unsigned("==", b.load(slot, typ=I64), ir.Constant(I64, 0))
    with b.if_then(missing):
        b.store(table, slot)


def _find_function(module: Any) -> Any:
    """`find(table, address)`: number of the storage that holds an address; where none does, of one that does not."""
    name = "storages.find"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(I64, [c.POINTER, I64]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    table, address = function.args
    entry, test, following, done = (function.append_basic_block(n) for n in ("entry", "test", "next", "done"))
    b = ir.IRBuilder(entry)
    count = b.load(table, typ=I64)
    b.branch(test)
    b.position_at_end(test)
    number = b.phi(I64)
    first = b.add(b.mul(number, ir.Constant(I64, ENTRY_WORDS)), ir.Constant(I64, HEADER_WORDS))
    base, size = (
        b.load(b.gep(table, [b.add(first, ir.Constant(I64, k))], source_etype=I64), typ=I64) for k in (BASE, SIZE)
    )
    b.cbranch(b.icmp_unsigned("<", b.sub(address, base), size), done, following)
    b.position_at_end(following)
    after = b.add(number, ir.Constant(I64, 1))
    number.add_incoming(ir.Constant(I64, 0), entry)
    number.add_incoming(after, following)
    last = b.icmp_unsigned(">=", after, count)
    found = ir.IRBuilder(done).phi(I64)
    found.add_incoming(number, test)
    found.add_incoming(number, following)
    ir.IRBuilder(done).ret(found)
    b.cbranch(last, done, test)
    return function
