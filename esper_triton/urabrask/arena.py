"""The memory that a sandbox shares with its judge: tensors among NaN, and the bytes that must not change."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_triton.urabrask.cell import STATUS_BYTES

__all__ = ["Arena", "Region", "Snapshot", "TooLarge", "changes", "equal_bytes", "poison"]

_FENCE_BYTES = 512  # before and after every tensor: a vector, or a row of a block, that goes too far ends in them
_POISON = 0xFF  # NaN in every format of floating-point numbers, -1 in integers
_F_ADD_SEALS, _SEALS = 1033, 0x2 | 0x4  # neither smaller nor larger: else a reader would be sent SIGBUS


class TooLarge(Exception):
    """Tensors of a call that do not fit."""


@dataclass(frozen=True)
class Region:
    """A tensor's place: [lead, width] with a row stride of its own (elements), or any contiguous shape."""

    name: str
    offset: int
    size_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, memory: Tensor, start: int = 0) -> Tensor:
        """The tensor in `memory`, uint8, which begins `start` bytes into the arena."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        at = self.offset - start
        flat = memory[at : at + self.size_bytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Snapshot:
    """The arena's bytes at one moment, which no cell can change any more."""

    memory: Tensor
    start: int

    def read(self, region: Region) -> Tensor:
        """A copy of a tensor as it was, contiguous."""
        return region.view(self.memory, self.start).clone(memory_format=torch.contiguous_format)


class Arena:
    """Memory shared with one cell. The tensors of a call are placed one after the other, each in a fence; `clear`
    begins the next call."""

    def __init__(self, size_bytes: int) -> None:
        """Only what is touched takes memory. Raises OSError."""
        self.size_bytes = STATUS_BYTES + size_bytes
        self.descriptor = os.memfd_create("esper-urabrask", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.size_bytes)
        fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self.descriptor, self.size_bytes)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._end = STATUS_BYTES
        self._buffers: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forgets what was placed."""
        self._end = STATUS_BYTES

    def place(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        row_stride: int | None = None,
        shift: int = 0,
    ) -> Region:
        """Room for a tensor, poisoned with what is around it.

        Args:
            row_stride: of a matrix, in elements; 0 for one row that counts for all. shift: elements beyond an address
                that is a multiple of 64 bytes.

        Raises TooLarge.
        """
        itemsize = dtype.itemsize
        stride = _contiguous(shape)
        if row_stride is not None and len(shape) == 2:
            stride = (row_stride, 1)
        elements = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        offset = -(-(self._end + _FENCE_BYTES) // 64) * 64 + shift * itemsize
        end = offset + elements * itemsize + _FENCE_BYTES
        if end > self.size_bytes:
            raise TooLarge(
                f"{name} {list(shape)} takes {elements * itemsize} bytes, and with what else a call has, that is more "
                f"than the {self.size_bytes - STATUS_BYTES} bytes that there are"
            )
        poison(self.memory[self._end : end])
        self._end = end
        return Region(name, offset, elements * itemsize, tuple(shape), stride, dtype)

    def write(self, region: Region, value: Tensor) -> None:
        """Fills a tensor. Of one whose rows share their memory, with the first row."""
        view = region.view(self.memory)
        if region.shape and 0 in region.stride and region.shape[0]:
            view[0].copy_(value[0])
        else:
            view.copy_(value)

    @property
    def used(self) -> Tensor:
        """The bytes of everything that was placed, fences too."""
        return self.memory[STATUS_BYTES : self._end]

    def snapshot(self, buffer: str | None = None) -> Snapshot:
        """A copy of everything that was placed, fences too. With the name of a `buffer` it is good until the next one
        with that name, and takes no new memory, whose first touch takes longer than the copy."""
        if buffer is None:
            return Snapshot(self.used.clone(), STATUS_BYTES)
        used = self.used
        kept = self._buffers.get(buffer)
        if kept is None or len(kept) < len(used):
            kept = self._buffers[buffer] = torch.empty(len(used), dtype=torch.uint8)
        return Snapshot(kept[: len(used)].copy_(used), STATUS_BYTES)

    def forbidden_call(self) -> int | None:
        """The number of the system call that ended the cell, if one did."""
        found = int.from_bytes(self._map[:4], "little")
        return found - 1 if found else None

    def close(self) -> None:
        """Gives the memory back as far as no tensor of it is left."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def poison(memory: Tensor) -> None:
    """Makes every number in it NaN, or -1."""
    memory.fill_(_POISON)


def changes(before: Snapshot, after: Snapshot, regions: Iterable[Region], writable: Iterable[Region]) -> str | None:
    """What was written that was not to be: None where nothing but the elements of `writable` has changed."""
    count, first, at = 0, 0, before.start
    # Between the results, which are in the order of their places, and from the last one to the end.
    ordered = sorted((region for region in writable if region.size_bytes), key=lambda region: region.offset)
    for region in (*ordered, None):
        end = before.start + len(before.memory) if region is None else region.offset
        pieces = [(at, before.memory[at - before.start : end - before.start])]
        if region is not None:
            at = region.offset + region.size_bytes
            if region.stride != _contiguous(region.shape):  # what lies between its rows is nobody's
                between = before.memory[end - before.start : at - before.start].clone()
                region.view(between, end).copy_(region.view(after.memory, after.start))
                pieces.append((end, between))
        for start, expected in pieces:
            found = after.memory[start - after.start : start - after.start + len(expected)]
            if not equal_bytes(expected, found):
                different = (expected != found).nonzero()[:, 0]
                first = first if count else int(different[0]) + start
                count += len(different)
    if not count:
        return None
    return f"{count} bytes that are no result's were written, the first {_place(first, list(regions))}"


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Of two flat tensors of uint8: eight bytes at a time, where they lie alike, since single ones take four times as
    long."""
    if len(a) != len(b) or (a.storage_offset() - b.storage_offset()) % 8:
        return torch.equal(a, b)
    start = min(len(a), -a.storage_offset() % 8)
    stop = start + (len(a) - start) // 8 * 8
    pieces = ((a[:start], b[:start]), (a[stop:], b[stop:]))
    return all(torch.equal(one, other) for one, other in pieces) and torch.equal(
        a[start:stop].view(torch.int64), b[start:stop].view(torch.int64)
    )


def _place(at: int, regions: Sequence[Region]) -> str:
    for region in regions:
        if region.offset <= at < region.offset + region.size_bytes:
            element = (at - region.offset) // region.dtype.itemsize
            if len(region.shape) == 2 and region.stride[0] > region.shape[1]:
                row, column = divmod(element, region.stride[0])
                if column >= region.shape[1]:
                    return f"between rows {row} and {row + 1} of {region.name}"
            return f"in {region.name}, element {element}"
    nearest = min(regions, key=lambda r: min(abs(at - r.offset), abs(at - r.offset - r.size_bytes)))
    if at < nearest.offset:
        return f"{nearest.offset - at} bytes before {nearest.name}"
    return f"{at - nearest.offset - nearest.size_bytes} bytes after the end of {nearest.name}"


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
