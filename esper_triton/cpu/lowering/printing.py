"""`tt.print`: one line for each element, as on a GPU: `pid (x, y, z) idx (i, j) prefix value`.

Each line is one write to the standard output's file descriptor, so lines of different threads do not mix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.elementwise import I8, I32, I64, element_type, float_to_float, size_of
from esper_triton.cpu.lowering.nest import Nest, is_tile
from esper_triton.cpu.mlir import Operation, PointerType, ScalarType, Type, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_STANDARD_OUTPUT = 1


def lower_print(program: Program, op: Operation) -> None:
    """Scalars print one line, tiles one for each element; without operands the prefix alone."""
    prefix, hexadecimal = str(op.attributes["prefix"]), bool(op.attributes["hex"])
    signed = list(op.attributes["isSigned"])
    grid = [program.grid[f"id{axis}"] for axis in range(3)]
    if not op.operands:
        _write(program, program.b, f"pid (%d, %d, %d){prefix}\n", grid)
    for k, value in enumerate(op.operands):
        # With several operands Triton tells them apart by number.
        number = f"(operand {k}) " if len(op.operands) > 1 else ""
        element = element_type(value.type)
        if is_tile(value):
            _print_tile(program, value, prefix, number, grid, hexadecimal, bool(signed[k]))
        else:
            format, argument = _formatted(program.b, element, program.scalars[value], hexadecimal, bool(signed[k]))
            _write(program, program.b, f"pid (%d, %d, %d) idx (){prefix}{number}{format}\n", [*grid, argument])


def _print_tile(
    program: Program, value: Value, prefix: str, number: str, grid: list[Any], hexadecimal: bool, signed: bool
) -> None:
    buffer = program.materialise(value)
    nest = Nest(program, buffer.shape)
    # One element at a time: no axis has lanes.
    index = tuple(nest.open(extent) for extent in buffer.shape)
    chunk = buffer.read(nest.b, index, 1)
    assert isinstance(chunk, c.Uniform)
    format, argument = _formatted(nest.b, buffer.element, chunk.value, hexadecimal, signed)
    # Right-justified, so that the columns of a tile line up.
    places = ", ".join(f"%{len(str(extent - 1))}d" for extent in buffer.shape)
    at = [nest.b.trunc(position.value, I32) for position in index]
    _write(program, nest.b, f"pid (%d, %d, %d) idx ({places}){prefix}{number}{format}\n", [*grid, *at, argument])
    for _ in buffer.shape:
        nest.close()


def _formatted(b: ir.IRBuilder, element: Type, value: Any, hexadecimal: bool, signed: bool) -> tuple[str, Any]:
    """printf's directive for a value of MLIR type `element`, and the argument to go with it."""
    if isinstance(element, PointerType):
        return "%p", b.inttoptr(value, c.POINTER)
    assert isinstance(element, ScalarType)
    if element.is_float and not hexadecimal:
        return "%f", float_to_float(b, value, element.name, "f64")
    if element.is_float:
        value = b.bitcast(value, ir.IntType(8 * size_of(element))) if not isinstance(value.type, ir.IntType) else value
        signed = False
    if value.type != I64:
        value = b.sext(value, I64) if signed and not hexadecimal else b.zext(value, I64)
    if hexadecimal:
        return f"0x%0{2 * size_of(element)}llx", value
    return ("%lld" if signed else "%llu"), value


def _write(program: Program, b: ir.IRBuilder, format: str, arguments: list[Any]) -> None:
    module = program.function.module
    text = bytearray(format.encode() + b"\0")
    array = ir.ArrayType(I8, len(text))
    name = module.get_unique_name(f"{program.function.name}.format")
    constant = ir.GlobalVariable(module, array, name)
    constant.linkage, constant.global_constant = "internal", True
    constant.initializer = ir.Constant(array, text)
    dprintf = module.globals.get("dprintf")
    if dprintf is None:
        dprintf = ir.Function(module, ir.FunctionType(I32, [I32, c.POINTER], var_arg=True), "dprintf")
    b.call(dprintf, [ir.Constant(I32, _STANDARD_OUTPUT), constant, *arguments])
