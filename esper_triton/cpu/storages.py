"""What a launch tells a kernel that was compiled with the sanitizer: which memory its pointer arguments may reach.

The table is an array of int64: the number of entries, then for each run-time argument in order four words: `BASE`, the
address where its storage begins; `SIZE`, its bytes; `SHADOW`, the address of one int32 for each of its elements, zero
when the launch begins (which program has written there, counted from 1), or 0 for none; `SHIFT`, the binary logarithm
of what a shadow takes for an element's bytes. The argument of a pointer of which no more than the number is known, such
as a Python integer, may reach everything.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["BASE", "ENTRY_WORDS", "HEADER_WORDS", "SHADOW", "SHIFT", "SIZE", "UNLIMITED", "StorageTable"]

HEADER_WORDS = 1
ENTRY_WORDS = 4
BASE, SIZE, SHADOW, SHIFT = range(4)
UNLIMITED = 2**63 - 1
_LARGE_BYTES = 32 * 2**20


class StorageTable:
    """The table for one launch. Keeps the shadows alive, not the storages.

    Attributes:
        address: of the table.
    """

    def __init__(self, arguments: Iterable[tuple[str, Any]], *, race: bool = False) -> None:
        """`arguments`: type and value of each run-time argument, as the user gave it. `race`: with shadows.

        Raises:
            OSError: no memory for the shadows.
        """
        known = [(type, *_storage(value)) if type.startswith("*") else (type, 0, 0) for type, value in arguments]
        shifts: dict[int, int] = {}
        for type, base, _ in known:  # tensors of several types may share a storage
            shifts[base] = min(shifts.get(base, 3), _shift(type))
        words: list[int] = []
        self._shadows: dict[int, Any] = {}
        for _, base, size in known:
            if race and 0 < size < UNLIMITED and base not in self._shadows:
                self._shadows[base] = _zeros(4 * ((size >> shifts[base]) + 1))
            shadow = self._shadows.get(base)
            words += [base, size, 0 if shadow is None else ctypes.addressof(shadow), shifts[base]]
        words = words or [0] * ENTRY_WORDS
        self._words = (ctypes.c_int64 * (HEADER_WORDS + len(words)))(len(words) // ENTRY_WORDS, *words)
        self.address = ctypes.addressof(self._words)


def _zeros(count: int) -> Any:
    """So many zero bytes, as a ctypes array."""
    array = ctypes.c_char * count
    if count < _LARGE_BYTES:
        return array()
    return array.from_buffer(mmap.mmap(-1, count))  # of a tensor that is only read, no page ever comes into being


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
