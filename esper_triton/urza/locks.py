"""Locks that end with their holder: flock on a descriptor that a forked child does not keep."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import weakref

__all__ = ["HeldLock"]

_held: weakref.WeakSet[HeldLock] = weakref.WeakSet()
_registering = threading.Lock()


class HeldLock:
    """A flock on an open descriptor, which it owns.

    The kernel drops the lock when the last copy of the descriptor is closed, so one that a process holds goes with it,
    however it ends. A child forked meanwhile has a copy and would keep the lock of a dead parent: it closes it at once.
    """

    def __init__(self, descriptor: int, *, shared: bool = False, wait: bool = True) -> None:
        """Takes the lock and owns `descriptor`. Raises BlockingIOError where another has it and `wait` is False."""
        self._descriptor: int | None = descriptor
        try:
            operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, operation if wait else operation | fcntl.LOCK_NB)
        except BaseException:
            self._descriptor = None
            os.close(descriptor)
            raise
        with _registering:
            _held.add(self)

    @property
    def descriptor(self) -> int | None:
        """Open while the lock is held; None after `release`, and in a forked child."""
        return self._descriptor

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # not by closing alone: a child may have forked in between
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # the parent's copy keeps the lock


def _after_fork_in_child() -> None:
    global _registering
    _registering = threading.Lock()
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
