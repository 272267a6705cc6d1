"""Loads that run beside the training thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["start"]

# So few at once that a hundred loads do not take the interpreter from the training thread.
_slots = threading.Semaphore(4)


class _Slot:
    """One of the slots, given back once, by the load's end or by whoever gave it up: a load that hangs for ever must
    not keep others waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        self._over = False

    def take(self) -> bool:
        """Waits for a slot. False where the load has been given up meanwhile."""
        _slots.acquire()
        with self._lock:
            self._held = not self._over
            if self._held:
                return True
        _slots.release()
        return False

    def give_back(self) -> None:
        with self._lock:
            self._over = True
            if not self._held:
                return
            self._held = False
        _slots.release()


def start(work: Callable[[], None]) -> tuple[Future[None], Callable[[], None]]:
    """Runs `work`, which raises no Exception, on a thread of its own, as soon as one of four slots is free.

    Returns a future that is done when the work is, and what gives the load up: its slot goes to another. A daemon
    thread: a load that hangs does not keep the process from ending.
    """
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    slot = _Slot()

    def run() -> None:
        try:
            if slot.take():
                work()
        finally:
            slot.give_back()
            future.set_result(None)

    threading.Thread(target=run, name="esper-load", daemon=True).start()
    return future, slot.give_back
