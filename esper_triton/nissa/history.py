"""What values of many seeds were over time, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["History"]

Values = NDArray[np.float32]


class History:
    """Rows of values, one row a moment, from the first that was added until now.

    When it is full every second row is given up and from then on half as many are kept, so that it always covers the
    whole time, evenly.

    Args:
        width: values in a row. rows: at most kept; an even number.
    """

    def __init__(self, width: int, rows: int = 240) -> None:
        if rows < 2 or rows % 2:
            raise ValueError(f"rows must be an even number from 2 on, found {rows}")
        self._rows = rows
        self._times = np.zeros(rows, dtype=np.float64)
        self._values = np.zeros((rows, width), dtype=np.float32)
        self._length = 0
        self._every = 1  # of the rows that are added, one of so many is kept
        self._added = 0

    def __len__(self) -> int:
        return self._length

    def add(self, at: float, values: Values) -> None:
        """Adds a row; `at` in seconds since 1970."""
        self._added += 1
        if (self._added - 1) % self._every:
            return
        if self._length == self._rows:
            half = self._rows // 2
            self._times[:half], self._values[:half] = self._times[::2].copy(), self._values[::2].copy()
            self._length = half
            self._every *= 2
            if (self._added - 1) % self._every:
                return
        self._times[self._length], self._values[self._length] = at, values
        self._length += 1

    def column(self, index: int) -> tuple[list[float], list[float]]:
        """The moments, and one value of each row."""
        return self._times[: self._length].tolist(), self._values[: self._length, index].tolist()

    def rows(self) -> tuple[list[float], Values]:
        """The moments, and all rows."""
        return self._times[: self._length].tolist(), self._values[: self._length].copy()
