"""Stores that go past the caches, where a launch writes more than the caches hold.

An ordinary store first reads the line that it writes to, and leaves it in the cache in place of something else. That
is lost on what exceeds the last-level cache: what is written first is gone before anyone can read it. So whole lines
are then written with non-temporal stores, which is two thirds of the traffic for a copy.

Decided at the launch, for each store: by the bytes that it writes in all programs. Not where the kernel reads what it
writes, nor where programs wait for one another: other threads do not see such stores in order, until the fence that
`fence` puts at the end of a thread's programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.host import last_level_cache_bytes
from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.elementwise import I32, I64, size_of
from esper_triton.cpu.lowering.memory import is_volatile
from esper_triton.cpu.lowering.origins import origins
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.mlir import Operation, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_LINE = 64  # bytes of a cache line
_UNSEEN = ("tt.call", "tt.atomic_")  # may read memory elsewhere, or let others read


class Streams:
    """The stores of one function that may go past the caches.

    Attributes:
        used: whether there are any.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._read: dict[Operation, set[Value | None] | None] = {}
        self.used = False

    def store(
        self, b: ir.IRBuilder, outside: ir.IRBuilder, op: Operation, vector: LLVMValue, address: LLVMValue
    ) -> bool:
        """Write neighbouring elements at an address (i64) for the `tt.store` `op`, past the caches if that pays.

        Whether it does is found out by the builder `outside`, before the loops around this store.
        Returns whether it may turn out so.
        """
        value = op.operands[1].type
        assert isinstance(value, TensorType)
        element = value.element
        pointer = b.inttoptr(address, c.POINTER)
        if vector.type.count * size_of(element) % _LINE or not self._may_stream(op):
            c.store_vector(b, vector, pointer, element)
            return False
        self.used = True
        # One test for both questions: the address begins a line, and the launch writes enough.
        bits = b.and_(address, self._low_bits(outside, op, value))
        with b.if_else(b.icmp_unsigned("==", bits, ir.Constant(I64, 0))) as (past, through):
            with past:
                stored = b.store(c.to_memory(b, vector, element), pointer, align=_LINE)
                stored.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
            with through:
                c.store_vector(b, vector, pointer, element)
        return True

    def _may_stream(self, op: Operation) -> bool:
        if self._program.terse:
            return False
        function = op
        while function.name != "tt.func":
            assert function.parent is not None
            function = function.parent
        if function not in self._read:
            self._read[function] = self._origins_of_loads(function)
        read, written = self._read[function], origins(op.operands[0])
        return read is not None and None not in read and None not in written and not read & written

    def _origins_of_loads(self, function: Operation) -> set[Value | None] | None:
        """What the function reads; None where others read what it writes, or where that cannot be known."""
        if function.attributes.get("sym_visibility") == "private":
            return None
        read: set[Value | None] = set()
        for op in function.walk():
            if op.name.startswith(_UNSEEN) or is_volatile(op):
                return None
            if op.name == "tt.load":
                read |= origins(op.operands[0])
        return read

    def _low_bits(self, b: ir.IRBuilder, op: Operation, tile: TensorType) -> LLVMValue:
        """The bits that an address of a line of its own has not; all bits where the launch writes too little."""
        program = self._program
        total: LLVMValue = ir.Constant(I64, tile.size * size_of(tile.element))
        for axis in range(3):
            total = b.mul(total, b.zext(program.grid[f"size{axis}"], I64))
        around = op.parent
        while around is not None:
            if around.name == "scf.for":
                total = b.mul(total, self._steps(b, around))
            around = around.parent
        enough = b.icmp_unsigned(">=", total, ir.Constant(I64, last_level_cache_bytes()))
        return b.select(enough, ir.Constant(I64, _LINE - 1), ir.Constant(I64, -1))

    def _steps(self, b: ir.IRBuilder, loop: Operation) -> LLVMValue:
        """How often a loop runs, at least 1; 1 where it would take a division to know."""
        low, high, step = (self._program.scalars[v] for v in loop.operands[:3])
        one = ir.Constant(I64, 1)
        if not isinstance(step, ir.Constant) or step.constant < 1 or step.constant & (step.constant - 1):
            return one
        low, high = (v if v.type == I64 else b.sext(v, I64) for v in (low, high))
        steps = b.ashr(b.sub(high, low), ir.Constant(I64, step.constant.bit_length() - 1))
        return b.select(b.icmp_signed("<", steps, one), one, steps)


def fence(b: ir.IRBuilder) -> None:
    """What was streamed is seen by every thread that sees what comes after."""
    b.fence("seq_cst")
