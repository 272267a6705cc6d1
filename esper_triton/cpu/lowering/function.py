"""Functions: blocks that branch to each other, returns, and calls that Triton did not inline.

Every `tt.func` becomes an LLVM function of its own that takes, after its own parameters, one pointer for each tile that
it returns, and what a program knows of itself: its position in the grid, the grid, scratch memory, the frame of the
launch. A tile is passed as a pointer to scratch memory of the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llvmlite import ir

from esper_triton.cpu.lowering.accesses import Record
from esper_triton.cpu.lowering.chunks import POINTER, Buffer
from esper_triton.cpu.lowering.elementwise import I32, Unlowered, register_type
from esper_triton.cpu.lowering.nest import is_tile
from esper_triton.cpu.lowering.program import Handler, Program, unsupported
from esper_triton.cpu.lowering.traps import leave_if_stopped
from esper_triton.cpu.mlir import Block, FunctionType, Module, Operation, Region, TensorType, Type, Value

# The hidden parameters that tell a program its position, by their names in `Program.grid`.
GRID = ("id0", "id1", "id2", "size0", "size1", "size2")


class LoweredFunction:
    """The LLVM function of a `tt.func`, the scratch memory it needs, and whether it stores past the caches."""

    def __init__(self, function: Any, scratch_bytes: int, streams: bool) -> None:
        self.function, self.scratch_bytes, self.streams = function, scratch_bytes, streams


class Functions:
    """The functions of one kernel, lowered when they are first asked for."""

    def __init__(
        self,
        llvm: Any,
        module: Module,
        kernel: str,
        lanes: int,
        operations: Mapping[str, Handler],
        record: Record | None = None,
    ) -> None:
        """`lanes`: elements a chunk has at most. `operations`, `record`: see `Program`."""
        self._llvm, self._module, self._kernel, self._lanes = llvm, module, kernel, lanes
        self._operations = {**operations, "tt.call": self._call}
        self._record = record
        self._lowered: dict[str, LoweredFunction] = {}
        self._open: set[str] = set()

    def get(self, name: str) -> LoweredFunction:
        """The function called `name`. Raises UnsupportedOperation, and Unlowered for a function that calls itself."""
        if name not in self._lowered:
            if name in self._open:
                raise Unlowered(f"function {name!r} calls itself")
            self._open.add(name)
            self._lowered[name] = self._lower(self._module.functions[name])
            self._open.remove(name)
        return self._lowered[name]

    def _lower(self, source: Operation) -> LoweredFunction:
        name = source.attributes["sym_name"]
        entry = source.regions[0].blocks[0]
        scalars, tiles = _results(source)
        parameters = [POINTER if is_tile(argument) else register_type(argument.type) for argument in entry.arguments]
        hidden = [*[POINTER] * len(tiles), *[I32] * len(GRID), POINTER, POINTER]
        function = ir.Function(self._llvm, ir.FunctionType(_struct(scalars), [*parameters, *hidden]), f"{name}.program")
        function.linkage = "internal"
        arguments, targets = function.args[: len(parameters)], function.args[len(parameters) : -len(GRID) - 2]
        *grid, scratch, frame = function.args[-len(GRID) - 2 :]
        positions = dict(zip(GRID, grid, strict=True))
        program = Program(
            self._kernel, function, scratch, frame, positions, self._lanes, self._operations, self._record
        )
        for argument, value in zip(entry.arguments, arguments, strict=True):
            if is_tile(argument):
                program.buffers[argument] = _buffer(value, argument.type)
            else:
                program.scalars[argument] = value
        outputs = [_buffer(pointer, type) for pointer, type in zip(targets, tiles, strict=True)]
        lower_body(program, source.regions[0], outputs, "tt.return")
        return LoweredFunction(function, program.scratch_bytes, program.streams.used)

    def _call(self, program: Program, op: Operation) -> None:
        callee = self.get(op.attributes["callee"])
        program.flush()  # what it stores is not known here
        b = program.b
        arguments = [program.materialise(v).pointer if is_tile(v) else program.scalars[v] for v in op.operands]
        tiles = [program.new_buffer(r).pointer for r in op.results if is_tile(r)]
        grid = [program.grid[name] for name in GRID]
        scratch = program.reserve(callee.function.name, callee.scratch_bytes)
        result = b.call(callee.function, [*arguments, *tiles, *grid, scratch, program.frame])
        leave_if_stopped(program)
        for k, scalar in enumerate(r for r in op.results if not is_tile(r)):
            program.scalars[scalar] = b.extract_value(result, k)


def _results(source: Operation) -> tuple[list[Type], list[TensorType]]:
    """Types of the scalars and of the tiles that a function returns."""
    signature = source.attributes["function_type"]
    assert isinstance(signature, FunctionType)
    tiles = [t for t in signature.results if isinstance(t, TensorType)]
    return [t for t in signature.results if not isinstance(t, TensorType)], tiles


def _struct(scalars: list[Type]) -> Any:
    return ir.LiteralStructType([register_type(t) for t in scalars]) if scalars else ir.VoidType()


def _buffer(pointer: Any, type: Type) -> Buffer:
    assert isinstance(type, TensorType)
    return Buffer(pointer, type.shape, type.element)


def _return(program: Program, op: Operation, outputs: list[Buffer]) -> None:
    remaining = iter(outputs)
    scalars = []
    for value in op.operands:
        if is_tile(value):
            program.copy(value, next(remaining))
        else:
            scalars.append(program.scalars[value])
    b = program.b
    if not scalars:
        b.ret_void()
        return
    result: Any = ir.Constant(ir.LiteralStructType([s.type for s in scalars]), ir.Undefined)
    for k, scalar in enumerate(scalars):
        result = b.insert_value(result, scalar, k)
    b.ret(result)


def lower_body(program: Program, region: Region, outputs: list[Buffer], returns: str) -> None:
    """The blocks of a function, which the operation named `returns` leaves with its results; tiles go to `outputs`."""
    if len(region.blocks) == 1:
        _return(program, program.run(region.block, returns), outputs)
    else:
        _lower_blocks(program, region, outputs, returns)


def _lower_blocks(program: Program, region: Region, outputs: list[Buffer], returns: str) -> None:
    """Blocks in an order in which each comes after all that branch to it. Triton's loops are operations, so there is
    such an order."""
    order = _in_order(program, region)
    entry = order[0]
    llvm = {entry: program.b.block}
    phis: dict[Block, list[Any]] = {entry: []}
    for block in order[1:]:
        llvm[block] = program.new_block("block")
        program.b.position_at_end(llvm[block])
        phis[block] = []
        for argument in block.arguments:
            if is_tile(argument):
                phis[block].append(program.new_buffer(argument))
            else:
                phis[block].append(program.b.phi(register_type(argument.type)))
                program.scalars[argument] = phis[block][-1]
    for block in order:
        program.b.position_at_end(llvm[block])
        known = dict(program.buffers)
        terminator = program.run(block, returns, "cf.br", "cf.cond_br")
        for value in list(_used_elsewhere(block)):
            if program.is_lazy(value) and not program.is_cheap(value):
                program.materialise(value)
        if terminator.name == returns:
            _return(program, terminator, outputs)
        else:
            _branch(program, terminator, llvm, phis)
        # What was computed here of earlier blocks' tiles is not there on another way through the function.
        program.buffers = {v: at for v, at in program.buffers.items() if v in known or _block_of(v) is block}
        program.forget_pending()


def _branch(program: Program, op: Operation, llvm: Mapping[Block, Any], phis: Mapping[Block, list[Any]]) -> None:
    b = program.b
    if op.name == "cf.cond_br":
        # A block of its own for each way, so that what is passed on one is not computed on the other, and that two
        # ways into the same block can be told apart.
        ways = [program.new_block("way") for _ in op.successors]
        b.cbranch(program.scalars[op.operands[0]], *ways)
    else:
        ways = [b.block]
    for way, successor, passed in zip(ways, op.successors, op.successor_operands, strict=True):
        b.position_at_end(way)
        with program.scope():
            for value, place in zip(passed, phis[successor], strict=True):
                if is_tile(value):
                    program.copy(value, place)
                else:
                    place.add_incoming(program.scalars[value], b.block)
        b.branch(llvm[successor])


def _used_elsewhere(block: Block) -> list[Value]:
    """Tiles defined in a block that operations in other blocks of the function use."""
    values = [*block.arguments, *(result for op in block.operations for result in op.results)]
    return [v for v in values if is_tile(v) and any(_enclosing(user, block) is not block for user in v.users)]


def _enclosing(op: Operation, block: Block) -> Block | None:
    """The block, in the region of `block`, that an operation stands in, perhaps nested."""
    at = op.block
    while at is not None and at.region is not block.region:
        parent = at.region.parent
        at = parent.block if parent else None
    return at


def _block_of(value: Value) -> Block | None:
    return value.defining_op.block if value.defining_op else value.block


def _in_order(program: Program, region: Region) -> list[Block]:
    finished: list[Block] = []
    state: dict[Block, bool] = {}  # False: begun, True: finished

    def visit(block: Block) -> None:
        state[block] = False
        for successor in block.terminator.successors:
            if state.get(successor) is False:
                raise unsupported(program.kernel, block.terminator, "a jump backwards")
            if successor not in state:
                visit(successor)
        state[block] = True
        finished.append(block)

    visit(region.blocks[0])
    return finished[::-1]
