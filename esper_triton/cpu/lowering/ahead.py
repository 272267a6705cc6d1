"""Tiles of what comes next, a loop's step or a program, fetched while this one works on what it has in the cache.

What passes over a tile several times reads memory in its first pass only; in the others memory would have nothing to
do. So passes ask for the tile that comes next, each for its share.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import ir

from esper_triton.cpu.lowering import chunks as c
from esper_triton.cpu.lowering.chunks import ZERO, Affine, Index, Uniform
from esper_triton.cpu.lowering.elementwise import I32, I64, size_of
from esper_triton.cpu.lowering.growth import NOTHING, growth
from esper_triton.cpu.lowering.layout import contiguous_axis
from esper_triton.cpu.lowering.memory import load_operands
from esper_triton.cpu.lowering.nest import Nest, is_tile
from esper_triton.cpu.lowering.vmath import Value as LLVMValue
from esper_triton.cpu.lowering.vmath import call
from esper_triton.cpu.mlir import Block, Operation, PointerType, TensorType, Value

if TYPE_CHECKING:
    from esper_triton.cpu.lowering.program import Program

_LINE = 64  # bytes of a cache line
_FEW = 16384  # bytes of a tile up to which it goes to the first-level cache
_USERS = ("tt.reduce", "tt.store")  # whose nests fetch; and those of what is carried around a loop
# Of `llvm.prefetch`: to read, how near, data.
_NEAR, _FARTHER = ([ir.Constant(I32, number) for number in (0, locality, 1)] for locality in (3, 2))


@dataclass(frozen=True)
class Upcoming:
    """A tile of pointers to neighbours along axis `inner`, and by how many bytes (i64) the next such tile's are further
    on."""

    pointers: Value
    inner: int
    advance: LLVMValue

    def fetch(self, nest: Nest, index: tuple[Index, ...]) -> None:
        """Ask for a share of the next tile, as large as that of the chunk at `index` in the nest."""
        type_ = self.pointers.type
        assert isinstance(type_, TensorType)
        assert isinstance(type_.element, PointerType)
        size = size_of(type_.element.pointee)
        if type_.shape == nest.shape and self.inner == nest.axis:
            chunk = nest.chunk(self.pointers, index)
            assert isinstance(chunk, Affine)
            address = chunk.base
        else:
            scalar = nest.chunk(self.pointers, self._share(nest, index, type_.shape))
            assert isinstance(scalar, Uniform)
            address = scalar.value
        first = nest.b.add(address, self.advance)
        for distance in range(0, nest.width * size, _LINE):
            place = nest.b.inttoptr(nest.b.add(first, ir.Constant(I64, distance)), c.POINTER)
            hint = _NEAR if type_.size * size <= _FEW else _FARTHER
            call(nest.b, "llvm.prefetch.p0", ir.VoidType(), [place, *hint])

    def _share(self, nest: Nest, index: tuple[Index, ...], shape: tuple[int, ...]) -> tuple[Index, ...]:
        """The element of a tile of another order that has the number, counted row by row, which the first element of
        the nest's chunk has there."""
        b, number = nest.b, ZERO.value
        for extent, at in zip(nest.shape, index, strict=True):
            number = b.add(b.mul(number, ir.Constant(I64, extent)), at.value)
        place = [ZERO] * len(shape)
        for axis in (self.inner, *(k for k in reversed(range(len(shape))) if k != self.inner)):
            extent = shape[axis]
            position = b.and_(number, ir.Constant(I64, extent - 1))
            place[axis] = Index(position, level=len(nest.builders) - 1)
            number = b.lshr(number, ir.Constant(I64, extent.bit_length() - 1))
        return tuple(place)


class Ahead:
    """What comes next of a function's tiles, and has not been asked for yet."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._asked: set[Operation] = set()

    def share(self, user: Operation, nest: Nest, done: Container[Operation]) -> list[Upcoming]:
        """What a nest for `user` is to fetch, when the operations `done` are those of nests so far, of this one too."""
        block = user.block
        if self._program.terse or nest.axis is None or block is None or not _comes_again(block):
            return []
        if user.name not in _USERS and user is not block.terminator:
            return []
        # Nests share tiles to be loaded and to be stored. One that loads its tile itself, and is the last, is busy.
        stores, nests = self._rest(user, block)
        tiles: dict[Operation, Upcoming] = {}
        for op in block.operations:
            if op.name == "tt.load" and op in done and op not in self._asked and (nests > 1 or op not in nest.accesses):
                tile = self._upcoming(load_operands(op)[0], nest, block)
                if tile is not None:
                    tiles[op] = tile
        share = -(-(len(tiles) + stores) // nests)
        if nests > 1 and user.name == "tt.store":
            share -= 1
        chosen = list(tiles)[:share]
        self._asked.update(chosen)
        return [tiles[op] for op in chosen]

    def _upcoming(self, pointers: Value, nest: Nest, block: Block) -> Upcoming | None:
        type_ = pointers.type
        if not isinstance(type_, TensorType) or not self._program.is_cheap(pointers):
            return None
        inner = contiguous_axis(self._program, pointers)
        if inner is None or type_.size != math.prod(nest.shape) or type_.shape[inner] < nest.width:
            return None
        advance = growth(self._program, pointers, block)
        return None if advance is None or advance is NOTHING else Upcoming(pointers, inner, advance)

    def _rest(self, user: Operation, block: Block) -> tuple[int, int]:
        """How many stores and how many nests there are in a step from `user` on."""
        if user is block.terminator:
            return 0, 1
        later = block.operations[block.operations.index(user) :]
        stores = sum(op.name == "tt.store" and is_tile(op.operands[0]) for op in later)
        carried = any(self._program.is_lazy(value) for value in block.terminator.operands)
        return stores, stores + (user.name != "tt.store") + carried


def _comes_again(block: Block) -> bool:
    """Whether it is the body of a loop or of a kernel."""
    around = block.region.parent
    if around is None or around.name != "tt.func":
        return around is not None and around.name == "scf.for"
    return around.attributes.get("sym_visibility") != "private" and block is around.regions[0].blocks[0]
