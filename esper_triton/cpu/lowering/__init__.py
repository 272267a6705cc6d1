"""From parsed TTIR to LLVM IR: one entry function per kernel that runs a range of programs.

`elementwise`, `vmath`, `trigonometry`, `libdevice` and `rounding` emit arithmetic, `chunks` memory accesses, `nest`
loop nests over a tile, `reduction` and `dot` the operations that need loops of their own, `control` branches and loops,
`program` the order of it all, `entry` the function that a launch calls.
"""

from __future__ import annotations

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
from esper_triton.cpu.lowering.elementwise import Unlowered
from esper_triton.cpu.lowering.entry import emit_entry
from esper_triton.cpu.lowering.function import Functions
from esper_triton.cpu.lowering.printing import lower_print
from esper_triton.cpu.lowering.rearrange import (
    lower_cat,
    lower_gather,
    lower_histogram,
    lower_join,
    lower_split,
)
from esper_triton.cpu.lowering.reduction import lower_reduce
from esper_triton.cpu.lowering.sanitize import ACCESS, add_access_checks, lower_access
from esper_triton.cpu.lowering.scan import lower_scan
from esper_triton.cpu.lowering.simplify import drop_reshapes
from esper_triton.cpu.lowering.stores import lower_store
from esper_triton.cpu.lowering.traps import lower_assert, lower_division_trap
from esper_triton.cpu.mlir import Module


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
    emit_entry(llvm, function, symbol or name, body, bool(sanitize))
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
