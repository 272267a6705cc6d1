"""Objects that arrive piece by piece: nothing has its name before every byte of it is there and hashes to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.urza.directory import Directory, object_parts
from esper_triton.urza.locks import HeldLock

__all__ = ["Incoming", "sweep"]

_FOLDER = "incoming"
_NAME = re.compile(r"[0-9a-f]{32,64}")
_PIECE_BYTES = 1 << 20
_ABANDONED_S = 7 * 86400.0


class Incoming:
    """A file in `incoming/` that one process writes: it holds a lock on it, which ends with the process.

    A crash leaves a file that nobody has locked. One that is named by the digest that it is to have is gone on with by
    whoever opens it next; the others are removed by `sweep`. Use as a context: what was not finished stays if it has
    such a name, and else goes.
    """

    def __init__(self, directory: Directory, digest: str | None = None) -> None:
        """Waits for another who receives the same `digest`. Raises StoreUnavailable."""
        self._directory, self._resumable = directory, digest is not None
        self._parts = (_FOLDER, secrets.token_hex(16) if digest is None else digest)
        if not directory.root.exists():
            with directory.lock():  # makes it
                pass
        self._lock = self._held()
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        assert self._lock.descriptor is not None
        while piece := os.pread(self._lock.descriptor, _PIECE_BYTES, self.size_bytes):
            self._hash.update(piece)
            self.size_bytes += len(piece)

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock.descriptor is None:
            return
        if not self._resumable:
            with contextlib.suppress(StoreUnavailable):
                self._directory.remove(self._parts)
        self._lock.release()

    def append(self, piece: bytes) -> None:
        """Raises StoreUnavailable."""
        assert self._lock.descriptor is not None
        self._hash.update(piece)
        left = memoryview(piece)
        try:
            while left:
                written = os.pwrite(self._lock.descriptor, left, self.size_bytes)
                self.size_bytes += written
                left = left[written:]
        except OSError as error:
            raise StoreUnavailable(
                f"store {self._directory.root} cannot be written: {error.strerror or error}"
            ) from error

    def restart(self) -> None:
        """Forgets what has arrived."""
        assert self._lock.descriptor is not None
        os.ftruncate(self._lock.descriptor, 0)
        self._hash, self.size_bytes = hashlib.sha256(), 0

    @property
    def digest(self) -> str:
        """Hex SHA-256 of what has arrived so far."""
        return self._hash.hexdigest()

    def finish(self) -> str:
        """Puts the object in place under its digest, which this returns; inside the store's lock, which this takes.
        Raises StoreUnavailable."""
        assert self._lock.descriptor is not None
        try:
            digest = self.digest
            self._directory.sync_file(self._lock.descriptor, object_parts(digest))
        except OSError as error:
            raise StoreUnavailable(
                f"store {self._directory.root} cannot be written: {error.strerror or error}"
            ) from error
        with self._directory.lock():
            self._directory.move(self._parts, object_parts(digest))
        self._lock.release()
        return digest

    def _held(self) -> HeldLock:
        while True:
            lock = self._directory.hold(self._parts)
            if lock.descriptor is not None and self._directory.same_file(self._parts, lock.descriptor):
                return lock
            lock.release()  # the one before has finished it: its file is an object now


def sweep(directory: Directory, older_than_s: float = _ABANDONED_S) -> int:
    """Removes what nobody receives any more and was last written to longer ago, by default a week; returns how many
    bytes that were. Raises StoreUnavailable."""
    freed = 0
    for name, found in directory.sizes(_FOLDER).items():
        if not _NAME.fullmatch(name) or time.time() - found.st_mtime < older_than_s:
            continue
        parts = (_FOLDER, name)
        with contextlib.suppress(BlockingIOError), directory.hold(parts, wait=False) as lock:
            if lock.descriptor is not None and directory.same_file(parts, lock.descriptor):
                freed += found.st_size if directory.remove(parts) else 0
    return freed
