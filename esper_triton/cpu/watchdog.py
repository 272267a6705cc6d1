"""Deadlines: a launch that runs too long is stopped from outside and becomes an exception.

A timer's thread sets the upper half of the status slot of the launch's frame. The kernel's loops look at that slot with
every step, and so does the loop over the programs.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from esper_triton.cpu.errors import LaunchError
from esper_triton.cpu.trap import FRAME_STATUS

__all__ = ["WATCHED", "deadline", "limit_s", "watch"]

_VARIABLE = "ESPER_TRITON_DEADLINE"
_limit_s: ContextVar[float | None] = ContextVar("deadline", default=None)
_count_lock = threading.Lock()
# How many deadlines are set in this process, in any thread: a launcher need not ask for `limit_s` where it is 0.
WATCHED = ctypes.c_int64(1 if os.environ.get(_VARIABLE) else 0)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Within it, a launch made by this thread that is not done after `seconds` is stopped and raises `KernelTimeout`.

    What the kernel's programs had written stays. The innermost deadline holds, and goes before the environment
    variable `ESPER_TRITON_DEADLINE` (seconds), which sets one for every launch of the process.

    Raises:
        ValueError: `seconds` is not a positive, finite number.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"deadline is {seconds!r} s, expected a positive number of seconds")
    token = _limit_s.set(float(seconds))
    with _count_lock:
        WATCHED.value += 1
    try:
        yield
    finally:
        _limit_s.reset(token)
        with _count_lock:
            WATCHED.value -= 1


def limit_s() -> float | None:
    """Seconds that a launch by this thread may take now, None for any.

    Raises:
        LaunchError: the environment variable is not a positive number.
    """
    seconds = _limit_s.get()
    text = os.environ.get(_VARIABLE)
    if seconds is None and text:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise LaunchError(f"{_VARIABLE} is {text!r}, expected a positive number of seconds")
    return seconds


@contextmanager
def watch(frame: Any, seconds: float) -> Iterator[None]:
    """Stop the launch that runs with `frame` (a ctypes array of its slots) once `seconds` have passed."""
    stop = ctypes.c_int32.from_buffer(frame, 8 * FRAME_STATUS + 4)
    lock = threading.Lock()  # a timer that cannot be cancelled any more must not stop the frame's next launch
    over = False

    def expire() -> None:
        with lock:
            if not over:
                stop.value = 1

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
            stop.value = 0  # it came too late if the kernel has not reported itself
