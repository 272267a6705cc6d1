"""What a program that ended early left in the frame of its launch, as an exception.

Machine code of Triton kernels cannot raise: a program whose check fails writes a report into the frame and returns, and
the launcher raises what the report says once all threads have stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from esper_triton.cpu.errors import (
    CPUBackendError,
    DeviceAssertionError,
    IntegerDivisionByZero,
    KernelTimeout,
    KernelTrap,
    LaunchError,
    OutOfBounds,
    WriteRace,
    out_of_bounds,
    write_race,
)

__all__ = ["FRAME_CLAIMS", "FRAME_REPORT", "FRAME_SLOTS", "FRAME_STATUS", "FRAME_STORAGES", "Status", "failure"]

# Slots of a frame: see `native`.
FRAME_STATUS = 6
FRAME_REPORT = 7  # program id x, y, z; address of the place's text; four numbers
FRAME_STORAGES = 15
FRAME_CLAIMS = 16
FRAME_SLOTS = 17


class Status(IntEnum):
    """How a launch stands, in the lower half of the frame's status slot. The upper half is set from outside (see
    `watchdog`) to make the kernel stop."""

    RUNNING = 0
    OUT_OF_MEMORY = 1
    TIMEOUT = 2  # a loop was told to stop, and has reported itself
    ASSERTION = 3
    DIVISION_BY_ZERO = 4
    OUT_OF_BOUNDS = 5
    RACE = 6


def failure(frame: Sequence[int], kernel: str) -> CPUBackendError:
    """The exception for a frame whose status is not RUNNING, to be made while the kernel's code is still loaded."""
    status = frame[FRAME_STATUS]
    if status == Status.OUT_OF_MEMORY:
        return LaunchError(f"kernel {kernel!r} ran out of memory for its scratch")
    x, y, z, place = frame[FRAME_REPORT : FRAME_REPORT + 4]
    if status not in _TRAPS or not place:  # not by code of this backend
        return LaunchError(f"kernel {kernel!r} ended with status {status}")
    line, file, message = ctypes.string_at(place).decode("utf-8", "replace").split("\n", 2)
    at: dict[str, Any] = {
        "kernel": kernel, "program": (x, y, z), "file": file or None, "line": int(line) if line else None,
    }  # fmt: skip
    if status in (Status.OUT_OF_BOUNDS, Status.RACE):
        access, argument = message.split("\n")
        offset, width, number = (word % 2**64 for word in frame[FRAME_REPORT + 4 : FRAME_REPORT + 7])
        if status == Status.OUT_OF_BOUNDS:
            return out_of_bounds(access, argument or None, offset, width, number, **at)
        return write_race(argument or None, offset, width, _position(number, frame), **at)
    return _TRAPS[status](message, **at)


def _position(linear: int, frame: Sequence[int]) -> tuple[int, int, int]:
    rest, x = divmod(linear, frame[1])
    return x, rest % frame[2], rest // frame[2]


_TRAPS: dict[int, type[KernelTrap]] = {
    Status.TIMEOUT: KernelTimeout,
    Status.ASSERTION: DeviceAssertionError,
    Status.DIVISION_BY_ZERO: IntegerDivisionByZero,
    Status.OUT_OF_BOUNDS: OutOfBounds,
    Status.RACE: WriteRace,
}
