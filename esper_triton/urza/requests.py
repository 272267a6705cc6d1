"""What is kept of requests beside the artifacts: what each was built as, and whose turn it is to build it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.urza.directory import Damage, Directory

__all__ = ["in_turn", "recall", "remember"]

_LIMIT_BYTES = 1 << 20


def recall(directory: Directory, request: str) -> bytes | None:
    """What was remembered of a request (hex SHA-256); None where that is nothing, or damaged. Raises
    StoreUnavailable."""
    try:
        return directory.read(_place(request), "request", limit_bytes=_LIMIT_BYTES)
    except (FileNotFoundError, Damage):
        return None


def remember(directory: Directory, request: str, content: bytes) -> None:
    """Keeps `content`, in place of what was kept before. Raises StoreUnavailable."""
    if len(content) > _LIMIT_BYTES:
        raise ValueError(f"request {request}: {len(content)} bytes to remember; at most {_LIMIT_BYTES} are allowed")
    with directory.lock():
        directory.write(_place(request), content)


@contextlib.contextmanager
def in_turn(directory: Directory, name: str) -> Iterator[None]:
    """Held by one process and thread at a time, for each name. It ends with its holder. Raises StoreUnavailable."""
    with directory.lock():  # makes the root
        pass
    folder = directory.root / "building"
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreUnavailable(f"store {directory.root} cannot be locked: {error.strerror or error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _place(request: str) -> tuple[str, str]:
    if not re.fullmatch(r"[0-9a-f]{64}", request):
        raise ValueError(f"{request!r} is not a SHA-256 of 64 hex digits")
    return "requests", request
