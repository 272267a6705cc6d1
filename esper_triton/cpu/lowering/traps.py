"""Programs that end early: a failed check fills the report in the frame and leaves the program at once.

A trap is a branch out of whatever loops it stands in to the function's `leave` block. The first program that traps wins
the report; the others stop at their next test of the status: after a call, at the end of a loop's body, and before the
next program of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering import lanewise
from esper_triton.cpu.lowering.elementwise import I8, I32, I64
from esper_triton.cpu.mlir import Operation, TensorType
from esper_triton.cpu.trap import FRAME_REPORT, FRAME_STATUS, Status

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program


def lower_assert(program: Program, op: Operation) -> None:
    """`tt.assert`: a trap where a scalar, or any element of a tile, is false."""
    _trap_where(program, op, 0, Status.ASSERTION, str(op.attributes.get("message", "")))


def lower_division_trap(program: Program, op: Operation) -> None:
    """`esper.divided_by_zero` (see `division`): a trap where a scalar, or any element of a tile, is true."""
    _trap_where(program, op, 1, Status.DIVISION_BY_ZERO, "")


def _trap_where(program: Program, op: Operation, bad: int, status: Status, message: str) -> None:
    (bits,) = op.operands
    nest = program.nest([bits], bits.type.shape, op) if isinstance(bits.type, TensorType) else None

    def check(value: Any, b: ir.IRBuilder) -> None:
        holds = b.not_(value) if bad else value
        if isinstance(value.type, ir.VectorType):
            holds = lanewise.all_true(b, holds)
        trap_unless(program, b, holds, status, op, message)

    if nest is None:
        check(program.scalars[bits], program.b)
    else:
        nest.run(lambda index: check(nest.vector(bits, index), nest.b))


def trap_unless(
    program: Program, b: ir.IRBuilder, condition: Any, status: Status, op: Operation, message: str = "", *payload: Any
) -> None:
    """Leave the program with a report where the scalar `condition` is false; `b` goes on where it is true.

    Args:
        message: what to tell the user. payload: up to four numbers (i64) for the report, their meaning `status`'s own.
    """
    holds, fails = program.new_block("holds"), program.new_block("trap")
    b.cbranch(condition, holds, fails)
    b.position_at_end(fails)
    report(b, program.frame, status, _position(program), op, message, *payload)
    b.branch(leave(program))
    b.position_at_end(holds)


def leave_if_stopped(program: Program) -> None:
    """Leave the function where the launch has been stopped: by a trap, here or in another program, or its deadline."""
    running = program.new_block("running")
    program.b.cbranch(is_running(program.b, program.frame), running, leave(program))
    program.b.position_at_end(running)


def end_of_step(program: Program, loop: Operation, b: ir.IRBuilder | None = None) -> None:
    """To stand at every jump back of a loop of the kernel's: leave where the launch has been stopped. The first loop to
    notice that the deadline has passed reports itself. `b` is the program's own builder where it is None."""
    b = program.b if b is None else b
    running, stopped = program.new_block("running"), program.new_block("stopped")
    b.cbranch(is_running(b, program.frame), running, stopped)
    b.position_at_end(stopped)
    report(b, program.frame, Status.TIMEOUT, _position(program), loop)
    b.branch(leave(program))
    b.position_at_end(running)


def is_running(b: ir.IRBuilder, frame: Any) -> Any:
    """Whether nothing has stopped the launch, as an i1. Another thread may change it at any time."""
    slot = b.gep(frame, [ir.Constant(I64, FRAME_STATUS)], source_etype=I64)
    return b.icmp_unsigned("==", b.load_atomic(slot, "monotonic", 8, typ=I64), ir.Constant(I64, 0))


def report(
    b: ir.IRBuilder,
    frame: Any,
    status: Status,
    position: Sequence[Any],
    op: Operation | None,
    message: str = "",
    *payload: Any,
) -> None:
    """Fill the frame's report unless it has one. `position`: the program's id x, y, z. `op`: whose line to tell."""
    numbers = [*payload, *[ir.Constant(I64, 0)] * (4 - len(payload))]
    place: Any = _place(b.module, op, message) if op is not None else ir.Constant(c.POINTER, None)
    b.call(_report_function(b.module), [frame, ir.Constant(I32, status), *position, place, *numbers])


def leave(program: Program) -> Any:
    """The block that returns from the function at once; its results are not to be looked at."""
    if program.leave is None:
        program.leave = program.new_block("leave")
        b = ir.IRBuilder(program.leave)
        result = program.function.function_type.return_type
        if isinstance(result, ir.VoidType):
            b.ret_void()
        else:
            b.ret(ir.Constant(result, ir.Undefined))
    return program.leave


def _position(program: Program) -> list[Any]:
    return [program.grid[f"id{axis}"] for axis in range(3)]


def _place(module: Any, op: Operation, message: str) -> Any:
    """A constant with where in the source a trap stands, as `trap.failure` takes it apart."""
    at = op.location
    lines = [str(at.line) if at else "", at.file if at else "", message]
    text = bytearray("\n".join(lines).encode("utf-8", "replace").replace(b"\0", b"?") + b"\0")
    array = ir.ArrayType(I8, len(text))
    place = ir.GlobalVariable(module, array, module.get_unique_name("place"))
    place.linkage, place.global_constant, place.initializer = "internal", True, ir.Constant(array, text)
    return place


def _report_function(module: Any) -> Any:
    """`report(frame, status, x, y, z, place, payload...)`: fills the report if there is none."""
    name = "trap.report"
    if name in module.globals:
        return module.globals[name]
    parameters = [c.POINTER, *[I32] * 4, c.POINTER, *[I64] * 4]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("cold")
    frame, status, *fields = function.args
    b = ir.IRBuilder(function.append_basic_block("entry"))

    def slot(k: int) -> Any:
        return b.gep(frame, [ir.Constant(I64, k)], source_etype=I64)

    exchanged = b.cmpxchg(slot(FRAME_STATUS), ir.Constant(I32, Status.RUNNING), status, "monotonic")
    with b.if_then(b.extract_value(exchanged, 1)):
        for k, field in enumerate(fields):
            b.store(b.zext(field, I64) if field.type == I32 else field, slot(FRAME_REPORT + k))
    b.ret_void()
    return function
