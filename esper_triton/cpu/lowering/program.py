"""One Triton program: the operations of a kernel in order, tile operations as loop nests, control flow as branches.

When is a tile computed? Element-wise operations and loads are recorded and computed inside the loop nest of the first
operation that needs all of their elements (a *root*: store, reduce, scan, dot, reshape, entry to and exit from control
flow). The rules that keep this right:

- A value needed after the root as well is stored to scratch memory in the root's own nest, so nothing but index
  arithmetic and constants is ever computed twice. Only a load of neighbours that a reduction needs is done again for
  what comes after, as long as no store comes between: a copy of it would cost more.
- A load is not carried past a store or past control flow that stores: what is still pending is computed first. Within
  one store, the loads it depends on are computed first too, unless they read exactly the addresses that it writes.
- A value used inside control flow is computed before it.
- Loop-carried tiles alternate between two buffers, so that every yielded tile is computed from the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llvmlite import ir

from esper_triton.cpu.errors import UnsupportedOperation
from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.accesses import Form, Record
from esper_triton.cpu.lowering.ahead import Ahead
from esper_triton.cpu.lowering.atomics import lower_volatile_load
from esper_triton.cpu.lowering.chunks import Buffer
from esper_triton.cpu.lowering.elementwise import (
    I1,
    I8,
    I64,
    TABLE,
    Unlowered,
    constant,
    element_type,
    memory_type,
    register_type,
    size_of,
)
from esper_triton.cpu.lowering.layout import WORTH_TURNING, contiguous_axis, steps
from esper_triton.cpu.lowering.memory import is_volatile, load_operands
from esper_triton.cpu.lowering.nest import (
    SHAPE_OPS,
    Nest,
    definition,
    is_elementwise,
    is_lazy_operation,
    is_tile,
    lane_axis,
    operand_axis,
)
from esper_triton.cpu.lowering.streaming import Streams
from esper_triton.cpu.lowering.updates import updates_along
from esper_triton.cpu.mlir import Block, Dense, Operation, PointerType, TensorType, Value

_ALIGNMENT = 64  # of buffers: a cache line
_FUNCTIONS, _HEAVY = ("math.", "tt.extern_elementwise"), 16  # operations that take many instructions, and how many
_DEEPEST = 64  # operations that a lazy tile may be deep: chunks are computed by recursion

# Index arithmetic: computed again wherever it is used rather than stored.
_CHEAP = {
    "arith.addi", "arith.subi", "arith.muli", "arith.andi", "arith.ori", "arith.xori", "arith.cmpi", "arith.extsi",
    "arith.extui", "arith.trunci", "arith.constant", "tt.addptr", "tt.splat", "tt.expand_dims", "tt.broadcast",
    "tt.trans", "tt.make_range", "tt.bitcast",
}  # fmt: skip


# Of one instruction or two.
_ARITHMETIC = {"arith.addf", "arith.subf", "arith.mulf", "arith.negf", "arith.extf", "arith.truncf"}
_SOON = 256  # operations after a reduction among which all that needs a row again must be
_LIGHT = 8  # lazy tiles that a chunk may be made of where it is computed inside of unrolled code


def unsupported(kernel: str, op: Operation, reason: str | None = None) -> UnsupportedOperation:
    """The error that names an operation of a kernel and the line it stands on."""
    place = op.location
    return UnsupportedOperation(
        op.name,
        kernel=kernel,
        file=place.file if place else None,
        line=place.line if place else None,
        reason=None if reason == op.name else reason,
    )


@dataclass(frozen=True)
class _Visit:
    """How a lazy tile is visited: `elsewhere` than at the root's own index, and along which axis lanes run, if any."""

    elsewhere: bool
    axis: int | None


class Program:
    """Lowers the body of one `tt.func` into an LLVM function.

    Attributes:
        b: builder at the present position, outside all loop nests. lanes: elements a chunk has at most.
        scalars: LLVM value of every scalar so far. buffers: tiles in scratch memory.
        shifted: tiles that are another tile plus a scalar (pointers advanced around a loop).
        scratch_bytes: scratch memory used so far. grid: position in the grid (`id0` ...) and its extents (`size0` ...).
        streams: its stores that may go past the caches. pending: lazy loads, in program order.
        record: told of every access that is emitted, None where nobody asks (see `note`).
        frame: pointer to the frame of the launch. handlers: what lowers an operation that is not element-wise, by name.
    """

    def __init__(
        self,
        kernel: str,
        function: Any,
        scratch: Any,
        frame: Any,
        grid: dict[str, Any],
        lanes: int,
        operations: Mapping[str, Handler],
        record: Record | None = None,
    ) -> None:
        """`operations` lowers those operations that have a module of their own, by name."""
        self.handlers = {**_HANDLERS, **operations}
        self.record = record
        self.kernel = kernel
        self.function = function
        self.b = ir.IRBuilder(function.append_basic_block("entry"))
        self.lanes = lanes
        self.scalars: dict[Value, Any] = {}
        self.buffers: dict[Value, Buffer] = {}
        self.shifted: dict[Value, tuple[Value, Any]] = {}
        self.scratch_bytes = 0
        self._scratch = scratch
        self.frame = frame
        self.leave: Any = None  # see `traps.leave`
        self._lane_slots: dict[int, Any] = {}
        self._reserved: dict[str, Any] = {}
        self.grid = grid
        self._depth: dict[Value, int] = {}  # of lazy tiles: how many operations one chunk of it goes through
        self.pending: dict[Value, None] = {}
        self._done: set[Operation] = set()  # what loop nests have computed, or used, so far
        self.terse = False  # whether little code matters more than fast code, since it will hardly ever run
        self.streams = Streams(self)
        self._ahead = Ahead(self)
        self.updates: dict[Value, Buffer] = {}  # see `updates`
        self.targets: dict[Value, Any] = {}  # where a root's result is wanted, if somewhere particular

    def note(
        self,
        op: Operation,
        layout: str,
        mask: str = "",
        *,
        stride: int | float | None = None,
        turned: bool = False,
        streamed: bool = False,
    ) -> None:
        """Say that an access was emitted in this form (see `Form`), if anyone wants to know."""
        if self.record is not None:
            self.record(op, Form(layout, mask, stride, turned, streamed))

    def new_block(self, name: str) -> Any:
        return self.function.append_basic_block(name)

    # ---------------------------------------------------------------------------------------------------------- buffers

    def _allocate(self, size: int) -> Any:
        offset = self.scratch_bytes
        self.scratch_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        # In the entry block, so that a buffer made inside a loop is addressed by a constant offset everywhere.
        with self.b.goto_entry_block():
            return self.b.gep(self._scratch, [ir.Constant(I64, offset)], source_etype=I8)

    def lane_slot(self, number: int) -> Any:
        """Scratch memory for the lanes of one chunk, shared by every access that goes lane by lane."""
        if number not in self._lane_slots:
            self._lane_slots[number] = self._allocate(8 * self.lanes)
        return self._lane_slots[number]

    def reserve(self, name: str, size: int) -> Any:
        """`size` bytes of scratch memory for a callee, the same at every call of it."""
        if name not in self._reserved:
            self._reserved[name] = self._allocate(size)
        return self._reserved[name]

    def new_buffer(
        self, value: Value, register: bool = True, inner: int | None = None, panel: int | None = None
    ) -> Buffer:
        """Scratch memory for a tile; `register`ed as the place where the tile is found from now on.

        Neighbours along axis `inner` (the last where it is None) lie side by side, in panels of `panel` columns if that
        is given, unless the tile's place is given.
        """
        assert isinstance(value.type, TensorType)
        element = value.type.element
        place = self.targets.pop(value, None)
        if isinstance(place, Buffer):
            buffer = place
        elif place is not None:
            buffer = Buffer(place, value.type.shape, element)
        else:
            size = value.type.size
            if panel is not None:
                size += size // value.type.shape[-2]
            pointer = self._allocate(size * size_of(element))
            inner = None if inner == lane_axis(value.type.shape) else inner
            buffer = Buffer(pointer, value.type.shape, element, inner, panel)
        if register:
            self.buffers[value] = buffer
        return buffer

    def constant_buffer(self, op: Operation) -> Buffer:
        """A constant tile that is not a splat, as a global array."""
        dense, type_ = op.attributes["value"], op.result.type
        assert isinstance(dense, Dense)
        assert isinstance(type_, TensorType)
        module = self.function.module
        name = f"{self.function.name}.constant.{op.result.name.lstrip('%')}"
        array = module.globals.get(name)
        if array is None:
            elements = [constant(type_, element) for element in dense.value]
            if register_type(type_) == I1:
                elements = [ir.Constant(I8, int(element.constant) & 1) for element in elements]
            array_type = ir.ArrayType(memory_type(type_), len(elements))
            array = ir.GlobalVariable(module, array_type, name)
            array.linkage, array.global_constant = "internal", True
            array.initializer = ir.Constant(array_type, elements)
        return Buffer(array, type_.shape, type_.element)

    # ------------------------------------------------------------------------------------------- what to keep, and when

    def is_lazy(self, value: Value) -> bool:
        return is_tile(value) and value not in self.buffers

    def is_cheap(self, value: Value, known: dict[Value, bool] | None = None) -> bool:
        """Whether computing the tile again costs next to nothing and reads no memory but scratch."""
        if not self.is_lazy(value):
            return True
        known = {} if known is None else known
        if value not in known:
            if value in self.shifted:
                known[value] = self.is_cheap(self.shifted[value][0], known)
            else:
                op = value.defining_op
                assert op is not None
                known[value] = op.name in _CHEAP and all(self.is_cheap(operand, known) for operand in op.operands)
        return known[value]

    def is_light(self, value: Value) -> bool:
        """Whether a chunk of a lazy tile takes no more than a little arithmetic on what is in scratch memory."""
        known = self.closure([value])
        return len(known) <= _LIGHT and all(
            visit.elsewhere or self.is_cheap(v) or definition(v).name in _ARITHMETIC for v, visit in known.items()
        )

    def make_cheap(self, value: Value) -> None:
        """Compute now what would keep a tile from being computed again wherever it is used, and no more than that."""
        if self.is_cheap(value):
            return
        if value in self.shifted:
            self.make_cheap(self.shifted[value][0])
        elif definition(value).name in _CHEAP and definition(value).name != "tt.trans":
            for operand in definition(value).operands:
                self.make_cheap(operand)
        else:
            self.materialise(value)

    def _is_worth_storing(self, value: Value) -> bool:
        # A shape operation is read through to what it shows.
        return not self.is_cheap(value) and definition(value).name not in SHAPE_OPS

    def closure(self, roots: Iterable[Value], axis: int | None = None) -> dict[Value, _Visit]:
        """How computing `roots`, with lanes along `axis`, visits lazy tiles."""
        visits: dict[Value, _Visit] = {}

        def visit(value: Value, elsewhere: bool, axis: int | None) -> None:
            if not self.is_lazy(value):
                return
            known = visits.get(value)
            if known is not None and known.elsewhere >= elsewhere:
                return
            visits[value] = _Visit(elsewhere, axis if known is None else known.axis)
            if value in self.shifted:
                visit(self.shifted[value][0], elsewhere, axis)
                return
            op = value.defining_op
            assert op is not None
            for operand in op.operands:
                if is_elementwise(op):
                    visit(operand, elsewhere, axis)
                else:
                    visit(operand, True, None if axis is None else operand_axis(op, axis))

        for root in roots:
            visit(root, False, axis)
        return visits

    def prepare(self, roots: Sequence[Value], axis: int | None) -> dict[Value, _Visit]:
        """Put into memory what has to be there before a nest with lanes along `axis` computes `roots`."""
        while True:
            visits = self.closure(roots, axis)
            for value, visit in visits.items():
                # Not at the nest's index: read through a broadcast or a transposition, perhaps many times over.
                if visit.elsewhere and self._is_worth_storing(value):
                    break
                if self._runs_across(value, visit.axis):
                    break
            else:
                return visits
            self.materialise(value, visit.axis)

    def _runs_across(self, value: Value, axis: int | None) -> bool:
        """Whether a value is a load of neighbours in memory along another axis than `axis`, at which it is visited."""
        along = self._contiguous_load(value)
        if axis is None or along is None or along == axis:
            return False
        assert isinstance(value.type, TensorType)
        return min(value.type.shape[axis], value.type.shape[along]) >= WORTH_TURNING

    def _contiguous_load(self, value: Value) -> int | None:
        """The axis along which a lazy tile is loaded from neighbours in memory."""
        op = value.defining_op
        return contiguous_axis(self, load_operands(op)[0]) if op is not None and op.name == "tt.load" else None

    def reading_axis(self, roots: Sequence[Value]) -> int | None:
        """The axis along which most of what lazy tiles are made of lies side by side; None where none is better."""
        visits = self.closure(roots)
        own = [v for v, visit in visits.items() if not visit.elsewhere]
        axes = (self._contiguous_load(v) for v in own)
        return next((axis for axis in axes if axis is not None), None)

    def weight(self, roots: Sequence[Value]) -> int:
        """About how many instructions a chunk of `roots` takes, index arithmetic left out."""
        values = [v for v in self.closure(roots) if v not in self.shifted and not self.is_cheap(v)]
        return sum(_HEAVY if definition(v).name.startswith(_FUNCTIONS) else 1 for v in values)

    def nest(
        self,
        roots: Sequence[Value],
        shape: Sequence[int],
        user: Operation | None,
        axis: int | None = None,
        inner: int | None = None,
        panel: int | None = None,
        also: Sequence[Operation] = (),
    ) -> Nest:
        """A loop nest over `shape` in which `roots` can be computed, each at the nest's own index, for `user`, and for
        other users `also`.

        What has to be in memory before is put there first; what is needed afterwards is kept by the nest. Lanes run
        along `axis`, the last one where it is None; without a user, the roots' own neighbours lie along `inner`, or in
        panels of `panel` columns.
        """
        axis = lane_axis(shape) if axis is None else axis
        visits = self.prepare(roots, axis)
        ready = {value for value, visit in visits.items() if not visit.elsewhere}
        updates, steps = updates_along(self, user, ready, axis)
        operations = dict.fromkeys(definition(value) for value in visits if value not in self.shifted)
        self._done.update((*operations, *also, *steps) if user is None else (*operations, user, *also, *steps))
        keep = {}
        for value in visits:
            self.pending.pop(value, None)
            needed_later = any(u not in self._done for u in value.users)
            wanted = user is None and value in roots
            if (
                needed_later
                and user is not None
                and user.name == "tt.reduce"
                and self._may_be_loaded_again(value, axis, user)
            ):
                self.pending[value] = None
            elif (wanted or needed_later) and not self.is_cheap(value):
                keep[value] = self.new_buffer(value, inner=inner if wanted else axis, panel=panel if wanted else None)
        keep |= updates
        self.buffers |= updates
        accesses = [op for op in (*operations, user) if op is not None and op.name in ("tt.load", "tt.store")]
        nest = Nest(self, shape, keep, [] if self.terse else accesses, axis)
        nest.upcoming = [] if user is None else self._ahead.share(user, nest, self._done)
        return nest

    def _may_be_loaded_again(self, value: Value, axis: int | None, user: Operation) -> bool:
        """Whether a lazy tile is neighbours in memory, which are read as fast as a copy of them would be, and `user` is
        followed by all that needs it before anything is stored: a store would have to make the copy after all."""
        op = definition(value) if value not in self.shifted else None
        if op is None or op.name != "tt.load" or axis is None or self._contiguous_load(value) != axis:
            return False
        if not all(self.is_cheap(operand) for operand in op.operands):
            return False
        missing = {u for u in value.users if u not in self._done}
        assert user.block is not None
        start = user.block.operations.index(user) + 1
        for other in user.block.operations[start : start + _SOON]:
            missing.discard(other)
            if not missing or other.name == "tt.store":
                break
        return not missing

    def materialise(self, value: Value, inner: int | None = None, panel: int | None = None) -> Buffer:
        """The tile in scratch memory, computed now unless it is there already.

        It is row-major where `inner` and `panel` are None. Otherwise neighbours along that axis lie side by side,
        unless it was computed for a reader along another; or it is in panels of that many columns, unless it was
        computed row-major.
        """
        made = self.buffers.get(value)
        if made is not None and (made.row_major or inner is not None or (panel is not None and made.inner is None)):
            return made
        assert isinstance(value.type, TensorType)
        shape = value.type.shape
        if made is None:
            nest = self.nest([value], shape, None, self.reading_axis([value]), inner, panel)
            if value in self.buffers:  # kept by the nest
                nest.run()
                buffer = self.buffers[value] = self._with_count(value, self.buffers[value])
                return buffer
        # Cheap by now, so not kept of itself; or in memory, but not row-major.
        buffer = self.new_buffer(value, register=False, inner=inner, panel=panel)
        self._write(value, buffer)
        self.buffers[value] = buffer
        return buffer

    def _with_count(self, value: Value, buffer: Buffer) -> Buffer:
        """The buffer of a remainder of neighbouring indices, and whether they are neighbours still."""
        op = value.defining_op
        axes = [axis for axis, extent in enumerate(buffer.shape) if extent > 1]
        if op is None or op.name not in ("arith.remsi", "arith.remui") or len(axes) != 1:
            return buffer
        index, divisor = (steps(self, operand)[axes[0]] for operand in op.operands)
        if index != 1 or divisor != 0:
            return buffer
        # The quotient does not decrease along the tile: it is the same everywhere if it is so at both ends.
        place = [
            self.b.gep(buffer.pointer, [ir.Constant(I64, at)], source_etype=memory_type(buffer.element))
            for at in (0, buffer.shape[axes[0]] - 1)
        ]
        first, last = (c.load_scalar(self.b, at, buffer.element) for at in place)
        growth = ir.Constant(first.type, buffer.shape[axes[0]] - 1)
        return replace(buffer, counts=self.b.icmp_unsigned("==", self.b.sub(last, first), growth))

    def copy(self, value: Value, buffer: Buffer) -> None:
        """Compute the tile into `buffer`, whatever becomes of the tile otherwise."""
        if self.is_lazy(value) and not self.is_cheap(value) and len(value.users) == 1:
            self.targets[value] = buffer.pointer
            self.materialise(value)
            return
        self._write(value, buffer)

    def copy_together(self, tiles: Sequence[tuple[Value, Buffer]], user: Operation) -> None:
        """Compute tiles of one shape into buffers, for `user`.

        The buffers may hold what these tiles are made of, as long as that is read in the same place: of each chunk all
        tiles are computed before any is written.
        """
        nest = self.nest([value for value, _ in tiles], tiles[0][1].shape, user)

        def chunk(index: tuple[c.Index, ...]) -> None:
            chunks = [nest.exact(value, index) for value, _ in tiles]
            for computed, (_, buffer) in zip(chunks, tiles, strict=True):
                buffer.write(nest.b, index, computed, nest.width)

        nest.run(chunk)

    def _write(self, value: Value, buffer: Buffer) -> None:
        nest = self.nest([value], buffer.shape, None)
        nest.run(lambda index: buffer.write(nest.b, index, nest.exact(value, index), nest.width))

    def flush(self, but: Iterable[Value] = ()) -> None:
        """Compute the loads that are still pending, because memory is about to change."""
        spared = set(but)
        for value in list(self.pending):
            if value not in spared and value in self.pending:
                self.materialise(value)

    def forget_pending(self) -> None:
        """Loads whose elements nobody needs any more."""
        self.pending.clear()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """A region that may not run, or run again: what it put into scratch memory is not there for anyone else."""
        buffers, pending = dict(self.buffers), dict(self.pending)
        yield
        self.buffers, self.pending = buffers, pending

    # ------------------------------------------------------------------------------------------------------- operations

    def run(self, block: Block, *until: str) -> Operation:
        """Lower the operations of a block up to its terminator, which is returned and must be one of `until`."""
        for op in block.operations:
            if op is block.terminator:
                if op.name not in until:
                    raise self.unsupported(op)
                return op
            try:
                self.lower(op)
            except Unlowered as error:
                raise self.unsupported(op, str(error)) from None
        raise AssertionError("a block without a terminator")

    def emit(self, op: Operation, b: ir.IRBuilder, operands: list[Any]) -> Any:
        """An element-wise operation. Raises UnsupportedOperation of this operation, wherever it is computed."""
        try:
            return TABLE[op.name](b, op, operands)
        except Unlowered as error:
            raise self.unsupported(op, str(error)) from None

    def unsupported(self, op: Operation, reason: str | None = None) -> UnsupportedOperation:
        return unsupported(self.kernel, op, reason)

    def lower(self, op: Operation) -> None:
        """One operation, at the present position."""
        handler = self.handlers.get(op.name)
        if handler is not None:
            handler(self, op)
        elif len(op.results) == 1 and is_tile(op.result) and is_lazy_operation(op):
            register_type(op.result.type)  # an element type that is not known is refused here, with its operation
        elif len(op.results) == 1 and op.name in TABLE:
            self.scalars[op.result] = self.emit(op, self.b, [self.scalars[v] for v in op.operands])
        else:
            raise Unlowered(op.name)
        if len(op.results) == 1 and self.is_lazy(op.result) and op.result not in self.shifted:
            self._bound_depth(op)

    def _bound_depth(self, op: Operation) -> None:
        depth = 1 + max((self._depth.get(operand, 0) for operand in op.operands), default=0)
        if depth < _DEEPEST:
            self._depth[op.result] = depth
        else:
            self.materialise(op.result)

    def _scalar_or_lazy_constant(self, op: Operation) -> None:
        if not is_tile(op.result):
            self.scalars[op.result] = constant(op.result.type, op.attributes["value"])
        else:
            register_type(op.result.type)

    def _addptr(self, op: Operation) -> None:
        if is_tile(op.result):
            return
        pointer, offset = (self.scalars[v] for v in op.operands)
        assert isinstance(op.result.type, PointerType)
        wide = offset if offset.type == I64 else self.b.sext(offset, I64)
        size = ir.Constant(I64, size_of(op.result.type.pointee))
        self.scalars[op.result] = self.b.add(pointer, self.b.mul(wide, size))

    def _program_id(self, op: Operation) -> None:
        kind = "size" if op.name == "tt.get_num_programs" else "id"
        self.scalars[op.result] = self.grid[f"{kind}{op.attributes['axis']}"]

    def _unsplat(self, op: Operation) -> None:
        buffer = self.materialise(op.operands[0])
        self.scalars[op.result] = c.load_scalar(self.b, buffer.pointer, buffer.element)

    # ----------------------------------------------------------------------------------------------------------- memory

    def _load(self, op: Operation) -> None:
        pointer, mask, other = load_operands(op)
        if is_volatile(op):
            lower_volatile_load(self, op)
            return
        if is_tile(pointer):
            register_type(op.result.type)
            self.pending[op.result] = None
            return
        element = element_type(op.result.type)
        address = self.b.inttoptr(self.scalars[pointer], c.POINTER)
        self.note(op, "scalar", "" if mask is None else "whole")
        if mask is None:
            self.scalars[op.result] = c.load_scalar(self.b, address, element)
            return
        otherwise = self.scalars[other] if other is not None else constant(op.result.type, 0)
        self.scalars[op.result] = c.guarded(
            self.b, self.scalars[mask], lambda: c.load_scalar(self.b, address, element), otherwise
        )

    # ------------------------------------------------------------------------------------------------------ reshaping

    def _reshape(self, op: Operation) -> None:
        buffer = self.materialise(op.operands[0])
        assert isinstance(op.result.type, TensorType)
        self.buffers[op.result] = Buffer(buffer.pointer, op.result.type.shape, buffer.element)


def _nothing(program: Program, op: Operation) -> None:
    """For barriers, since one program is one thread here; for hints to a GPU's optimiser; for waiting for the launch
    before this one, which is over."""


Handler = Callable[[Program, Operation], None]
_HANDLERS: dict[str, Handler] = {
    "arith.constant": Program._scalar_or_lazy_constant,
    "tt.addptr": Program._addptr,
    "tt.get_program_id": Program._program_id,
    "tt.get_num_programs": Program._program_id,
    "tt.unsplat": Program._unsplat,
    "tt.load": Program._load,
    "tt.reshape": Program._reshape,
    "gpu.barrier": _nothing,
    "ttg.barrier": _nothing,
    "ttg.local_barrier": _nothing,
    "llvm.intr.assume": _nothing,
    "tt.grid_dependency_wait": _nothing,
    "tt.grid_dependency_launch_dependents": _nothing,
}
