"""From parsed TTIR to LLVM IR: one entry function per kernel that runs a range of programs.

`elementwise`, `vmath`, `trigonometry`, `libdevice` and `rounding` emit arithmetic, `chunks` memory accesses, `nest`
loop nests over a tile, `reduction` and `dot` the operations that need loops of their own, `control` branches and loops,
`program` the order of it all. This module makes the entry function.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from esper_triton.cpu.errors import UnsupportedOperation
from esper_triton.cpu.lowering import division
from esper_triton.cpu.lowering.accesses import Record
from esper_triton.cpu.lowering.atomics import (
    lower_atomic_cas,
    lower_atomic_load,
    lower_atomic_poll,
    lower_atomic_rmw,
    lower_atomic_store,
)
from esper_triton.cpu.lowering.control import lower_for, lower_if, lower_while
from esper_triton.cpu.lowering.dot import lower_dot
from esper_triton.cpu.lowering.dot_scaled import lower_dot_scaled
from esper_triton.cpu.lowering.elements import lower_map_elementwise
from esper_triton.cpu.lowering.elementwise import (
    F32,
    I1,
    I8,
    I32,
    I64,
    Unlowered,
    float_to_float,
    register_type,
)
from esper_triton.cpu.lowering.function import Functions, LoweredFunction
from esper_triton.cpu.lowering.printing import lower_print
from esper_triton.cpu.lowering.rearrange import (
    lower_cat,
    lower_gather,
    lower_histogram,
    lower_join,
    lower_split,
)
from esper_triton.cpu.lowering.reduction import lower_reduce
from esper_triton.cpu.lowering.sanitize import ACCESS, add_access_checks, emit_default_table, lower_access
from esper_triton.cpu.lowering.scan import lower_scan
from esper_triton.cpu.lowering.simplify import drop_reshapes
from esper_triton.cpu.lowering.stores import lower_store
from esper_triton.cpu.lowering.streaming import fence
from esper_triton.cpu.lowering.traps import is_running, lower_assert, lower_division_trap, report
from esper_triton.cpu.mlir import Module, Operation
from esper_triton.cpu.trap import Status

_POINTER = ir.PointerType()
# Slots of the frame that `esper_triton.cpu.native` passes, all of eight bytes.
_ARGUMENTS, _GRID, _THREAD_NUM, _NUM_THREADS = 0, 1, 4, 5
_SCRATCH_ALIGNMENT = 64


def lower(
    module: Module,
    name: str,
    *,
    symbol: str | None = None,
    vector_bits: int | None = None,
    sanitize: str = "",
    record: Record | None = None,
) -> str:
    """LLVM IR, as text, of a module that exports `void symbol(Frame *)`.

    Args:
        module: the parsed TTIR; it is changed, checks are added to it.
        name: the kernel's function.
        symbol: name of the entry point in the object code; the function's where it is None.
        vector_bits: width of the target's vector registers; this machine's where it is None.
        sanitize: `"bounds"` to check every access, `"race"` to look for write races as well, or nothing.
        record: told of every access when it is emitted, and in which form.

    Raises:
        UnsupportedOperation: the kernel uses something that has no lowering yet.
    """
    if vector_bits is None:
        from esper_triton.cpu.host import vector_bits as detect

        vector_bits = detect()
    drop_reshapes(module)
    division.check_divisions(module)
    if sanitize:
        add_access_checks(module, name, sanitize == "race")
    function = module.functions[name]
    llvm = ir.Module(name)
    try:
        body = Functions(llvm, module, name, 2 * vector_bits // 32, _OPERATIONS, record).get(name)
    except Unlowered as error:  # of the function itself, such as a parameter of an unknown type
        raise UnsupportedOperation("tt.func", kernel=name, reason=str(error)) from None
    _emit_entry(llvm, function, symbol or name, body, bool(sanitize))
    return str(llvm)


_OPERATIONS = {
    division.TRAP: lower_division_trap,
    ACCESS: lower_access,
    "scf.for": lower_for,
    "scf.if": lower_if,
    "scf.while": lower_while,
    "tt.assert": lower_assert,
    "tt.atomic_cas": lower_atomic_cas,
    "tt.atomic_load": lower_atomic_load,
    "tt.atomic_poll": lower_atomic_poll,
    "tt.atomic_rmw": lower_atomic_rmw,
    "tt.atomic_store": lower_atomic_store,
    "tt.cat": lower_cat,
    "tt.dot": lower_dot,
    "tt.dot_scaled": lower_dot_scaled,
    "tt.gather": lower_gather,
    "tt.histogram": lower_histogram,
    "tt.join": lower_join,
    "tt.map_elementwise": lower_map_elementwise,
    "tt.print": lower_print,
    "tt.reduce": lower_reduce,
    "tt.scan": lower_scan,
    "tt.split": lower_split,
    "tt.store": lower_store,
}


def _emit_entry(llvm: Any, function: Operation, name: str, body: LoweredFunction, sanitize: bool) -> None:
    """`void name(Frame *)`: every thread of a team calls it and runs its contiguous share of the programs."""
    entry = ir.Function(llvm, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    b = ir.IRBuilder(entry.append_basic_block("entry"))
    (frame,) = entry.args

    def slot(k: int) -> Any:
        return b.gep(frame, [ir.Constant(I64, k)], source_etype=I64)

    packed = b.load(slot(_ARGUMENTS), typ=_POINTER)
    arguments = [
        _unpack(b, packed, k, argument.type) for k, argument in enumerate(function.regions[0].blocks[0].arguments)
    ]
    if sanitize:
        emit_default_table(b, frame, len(arguments))
    nx, ny, nz = (b.load(slot(_GRID + k), typ=I64) for k in range(3))
    total = b.mul(b.mul(nx, ny), nz)

    # Both callbacks are null where the caller is the only thread.
    query = ir.FunctionType(I32, []).as_pointer()
    thread_num, num_threads = (b.load(slot(k), typ=query) for k in (_THREAD_NUM, _NUM_THREADS))
    before = b.block
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(num_threads, I64), ir.Constant(I64, 0))):
        own = b.sext(b.call(thread_num, []), I64)
        team = b.sext(b.call(num_threads, []), I64)
        inside = b.block
    thread, threads = b.phi(I64), b.phi(I64)
    for phi, alone, many in ((thread, 0, own), (threads, 1, team)):
        phi.add_incoming(ir.Constant(I64, alone), before)
        phi.add_incoming(many, inside)
    share, extra = b.udiv(total, threads), b.urem(total, threads)
    spare = b.select(b.icmp_unsigned("<", thread, extra), thread, extra)
    start = b.add(b.mul(thread, share), spare)
    count = b.add(share, b.zext(b.icmp_unsigned("<", thread, extra), I64))
    stop = b.add(start, count)

    done = entry.append_basic_block("done")
    work = entry.append_basic_block("work")
    b.cbranch(b.icmp_unsigned("<", start, stop), work, done)
    b.position_at_end(work)
    # From the C heap, once per thread and launch: nothing is shared between concurrent launches, and the allocator
    # keeps freed arenas at hand. Never on the stack, whose size is not ours.
    scratch: Any = ir.Constant(_POINTER, None)
    if body.scratch_bytes:
        allocate = ir.Function(llvm, ir.FunctionType(I32, [_POINTER, I64, I64]), "posix_memalign")
        place = b.alloca(_POINTER)
        code = b.call(allocate, [place, ir.Constant(I64, _SCRATCH_ALIGNMENT), ir.Constant(I64, body.scratch_bytes)])
        failed, ready = entry.append_basic_block("failed"), entry.append_basic_block("ready")
        b.cbranch(b.icmp_unsigned("!=", code, ir.Constant(I32, 0)), failed, ready)
        b.position_at_end(failed)
        report(b, frame, Status.OUT_OF_MEMORY, [ir.Constant(I32, 0)] * 3, None)
        b.branch(done)
        b.position_at_end(ready)
        scratch = b.load(place, typ=_POINTER)

    rest = b.udiv(start, nx)
    first = (start, b.urem(start, nx), b.urem(rest, ny), b.udiv(rest, ny))
    preheader = b.block
    loop, after = entry.append_basic_block("programs"), entry.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    linear, x, y, z = phis = [b.phi(I64) for _ in first]
    coordinates = [b.trunc(value, I32) for value in (x, y, z, nx, ny, nz)]
    b.call(body.function, [*arguments, *coordinates, scratch, frame])
    # Counted on, since divisions take longer than all else that is done between two programs.
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    next_x = b.add(x, one)
    new_row = b.icmp_unsigned("==", next_x, nx)
    next_y = b.add(y, b.zext(new_row, I64))
    new_plane = b.icmp_unsigned("==", next_y, ny)
    following = (
        b.add(linear, one),
        b.select(new_row, zero, next_x),
        b.select(new_plane, zero, next_y),
        b.add(z, b.zext(new_plane, I64)),
    )
    more, stopped = entry.append_basic_block("more"), entry.append_basic_block("stopped")
    b.cbranch(b.icmp_unsigned("<", following[0], stop), more, after)
    b.position_at_end(more)
    for phi, initial, later in zip(phis, first, following, strict=True):
        phi.add_incoming(initial, preheader)
        phi.add_incoming(later, b.block)
    b.cbranch(is_running(b, frame), loop, stopped)
    b.position_at_end(stopped)
    report(b, frame, Status.TIMEOUT, coordinates[:3], function)
    b.branch(after)
    b.position_at_end(after)
    if body.streams:
        fence(b)
    if body.scratch_bytes:
        release = ir.Function(llvm, ir.FunctionType(ir.VoidType(), [_POINTER]), "free")
        b.call(release, [scratch])
    b.branch(done)
    b.position_at_end(done)
    b.ret_void()


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
