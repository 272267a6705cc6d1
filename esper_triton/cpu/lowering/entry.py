"""The function that a launch calls, on each of its threads: it unpacks the arguments and runs programs.

Each thread has a contiguous range of programs, of which it claims one piece after the other. One that has finished its
range goes on with what is left of the others': a thread that wakes late, or whose core has other things to do, does not
keep the launch waiting. All the same a thread runs, as far as it can, the programs that it ran in the launch before,
whose data its core still has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.elementwise import F32, I1, I8, I32, I64, float_to_float, register_type
from esper_triton.cpu.lowering.function import LoweredFunction
from esper_triton.cpu.lowering.sanitize import emit_default_table
from esper_triton.cpu.lowering.streaming import fence
from esper_triton.cpu.lowering.traps import is_running, report
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.mlir import Operation
from esper_triton.cpu.trap import FRAME_CLAIMS, Status

# Slots of the frame that `esper_triton.cpu.native` passes, all of eight bytes.
_ARGUMENTS, _GRID, _THREAD_NUM, _NUM_THREADS = 0, 1, 4, 5
_SCRATCH_ALIGNMENT = 64
_PIECES = 32  # of a range: what a thread waits for at the end is one of them at most
_ZERO, _ONE = ir.Constant(I64, 0), ir.Constant(I64, 1)


def emit_entry(llvm: Any, function: Operation, name: str, body: LoweredFunction, sanitize: bool) -> None:
    """`void name(Frame *)`, which runs the programs of `function`, lowered to `body`."""
    _Entry(llvm, function, name, body, sanitize).emit()


class _Entry:
    def __init__(self, llvm: Any, function: Operation, name: str, body: LoweredFunction, sanitize: bool) -> None:
        self._llvm, self._source, self._body, self._sanitize = llvm, function, body, sanitize
        self._function = ir.Function(llvm, ir.FunctionType(ir.VoidType(), [c.POINTER]), name)
        self._b = ir.IRBuilder(self._function.append_basic_block("entry"))
        (self._frame,) = self._function.args

    def emit(self) -> None:
        b = self._b
        packed = b.load(self._slot(_ARGUMENTS), typ=c.POINTER)
        parameters = self._source.regions[0].blocks[0].arguments
        self._arguments = [_unpack(b, packed, k, argument.type) for k, argument in enumerate(parameters)]
        if self._sanitize:
            emit_default_table(b, self._frame, len(parameters))
        self._extents = [b.load(self._slot(_GRID + k), typ=I64) for k in range(3)]
        nx, ny, nz = self._extents
        total = b.mul(b.mul(nx, ny), nz)
        thread, threads, claims = self._team()
        end, done = self._new_block("end"), self._new_block("done")
        self._scratch = self._allocate(done)
        self._ranges(total, thread, threads, claims, end)
        b.position_at_end(end)
        if self._body.streams:
            fence(b)
        if self._body.scratch_bytes:
            release = ir.Function(self._llvm, ir.FunctionType(ir.VoidType(), [c.POINTER]), "free")
            b.call(release, [self._scratch])
        b.branch(done)
        b.position_at_end(done)
        b.ret_void()

    def _slot(self, number: int) -> LLVMValue:
        return self._b.gep(self._frame, [ir.Constant(I64, number)], source_etype=I64)

    def _new_block(self, name: str) -> Any:
        return self._function.append_basic_block(name)

    def _team(self) -> tuple[LLVMValue, LLVMValue, LLVMValue]:
        """The number of this thread, how many there are, and where it says how much of each range is taken."""
        b = self._b
        alone = b.alloca(I64)  # where the caller is the only thread, and both callbacks are null
        b.store(_ZERO, alone)
        query = ir.FunctionType(I32, []).as_pointer()
        thread_num, num_threads = (b.load(self._slot(k), typ=query) for k in (_THREAD_NUM, _NUM_THREADS))
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(num_threads, I64), _ZERO)):
            team = [b.sext(b.call(number, []), I64) for number in (thread_num, num_threads)]
            shared = b.load(self._slot(FRAME_CLAIMS), typ=c.POINTER)
            inside = b.block
        phis = [b.phi(I64), b.phi(I64), b.phi(c.POINTER)]
        for phi, single, several in zip(phis, (_ZERO, _ONE, alone), (*team, shared), strict=True):
            phi.add_incoming(single, before)
            phi.add_incoming(several, inside)
        thread, threads, claims = phis
        return thread, threads, claims

    def _allocate(self, done: Any) -> LLVMValue:
        """Scratch memory for one program at a time; without it, say so and go to the block `done`."""
        b, size = self._b, self._body.scratch_bytes
        if not size:
            return ir.Constant(c.POINTER, None)
        # From the C heap, once per thread and launch: nothing is shared between concurrent launches, and the allocator
        # keeps freed arenas at hand. Never on the stack, whose size is not ours.
        allocate = ir.Function(self._llvm, ir.FunctionType(I32, [c.POINTER, I64, I64]), "posix_memalign")
        place = b.alloca(c.POINTER)
        code = b.call(allocate, [place, ir.Constant(I64, _SCRATCH_ALIGNMENT), ir.Constant(I64, size)])
        failed, ready = self._new_block("failed"), self._new_block("ready")
        b.cbranch(b.icmp_unsigned("!=", code, ir.Constant(I32, 0)), failed, ready)
        b.position_at_end(failed)
        report(b, self._frame, Status.OUT_OF_MEMORY, [ir.Constant(I32, 0)] * 3, None)
        b.branch(done)
        b.position_at_end(ready)
        return b.load(place, typ=c.POINTER)

    def _ranges(self, total: LLVMValue, thread: LLVMValue, threads: LLVMValue, claims: LLVMValue, end: Any) -> None:
        """All ranges, the thread's own first; then, or where the launch is stopped, to the block `end`."""
        b = self._b
        share, extra = b.udiv(total, threads), b.urem(total, threads)
        before = b.block
        ranges, claim, claimed, following = (self._new_block(n) for n in ("range", "claim", "claimed", "following"))
        b.branch(ranges)
        b.position_at_end(ranges)
        turn = b.phi(I64)
        turn.add_incoming(_ZERO, before)
        number = b.add(thread, turn)
        number = b.select(b.icmp_unsigned("<", number, threads), number, b.sub(number, threads))
        longer = b.icmp_unsigned("<", number, extra)
        first = b.add(b.mul(number, share), b.select(longer, number, extra))
        count = b.add(share, b.zext(longer, I64))
        piece = b.udiv(count, ir.Constant(I64, _PIECES))
        piece = b.select(b.icmp_unsigned("==", threads, _ONE), count, piece)
        piece = b.select(b.icmp_unsigned("==", piece, _ZERO), _ONE, piece)
        counter = b.gep(claims, [number], source_etype=I64)
        b.branch(claim)
        b.position_at_end(claim)
        start = b.atomic_rmw("add", counter, piece, "monotonic")
        b.cbranch(b.icmp_unsigned("<", start, count), claimed, following)
        b.position_at_end(claimed)
        stop = b.add(start, piece)
        stop = b.select(b.icmp_unsigned("<", stop, count), stop, count)
        self._programs(b.add(first, start), b.add(first, stop), claim, end)
        b.position_at_end(following)
        turn.add_incoming(b.add(turn, _ONE), b.block)
        b.cbranch(b.icmp_unsigned("<", b.add(turn, _ONE), threads), ranges, end)

    def _programs(self, start: LLVMValue, stop: LLVMValue, after: Any, end: Any) -> None:
        """The programs numbered from `start` to `stop`, then to the block `after`; to `end` where the launch is stopped
        before one of them."""
        b = self._b
        nx, ny, _ = self._extents
        rest = b.udiv(start, nx)
        first = (start, b.urem(start, nx), b.urem(rest, ny), b.udiv(rest, ny))
        before = b.block
        loop, program, stopped = (self._new_block(n) for n in ("programs", "program", "stopped"))
        b.branch(loop)
        b.position_at_end(loop)
        linear, x, y, z = phis = [b.phi(I64) for _ in first]
        coordinates = [b.trunc(value, I32) for value in (x, y, z, *self._extents)]
        b.cbranch(is_running(b, self._frame), program, stopped)
        b.position_at_end(stopped)
        report(b, self._frame, Status.TIMEOUT, coordinates[:3], self._source)
        b.branch(end)
        b.position_at_end(program)
        b.call(self._body.function, [*self._arguments, *coordinates, self._scratch, self._frame])
        # Counted on, since divisions take longer than all else that is done between two programs.
        next_x = b.add(x, _ONE)
        new_row = b.icmp_unsigned("==", next_x, nx)
        next_y = b.add(y, b.zext(new_row, I64))
        new_plane = b.icmp_unsigned("==", next_y, ny)
        following = (
            b.add(linear, _ONE),
            b.select(new_row, _ZERO, next_x),
            b.select(new_plane, _ZERO, next_y),
            b.add(z, b.zext(new_plane, I64)),
        )
        for phi, initial, later in zip(phis, first, following, strict=True):
            phi.add_incoming(initial, before)
            phi.add_incoming(later, b.block)
        b.cbranch(b.icmp_unsigned("<", following[0], stop), loop, after)


def _unpack(b: ir.IRBuilder, packed: Any, k: int, type_: Any) -> Any:
    """Run-time argument k from its eight-byte slot; f16 and bf16 travel as float32, i1 as a byte."""
    address = b.gep(packed, [ir.Constant(I64, k)], source_etype=I64)
    register = register_type(type_)
    if register == I1:
        return b.trunc(b.load(address, typ=I8), I1)
    name = str(type_)
    if name in ("f16", "bf16"):
        return float_to_float(b, b.load(address, typ=F32), "f32", name)
    return b.load(address, typ=register)
