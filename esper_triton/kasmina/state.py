"""The state of a layer's seeds as one block of device memory."""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["KasminaStateLayout", "pack_state"]

# In this order: widest first, so that each array is aligned to its elements with no padding between. The order is part
# of the memory layout that the CRC covers.
_FIELDS: tuple[tuple[str, torch.dtype], ...] = (
    ("active_kernel_id", torch.int64),
    ("alpha_blend", torch.float32),
    ("health_accumulator", torch.float32),
    ("last_update_epoch", torch.int32),
    ("exec_latency_us", torch.int32),
    ("error_count", torch.int16),
    ("lifecycle_states", torch.uint8),
    ("fallback_active", torch.bool),
)
_STRUCT_CODE = {
    torch.int64: "q",
    torch.float32: "f",
    torch.int32: "i",
    torch.int16: "h",
    torch.uint8: "B",
    torch.bool: "?",
}
_BYTES_PER_SEED = sum(dtype.itemsize for _, dtype in _FIELDS)


class KasminaStateLayout:
    """A contiguous structure of arrays over `num_seeds` seeds, 28 bytes a seed, no padding.

    Everything lies in `storage`, a one-dimensional uint8 tensor. uint8 is not a floating dtype, so `Module.half()` and
    its like leave the bytes alone, and `.to(device)` moves them in one copy. The arrays below are views of it, taken on
    access: a layout built over the moved storage sees the moved state.

    Args:
        num_seeds: at least 1.
        storage: an existing block of `required_bytes(num_seeds)` bytes; a new one, all zeros (every seed DORMANT), by
            default.
        device: where a new block is made.

    Raises ValueError for a storage that does not have the dtype or the size.
    """

    def __init__(
        self, num_seeds: int, *, storage: Tensor | None = None, device: torch.device | str | None = None
    ) -> None:
        if num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, found {num_seeds}")
        size = self.required_bytes(num_seeds)
        if storage is None:
            storage = torch.zeros(size, dtype=torch.uint8, device=device)
        if storage.dtype != torch.uint8 or storage.shape != (size,):
            found = f"{tuple(storage.shape)} of {storage.dtype}"
            raise ValueError(f"state of {num_seeds} seeds needs {size} uint8 elements, found {found}")
        self.num_seeds = num_seeds
        self.storage = storage

    @staticmethod
    def required_bytes(num_seeds: int) -> int:
        """Bytes of the whole block."""
        return num_seeds * _BYTES_PER_SEED

    def _view(self, field: str) -> Tensor:
        offset = 0
        for name, dtype in _FIELDS:
            size = self.num_seeds * dtype.itemsize
            if name == field:
                return self.storage[offset : offset + size].view(dtype)
            offset += size
        raise KeyError(field)

    @property
    def lifecycle_states(self) -> Tensor:
        """[num_seeds] uint8, values of SeedLifecycleState."""
        return self._view("lifecycle_states")

    @property
    def active_kernel_id(self) -> Tensor:
        """[num_seeds] int64: the first 8 bytes of the manifest's SHA-256, big-endian; 0 without a kernel."""
        return self._view("active_kernel_id")

    @property
    def alpha_blend(self) -> Tensor:
        """[num_seeds] float32 in [0, 1]."""
        return self._view("alpha_blend")

    @property
    def health_accumulator(self) -> Tensor:
        """[num_seeds] float32 in [0, 1]: moving average over steps of the share of a step's calls in which the seed
        failed; 0 is a seed that never did."""
        return self._view("health_accumulator")

    @property
    def last_update_epoch(self) -> Tensor:
        """[num_seeds] int32: epoch of the seed's last transition."""
        return self._view("last_update_epoch")

    @property
    def exec_latency_us(self) -> Tensor:
        """[num_seeds] int32: mean launch time in microseconds as of the last commit; 0 before the first measurement."""
        return self._view("exec_latency_us")

    @property
    def error_count(self) -> Tensor:
        """[num_seeds] int16, saturating."""
        return self._view("error_count")

    @property
    def fallback_active(self) -> Tensor:
        """[num_seeds] bool: the seed has a fault and its span is the host's."""
        return self._view("fallback_active")

    def alpha(self, seed: int) -> Tensor:
        """Alpha of one seed as a 0-d float32 view: the kernel reads it at its `data_ptr()`."""
        return self.alpha_blend[seed]

    def to(self, device: torch.device | str) -> KasminaStateLayout:
        """The same state on `device`; this layout itself where it is there already."""
        moved = self.storage.to(device)
        return self if moved is self.storage else KasminaStateLayout(self.num_seeds, storage=moved)

    def write(self, packed: bytes) -> None:
        """Replaces the whole block, in one copy, by what `pack_state` returned for as many seeds."""
        block = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        with torch.no_grad():
            if self.storage.is_cuda:
                # From pageable memory the copy would wait for the device. torch keeps a pinned block until its copy is
                # done, whoever has let go of it.
                self.storage.copy_(block.pin_memory(), non_blocking=True)
            else:
                self.storage.copy_(block)

    def differing_arrays(self, packed: bytes) -> tuple[str, ...]:
        """Names of the arrays whose bytes are not those of `packed`. Copies the block to the host."""
        found, names, offset = self.storage.cpu().numpy().tobytes(), [], 0
        for name, dtype in _FIELDS:
            end = offset + self.num_seeds * dtype.itemsize
            if found[offset:end] != packed[offset:end]:
                names.append(name)
            offset = end
        return tuple(names)

    def crc32(self) -> int:
        """CRC-32 of the arrays. Copies the block to the host, so it belongs at a boundary, never into forward."""
        return zlib.crc32(self.storage.cpu().numpy().tobytes())

    def __repr__(self) -> str:
        return f"KasminaStateLayout(num_seeds={self.num_seeds}, bytes={self.storage.numel()}, {self.storage.device})"


@functools.cache
def _struct(num_seeds: int) -> struct.Struct:
    return struct.Struct("=" + "".join(f"{num_seeds}{_STRUCT_CODE[dtype]}" for _, dtype in _FIELDS))


def pack_state(columns: Mapping[str, Iterable[int | float | bool]], num_seeds: int) -> bytes:
    """The block's bytes from one column of `num_seeds` values for each of its arrays, by name."""
    return _struct(num_seeds).pack(*itertools.chain.from_iterable(columns[name] for name, _ in _FIELDS))
