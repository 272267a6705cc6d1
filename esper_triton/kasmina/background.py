"""Loads that run beside the training thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["start"]

_slots = threading.Semaphore(4)
# A load holds the interpreter for most of a millisecond, and the training thread waits meanwhile. So a slot rests after
# a load for this many times the time that it took of a processor: four slots take a twentieth of the interpreter. Not
# where so many wait that they would miss their deadlines.
_REST = 79
_LONGEST_REST_S = 0.2
_MANY = 200
_counting = threading.Lock()
_counts = {"waiting": 0}  # loads that have been asked for and have not ended


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

    Returns a future that is done when the work is, and what gives the load up: its slot goes to another. The slot rests
    after the work, for the training thread's sake. A daemon thread: a load that hangs does not keep the process from
    ending.
    """
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    slot = _Slot()

    def run() -> None:
        spent_s = 0.0
        try:
            if slot.take():
                began = time.thread_time()
                work()
                spent_s = time.thread_time() - began
        finally:
            future.set_result(None)
            with _counting:
                _counts["waiting"] -= 1
                few = _counts["waiting"] < _MANY
            if few:
                time.sleep(min(_REST * spent_s, _LONGEST_REST_S))
            slot.give_back()

    with _counting:
        _counts["waiting"] += 1

    threading.Thread(target=run, name="esper-load", daemon=True).start()
    return future, slot.give_back
