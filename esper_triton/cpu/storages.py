"""What a launch tells a kernel that was compiled with the sanitizer: which memory its pointer arguments may reach.

The table is an array of int64: the number of entries; the mark of the grid's first program; then for each run-time
argument in order four words: `BASE`, the address where its storage begins; `SIZE`, its bytes; `SHADOW`, the address of
one uint32 for each of its elements, or 0 for none; `SHIFT`, the binary logarithm of what a shadow takes for an
element's bytes. A shadow holds the mark of the program that wrote the element: that of the first program and onwards in
the grid's order, and anything less where none of this launch has written. The argument of a pointer of which no more
than the number is known, such as a Python integer, may reach everything.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["BASE", "ENTRY_WORDS", "FIRST_MARK", "HEADER_WORDS", "SHADOW", "SHIFT", "SIZE", "UNLIMITED", "StorageTable"]

HEADER_WORDS = 2
FIRST_MARK = 1
ENTRY_WORDS = 4
BASE, SIZE, SHADOW, SHIFT = range(4)
UNLIMITED = 2**63 - 1
_SPARE_BYTES = 256 * 2**20


class StorageTable:
    """The table for one launch. Keeps the shadows alive, not the storages.

    Attributes:
        address: of the table.
    """

    def __init__(self, arguments: Iterable[tuple[str, Any]], *, programs: int, race: bool = False) -> None:
        """`arguments`: type and value of each run-time argument, as the user gave it. `race`: with shadows.

        Raises:
            OSError: no memory for the shadows.
        """
        known = [(type, *_storage(value)) if type.startswith("*") else (type, 0, 0) for type, value in arguments]
        shifts: dict[int, int] = {}
        for type, base, _ in known:  # tensors of several types may share a storage
            shifts[base] = min(shifts.get(base, 3), _shift(type))
        self._shadows: dict[int, Any] = {}
        first = 0
        if race:
            sizes = {base: size for _, base, size in known if 0 < size < UNLIMITED}
            taken, first = _shadows.take([4 * ((size >> shifts[base]) + 1) for base, size in sizes.items()], programs)
            self._shadows = dict(zip(sizes, taken, strict=True))
        words: list[int] = []
        for _, base, size in known:
            shadow = self._shadows.get(base)
            words += [base, size, 0 if shadow is None else ctypes.addressof(shadow), shifts[base]]
        words = words or [0] * ENTRY_WORDS
        self._words = (ctypes.c_int64 * (HEADER_WORDS + len(words)))(len(words) // ENTRY_WORDS, first, *words)
        self.address = ctypes.addressof(self._words)

    def close(self) -> None:
        """The launch is over: its shadows may serve another."""
        _shadows.give_back(list(self._shadows.values()), self._words[FIRST_MARK])
        self._shadows = {}


class _Shadows:
    """Memory for shadows, kept from one launch to the next: to get and clear it takes longer than most kernels.

    No launch has marks that an earlier one had, so there is nothing to clear until all marks have been used up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[Any] = []
        self._next_mark = 1

    def take(self, sizes: Sequence[int], programs: int) -> tuple[list[Any], int]:
        """Arrays of at least so many bytes, all less than the mark that is returned, and so are none of `programs`
        marks from there on."""
        with self._lock:
            if self._next_mark + programs > 2**32:
                self._spare, self._next_mark = [], 1
            first = self._next_mark
            self._next_mark += programs
            return [self._one(size) for size in sizes], first

    def _one(self, size: int) -> Any:
        fitting = [array for array in self._spare if size <= len(array)]
        if not fitting:
            return (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))  # a page comes into being when it is marked
        best = min(fitting, key=len)
        self._spare = [array for array in self._spare if array is not best]
        return best

    def give_back(self, arrays: Sequence[Any], first: int) -> None:
        with self._lock:
            if first < self._next_mark:  # or marks have begun again meanwhile, and these are too large
                self._spare += arrays
            while sum(map(len, self._spare)) > _SPARE_BYTES:
                self._spare.pop(0)


_shadows = _Shadows()


def _storage(value: Any) -> tuple[int, int]:
    """Address and bytes of the storage behind an argument; none for None, everything where it is not known."""
    if value is None:
        return 0, 0
    storage = getattr(value, "untyped_storage", None)
    if storage is None:
        return 0, UNLIMITED
    untyped = storage()
    return untyped.data_ptr(), untyped.nbytes()


def _shift(type: str) -> int:
    """Binary logarithm of the bytes of an element, from a type string such as `"*fp32"`."""
    bits = re.search(r"[0-9]+", type)
    return max((int(bits[0]) if bits else 8) // 8, 1).bit_length() - 1
