"""Leases: what live processes use, which no collection of garbage takes away."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import weakref
from collections.abc import Callable

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.urza.directory import Damage, Directory
from esper_triton.urza.locks import HeldLock

__all__ = ["Leases", "gate", "leased"]

_NAME = re.compile(r"[0-9]+\.[0-9a-f]{16}")
_LIMIT_BYTES = 16 << 20


def gate(directory: Directory, *, shared: bool) -> HeldLock:
    """Held by who takes a lease (shared) and by who removes what nobody leases (alone). Raises StoreUnavailable."""
    return directory.hold(("leases", "gate"), shared=shared)


class Leases:
    """The ids that one store object has loaded, a line each in a file of its own that it keeps locked.

    The lock, not the file, is the lease: it goes when the process ends, however it does, and the file is cleared away
    by the next collection. A forked child has none of its parent's.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._guard = threading.Lock()
        self._held: HeldLock | None = None
        self._end: Callable[[], object] = lambda: None
        self._parts: tuple[str, ...] = ()
        self._ids: set[str] = set()
        self._process = os.getpid()

    def __contains__(self, artifact_id: str) -> bool:
        return artifact_id in self._ids and self._is_held()

    def take(self, artifact_id: str) -> None:
        """Leases an artifact until `release` or the end of the process; again, it costs nothing.

        Waits for a collection that is removing files at this moment. Raises StoreUnavailable.
        """
        if artifact_id in self:
            return
        with self._own_guard(), gate(self._directory, shared=True):
            if not self._is_held():
                self._ids = set()
                self._parts = ("leases", f"{os.getpid()}.{secrets.token_hex(8)}")
                self._held = self._directory.hold(self._parts)
                # Also at the end of the process, where it comes to one: a file for each would add up.
                self._end = weakref.finalize(self, _end, self._directory, self._parts, self._held)
            assert self._held is not None
            assert self._held.descriptor is not None
            try:
                os.lseek(self._held.descriptor, 0, os.SEEK_END)
                os.write(self._held.descriptor, f"{artifact_id}\n".encode())
            except OSError as error:
                raise StoreUnavailable(
                    f"store {self._directory.root}: no lease on {artifact_id!r}: {error.strerror}"
                ) from error
            self._ids.add(artifact_id)

    def release(self) -> None:
        """Gives back every lease."""
        with self._own_guard():
            self._end()
            self._held, self._ids = None, set()

    def _own_guard(self) -> threading.Lock:
        """After a fork, a thread that is not here may have the parent's."""
        if self._process != os.getpid():
            self._guard, self._process = threading.Lock(), os.getpid()
        return self._guard

    def _is_held(self) -> bool:
        """False in a forked child, and where the store has been removed under it."""
        descriptor = None if self._held is None else self._held.descriptor
        return descriptor is not None and os.fstat(descriptor).st_nlink > 0


def _end(directory: Directory, parts: tuple[str, ...], held: HeldLock) -> None:
    if held.descriptor is None:
        return  # a forked child's: the file is its parent's
    with contextlib.suppress(StoreUnavailable):  # an unlocked file is no lease
        if directory.same_file(parts, held.descriptor):
            directory.remove(parts)
    held.release()


def leased(directory: Directory) -> set[str]:
    """Every id that a live process leases; clears the files of dead ones away. Only while `gate` is held alone."""
    found: set[str] = set()
    for name in directory.names("leases"):
        if not _NAME.fullmatch(name):
            continue
        parts = ("leases", name)
        try:
            directory.hold(parts, wait=False).release()
        except BlockingIOError:
            try:
                content = directory.read(parts, "lease", limit_bytes=_LIMIT_BYTES)
            except (FileNotFoundError, Damage):
                continue
            found.update(content.decode("ascii", "replace").split())
        else:
            directory.remove(parts)
    return found
