"""`tt.dot`: `c + a @ b` over tiles in scratch memory, with a block of the result held in registers.

Operands narrower than float32 are widened to it first: products of them are exact there, so this is at least as
accurate as the hardware that Triton was made for. `inputPrecision` and `maxNumImpreciseAcc` ask for no
more than that. Integers are multiplied and added in 32 bits, and wrap. Where the processor can, bfloat16 and 8-bit
integers are multiplied in pairs instead (`dot_pairs`).

A block of the result is a few rows of two vector registers: each step of the loop over K loads one line of the right
operand and adds to every row its product with one element of the left one. Lines of the right operand follow one
another in scratch memory (a panel), so that they stay in the first-level cache while all rows pass by.

Where masks cut the tiles, the loops end as soon as what is left does not count (`dot_extents`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.casts import float_to_float
from esper_triton.cpu.lowering.chunks import ZERO, Buffer, Index, Uniform
from esper_triton.cpu.lowering.control import advance_of
from esper_triton.cpu.lowering.dot_extents import seen, steps_that_count
from esper_triton.cpu.lowering.dot_pairs import add_pairs, interleaved, is_paired, paired_type
from esper_triton.cpu.lowering.layout import contiguous_axis
from esper_triton.cpu.lowering.memory import load_operands
from esper_triton.cpu.lowering.nest import Nest
from esper_triton.cpu.lowering.types import FLOAT8, FLOATS, I32, I64, Unlowered, memory_type, size_of
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.lowering.vmath import call, fma
from esper_triton.cpu.mlir import Operation, PointerType, ScalarType, TensorType, Type, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_LINE = 64  # bytes of a cache line
# The next step's operand is fetched during this one where that is long, or where it waits for memory anyway.
_LONG_STEP = 2**17  # multiplications
_FEW_USES = 16  # of each element in a step
_UNROLL = 2  # steps of K in one turn of the loop


def lower_dot(program: Program, op: Operation) -> None:
    """Batches (leading axes) are looped over; M, N and K may be any extents."""
    names = [str(v.type.element) for v in op.operands if isinstance(v.type, TensorType)]
    if names == ["i8", "i8", "i32"]:
        compute = ScalarType("i32")
    elif FLOATS.keys() >= set(names):
        compute = ScalarType("f64" if "f64" in names else "f32")
    else:
        raise Unlowered(f"operands {names[0]} and {names[1]} with accumulator {names[2]}")
    accumulator = op.operands[2]
    shape = _type(accumulator).shape
    width = min(shape[-1], program.lanes * 4 // size_of(compute))
    paired = paired_type(names[0], names[1], compute, width, _type(op.operands[0]).shape[-1])
    element = paired or compute
    limits = _limits(program, op)
    upcoming = [tile for k in (0, 1) if (tile := _upcoming(program, op, k)) is not None]
    # Pairs of the left operand are to lie side by side.
    turned = paired is None and _look_through_transposition(program, op, 0, element)
    _widen(op, 0, element)
    left = _Operand(program.materialise(op.operands[0]), turned)
    # Only now, since the left operand may be made of what the right one shows, and have put it into memory.
    turned = _look_through_transposition(program, op, 1, element)
    _widen(op, 1, element)
    right = _right_operand(program, op.operands[1], turned, width)
    if not program.is_light(accumulator):
        program.materialise(accumulator)

    nest = program.nest([accumulator], shape, op)
    output = program.new_buffer(op.result)
    if nest.is_keeping:  # for others, who may see all of it
        limits = _Limits(None, None, limits.steps)
    _emit(nest, op, left, right, output, compute, width, upcoming, limits)


@dataclass(frozen=True)
class _Limits:
    """Rows and columns of the result, and steps of K, that have to be computed (i64); None for all of them."""

    rows: LLVMValue | None
    columns: LLVMValue | None
    steps: LLVMValue | None


def _limits(program: Program, op: Operation) -> _Limits:
    rows, columns = seen(program, op)
    count, depth = steps_that_count(program, op), _type(op.operands[0]).shape[-1]
    if count is None or depth <= _UNROLL:
        return _Limits(rows, columns, None)
    # One step more than counts, unless all do: the first zero that is added makes +0 of -0, the rest change nothing.
    b = program.b
    whole = b.and_(b.add(count, ir.Constant(I64, _UNROLL)), ir.Constant(I64, -_UNROLL))
    return _Limits(rows, columns, c.minimum(b, whole, ir.Constant(I64, depth)))


@dataclass(frozen=True)
class _Operand:
    """A matrix, or a batch of them, in scratch memory: the buffer, and whether it shows the matrix transposed."""

    buffer: Buffer
    turned: bool

    @property
    def strides(self) -> tuple[int, int]:
        """Distance of rows and of columns in elements."""
        rows, columns = self.buffer.strides[-2:]
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def rows(self) -> int:
        return self.buffer.shape[-1 if self.turned else -2]

    def address(self, b: ir.IRBuilder, leading: tuple[Index, ...], row: Index, column: Index) -> LLVMValue:
        """Pointer to an element."""
        place = (column, row) if self.turned else (row, column)
        return self.buffer.address(b, (*leading, *place))[0]


@dataclass(frozen=True)
class _Upcoming:
    """An operand of the next step of a loop, which is fetched into the second-level cache during this one.

    Attributes:
        pointers: the addresses of this step's tile. advance: bytes (i64) to the next one's. inner: axis of neighbours.
    """

    pointers: Value
    advance: LLVMValue
    inner: int

    def fetch(self, nest: Nest, row: Index, column: Index, height: int, result: tuple[int, ...]) -> None:
        """A share of the tile, as large as that of the block at `row` and `column` in the result."""
        type_ = self.pointers.type
        assert isinstance(type_, TensorType)
        assert isinstance(type_.element, PointerType)
        outer = 1 - self.inner
        lines, length = type_.shape[outer], type_.shape[self.inner]
        step = max(1, _LINE // size_of(type_.element.pointee))
        piece = max(1, length * nest.width // result[1])
        first = _scaled(nest, row, lines, result[0])
        start = _scaled(nest, column, length, result[1])
        line = nest.open(-(-height * lines // result[0]))
        offset = nest.open(piece, step)
        place = [ZERO, ZERO]
        place[outer], place[self.inner] = _sum(nest, first, line), _sum(nest, start, offset)
        address = nest.chunk(self.pointers, tuple(place))
        assert isinstance(address, Uniform)
        pointer = nest.b.inttoptr(nest.b.add(address.value, self.advance), c.POINTER)
        hint = [ir.Constant(I32, number) for number in (0, 2, 1)]  # to read, in the second-level cache, data
        call(nest.b, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hint])
        nest.close()
        nest.close()


def _upcoming(program: Program, op: Operation, k: int) -> _Upcoming | None:
    """What is known of the tile that operand `k` will be in the loop's next step, where it is worth fetching."""
    source = op.operands[k].defining_op
    while source is not None and source.name in ("tt.trans", "arith.extf", "tt.fp_to_fp", "arith.extsi"):
        source = source.operands[0].defining_op
    if source is None or source.name != "tt.load" or source.block is not op.block or op.block is None:
        return None
    pointers = load_operands(source)[0]
    loop = op.block.region.parent
    if pointers not in program.shifted or pointers.block is not op.block or loop is None or loop.name != "scf.for":
        return None
    type_ = pointers.type
    assert isinstance(type_, TensorType)
    if len(type_.shape) != 2 or not program.is_cheap(pointers):
        return None
    uses = _type(op.result).shape[1 - k]
    if uses > _FEW_USES and uses * type_.size < _LONG_STEP:
        return None
    amount = advance_of(program, pointers, op.block.terminator.operands[pointers.index - 1])
    if amount is None:
        return None
    inner = contiguous_axis(program, pointers)
    return _Upcoming(pointers, amount, 1 if inner is None else inner)


def _scaled(nest: Nest, index: Index, extent: int, of: int) -> Index:
    """An index below `of` as one of `extent`, which is that times or divided by a power of two."""
    if isinstance(index.value, ir.Constant):
        return Index(ir.Constant(I64, index.value.constant * extent // of))
    wide = nest.b.mul(index.value, ir.Constant(I64, extent))
    return Index(nest.b.lshr(wide, ir.Constant(I64, of.bit_length() - 1)), level=len(nest.builders) - 1)


def _emit(
    nest: Nest,
    op: Operation,
    left: _Operand,
    right: _Operand,
    output: Buffer,
    compute: ScalarType,
    width: int,
    upcoming: list[_Upcoming],
    limits: _Limits,
) -> None:
    """The loops over batches, columns and rows, and in the innermost one a block of the result."""
    *batch, rows, columns = output.shape
    leading = tuple(nest.open(extent) for extent in batch)
    nest.width = width
    column = _open(nest, columns, width, limits.columns, lanes=columns > 1)
    line = right.address(nest.b, leading, ZERO, column)
    at_once = rows <= _FEW_USES  # masks may well leave on less than a block of them
    for tile in upcoming if at_once else ():
        tile.fetch(nest, ZERO, column, rows, output.shape)
    for start, stop, height in _heights(nest.program, rows, width * size_of(compute)):
        row = _open(nest, stop, height, limits.rows, start)
        places = [(*leading, _shifted(nest, row, k), column) for k in range(height)]
        sums = [_converted(nest.b, nest.vector(op.operands[2], at), _element(op.operands[2]), compute) for at in places]
        for at in places:
            nest.visit(at)
        for tile in upcoming if start == 0 and not at_once else ():  # the few rows that remain may be late
            tile.fetch(nest, row, column, height, output.shape)
        first = left.address(nest.b, leading, row, ZERO)
        for at, value in zip(places, _block(nest, left, right, first, line, sums, limits), strict=True):
            output.write(nest.b, at, c.as_chunk(_converted(nest.b, value, compute, output.element)), width)
        nest.close()
    for _ in range(len(leading) + 1):
        nest.close()


def _open(nest: Nest, stop: int, step: int, limit: LLVMValue | None, start: int = 0, lanes: bool = False) -> Index:
    """Begin a loop over `range(start, stop, step)` that ends at `limit` as well, unless it has one step only."""
    if limit is None or stop <= step:
        return nest.open(stop, step, start, lanes)
    end = c.minimum(nest.b, limit, ir.Constant(I64, stop))
    return nest.open_between(ir.Constant(I64, start), end, step, lanes)


def _block(
    nest: Nest,
    left: _Operand,
    right: _Operand,
    first: LLVMValue,
    line: LLVMValue,
    sums: list[LLVMValue],
    limits: _Limits,
) -> list[LLVMValue]:
    """`sums`, one row each, plus the product of the left rows from `first` on and the right columns at `line`."""
    depth = right.rows
    left_row, left_step = left.strides
    right_step = right.strides[0]
    element = left.buffer.element
    vector = sums[0].type
    elements = memory_type(element)
    if isinstance(vector, ir.VectorType):
        elements = ir.VectorType(elements, vector.count)

    def element_at(pointer: LLVMValue, offset: int) -> LLVMValue:
        return nest.b.gep(pointer, [ir.Constant(I64, offset)], source_etype=memory_type(element))

    def moved(pointer: LLVMValue, steps: LLVMValue, stride: int) -> LLVMValue:
        distance = nest.b.mul(steps, ir.Constant(I64, stride))
        return nest.b.gep(pointer, [distance], source_etype=memory_type(element))

    unroll = min(_UNROLL, depth)
    if limits.steps is None:
        at = nest.open(depth, unroll)
    else:
        at = nest.open_between(ZERO.value, limits.steps, unroll, may_be_empty=False)
    carried = depth > unroll
    totals: list[LLVMValue] = [nest.b.phi(vector) for _ in sums] if carried else list(sums)
    phis = totals
    here, there = moved(first, at.value, left_step), moved(line, at.value, right_step)
    lines = [
        nest.b.load(element_at(there, step * right_step), typ=elements, align=size_of(element))
        for step in range(unroll)
    ]
    if is_paired(element):
        pairs = interleaved(nest.b, *lines)
        factors = [
            nest.b.load(element_at(here, k * left_row), typ=I32, align=size_of(element)) for k in range(len(sums))
        ]
        totals = [add_pairs(nest.b, factor, pairs, total) for factor, total in zip(factors, totals, strict=True)]
    else:
        for step, values in enumerate(lines):
            at_step = [element_at(here, step * left_step + k * left_row) for k in range(len(sums))]
            factors = [c.load_scalar(nest.b, pointer, element) for pointer in at_step]
            totals = [_multiply_add(nest.b, f, values, total) for f, total in zip(factors, totals, strict=True)]
    nest.close(list(zip(phis, sums, totals, strict=True)) if carried else ())
    return totals


def _multiply_add(b: ir.IRBuilder, factor: LLVMValue, values: LLVMValue, total: LLVMValue) -> LLVMValue:
    if isinstance(values.type, ir.VectorType):
        factor = c.splat(b, factor, values.type.count)
    if isinstance(factor.type, ir.IntType) or isinstance(getattr(factor.type, "element", None), ir.IntType):
        return b.add(total, b.mul(factor, values))
    return fma(b, factor, values, total)


def _heights(program: Program, rows: int, line_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, rows at a time): as high as registers allow, and what is left in blocks that are not too flat.

    Of 16 registers 12 hold sums, which hides the latency of two FMA units; 32 registers (AVX-512) hold 24.
    """
    register = program.lanes * 2  # bytes: `lanes` are two registers of 32-bit elements
    registers = 24 if register >= 64 else 12
    highest = registers // max(1, -(-line_bytes // register))
    whole, rest = divmod(rows, highest)
    if not whole:
        yield 0, rows, rows
        return
    if 0 < rest < highest // 2:  # share the rest with one of the whole blocks
        whole, rest = whole - 1, rest + highest
    end = whole * highest
    if whole:
        yield 0, end, highest
    if rest:
        yield end, rows, rest // 2 if rest > highest else rest


def _shifted(nest: Nest, index: Index, offset: int) -> Index:
    return _sum(nest, index, Index(ir.Constant(I64, offset)))


def _sum(nest: Nest, first: Index, second: Index) -> Index:
    if isinstance(first.value, ir.Constant) and isinstance(second.value, ir.Constant):
        return Index(ir.Constant(I64, first.value.constant + second.value.constant))
    return Index(nest.b.add(first.value, second.value), level=len(nest.builders) - 1)


def _type(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type


def _element(value: Value) -> Type:
    return _type(value).element


def _converted(b: ir.IRBuilder, value: LLVMValue, source: Type, target: Type) -> LLVMValue:
    return value if source == target else float_to_float(b, value, str(source), str(target))


# ------------------------------------------------------------------------------------------------------------- operands


def _right_operand(program: Program, value: Value, turned: bool, width: int) -> _Operand:
    """The right operand with the elements of a row side by side."""
    assert isinstance(value.type, TensorType)
    if turned:
        return _Operand(program.materialise(value, inner=len(value.type.shape) - 2), turned)
    panel = max(width, program.lanes)
    return _Operand(program.materialise(value, panel=panel if value.type.shape[-1] > panel else None), turned)


def _look_through_transposition(program: Program, op: Operation, k: int, compute: ScalarType) -> bool:
    """Replaces operand `k`, where it is a transposition of the last two axes, by what is transposed.

    Not a right operand whose rows would not be in one piece.
    """
    value = op.operands[k]
    turn = value.defining_op
    if turn is None or turn.name != "tt.trans" or value in program.buffers:
        return False
    order = list(turn.attributes["order"])
    if order != [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
        return False
    source = turn.operands[0]
    made = program.buffers.get(source)
    if k == 1 and made is not None and made.element == compute and made.strides[-2] != 1:
        return False
    _replace(op, k, source)
    if not value.users:
        source.users.remove(turn)
    return True


def _widen(op: Operation, k: int, compute: ScalarType) -> None:
    """Puts a conversion in front of operand `k` if it is not of type `compute`."""
    value = op.operands[k]
    element = _element(value)
    if element == compute:
        return
    assert isinstance(value.type, TensorType)
    name = "arith.extsi" if compute.is_integer else "tt.fp_to_fp" if str(element) in FLOAT8 else "arith.extf"
    wide = Value(f"{value.name}.wide", TensorType(value.type.shape, compute))
    conversion = Operation(name, [value], [wide], {}, [], [], [], op.location, op.block)
    wide.defining_op = conversion
    value.users.append(conversion)
    _replace(op, k, wide)


def _replace(op: Operation, k: int, value: Value) -> None:
    old = op.operands[k]
    op.operands[k] = value
    if op not in value.users:
        value.users.append(op)
    if old not in op.operands:
        old.users.remove(op)
