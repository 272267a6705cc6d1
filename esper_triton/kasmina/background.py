"""Loads that run beside the training thread, one at a time."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from esper_triton.contracts.errors import LoadDeadlineExceeded, LoadLost

__all__ = ["Load", "start"]

# A load holds the interpreter for most of a millisecond, and a training thread waits meanwhile. So a rest follows each,
# of this many times what it took of a processor, where the process has anything else to do.
_REST = 39
_LONGEST_REST_S = 0.05
# The process ends, and forks, without waiting any longer for a load that hangs.
_EXIT_WAIT_S = 5.0
_FORK_WAIT_S = 1.0


class Load(Protocol):
    """What runs. None of it is called with a lock held, but `lose`, which must take none."""

    @property
    def who(self) -> str:
        """For messages."""

    @property
    def seconds(self) -> float:
        """How long it may run."""

    def attempt(self) -> None:
        """The load, on a thread of its own. May hang."""

    def fail(self, error: BaseException) -> None:
        """It has no result, or a result that comes too late."""

    def lose(self) -> None:
        """This process was forked, and the load stayed with its parent."""


class _Pending:
    """A load between request and end. `over` is set once, by its end, its deadline or whoever gave it up, and guarded
    by the loader's lock."""

    def __init__(self, load: Load) -> None:
        self.load, self.over, self.spent_s = load, False, 0.0
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()


class _Loader:
    """A queue of loads, and a thread that serves it for as long as there are any.

    Each load has a thread of its own, so that the next one can go ahead at the deadline of one that hangs. They are
    daemon threads, or one that hangs would keep the process from ending. But a daemon thread that is inside of torch
    or LLVM while the interpreter is finalized ends the process with SIGABRT: CPython unwinds it through C++ frames that
    let nothing through. So before that no load begins any more, and one that runs is waited for.

    A fork waits for the load that runs, too, or the child would have locks that nobody gives back.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[_Pending] = deque()
        self._running: _Pending | None = None
        self._threads: list[threading.Thread] = []
        self._serving = False
        self._closed = False

    def start(self, load: Load) -> tuple[Future[None], Callable[[], None]]:
        """As the module's `start`."""
        pending = _Pending(load)
        with self._changed:
            closed = self._closed
            if not closed:
                self._waiting.append(pending)
                if not self._serving:
                    self._serving = True
                    self._begin("esper-loader", self._serve)
        if closed:
            self._drop(pending)
        return pending.future, lambda: self._give_up(pending)

    def _begin(self, name: str, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        thread.start()

    def _serve(self) -> None:
        while (pending := self._next()) is not None:
            before_s = time.process_time()
            with self._changed:
                self._begin("esper-load", self._run, pending)
                in_time = self._changed.wait_for(lambda p=pending: p.over, timeout=pending.load.seconds)  # type: ignore[misc]
                pending.over = True
                self._running = None
            if not in_time:
                load = pending.load
                load.fail(LoadDeadlineExceeded(f"{load.who}: no kernel after {load.seconds:g} s; it was culled"))
                pending.future.set_result(None)
            spent_s = pending.spent_s
            del pending  # with what it pins in the cache
            self._rest(spent_s, before_s)

    def _next(self) -> _Pending | None:
        """The load that is to begin; None where none is left, and this thread ends."""
        with self._changed:
            while self._waiting and not self._closed:
                pending = self._waiting.popleft()
                if not pending.over:
                    self._running = pending
                    return pending
            self._serving = False
            return None

    def _run(self, pending: _Pending) -> None:
        began_s = time.thread_time()
        try:
            pending.load.attempt()
        except BaseException as error:  # nobody above could do anything about it
            pending.load.fail(error)
        finally:
            with self._changed:
                ended_first, pending.over = not pending.over, True
                pending.spent_s = time.thread_time() - began_s
                self._changed.notify_all()
            if ended_first:
                pending.future.set_result(None)

    def _rest(self, spent_s: float, before_s: float) -> None:
        """Leaves the interpreter to others, for a moment and, where they have used that, for longer."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout=min(spent_s, _LONGEST_REST_S))
            if time.process_time() - before_s > 1.5 * spent_s:
                self._changed.wait_for(lambda: self._closed, timeout=min(_REST * spent_s, _LONGEST_REST_S))

    def _give_up(self, pending: _Pending) -> None:
        with self._changed:
            given_up, pending.over = not pending.over, True
            self._changed.notify_all()
        if given_up:
            pending.future.set_result(None)

    def _drop(self, pending: _Pending) -> None:
        pending.load.fail(LoadLost(f"{pending.load.who}: the process is ending, and no load begins any more"))
        self._give_up(pending)

    def close(self) -> None:
        """No load begins any more. Waits for the one that runs, and for every thread that does not hang."""
        until = time.monotonic() + _EXIT_WAIT_S
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            dropped, running = list(self._waiting), self._running
            self._waiting.clear()
        for pending in dropped:
            self._drop(pending)
        if running is not None:
            with self._changed:
                self._changed.wait_for(lambda: running.over, timeout=until - time.monotonic())
            self._give_up(running)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def before_fork(self) -> None:
        """Holds the lock, with no load running unless one hangs."""
        self._changed.acquire()
        self._changed.wait_for(lambda: self._running is None, timeout=_FORK_WAIT_S)

    def after_fork_in_parent(self) -> None:
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """The child's own loader, with nothing to do."""
        left = [*self._waiting, *([] if self._running is None else [self._running])]
        self.__init__()  # type: ignore[misc]
        for pending in left:
            pending.load.lose()


_loader = _Loader()
atexit.register(_loader.close)
os.register_at_fork(
    before=_loader.before_fork,
    after_in_parent=_loader.after_fork_in_parent,
    after_in_child=_loader.after_fork_in_child,
)


def start(load: Load) -> tuple[Future[None], Callable[[], None]]:
    """Runs `load` on another thread when those asked for before it have ended, and fails it when it has run for longer
    than it may.

    Returns a future without a value that is done when the load has ended or was given up, and what gives it up: it does
    not begin, or the next one begins beside it. Any thread may call it. While the interpreter ends the load fails at
    once. A fork leaves loads with the parent; a child can load again.
    """
    return _loader.start(load)
