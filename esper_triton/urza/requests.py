"""What is kept of requests beside the artifacts: what each was built as."""

from __future__ import annotations

import re

from esper_triton.urza.directory import Damage, Directory

__all__ = ["recall", "remember"]

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


def _place(request: str) -> tuple[str, str]:
    if not re.fullmatch(r"[0-9a-f]{64}", request):
        raise ValueError(f"{request!r} is not a SHA-256 of 64 hex digits")
    return "requests", request
