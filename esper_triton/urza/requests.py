"""What is kept of requests beside the artifacts: what each was built as."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from esper_triton.contracts.manifest import ARTIFACT_ID
from esper_triton.urza.directory import Damage, Directory

__all__ = ["recall", "remember", "stale"]

_LIMIT_BYTES = 1 << 20
_TOUCH_AFTER_S = 86400.0
_KEPT_S = 30 * 86400.0
_NAME = re.compile(r"[0-9a-f]{64}")
_NAMED = re.compile(ARTIFACT_ID.pattern.strip("^$").encode())


def recall(directory: Directory, request: str) -> bytes | None:
    """What was remembered of a request (hex SHA-256); None where that is nothing, or damaged. Raises
    StoreUnavailable."""
    try:
        return directory.read(_place(request), "request", limit_bytes=_LIMIT_BYTES, touch_after_s=_TOUCH_AFTER_S)
    except (FileNotFoundError, Damage):
        return None


def remember(directory: Directory, request: str, content: bytes) -> None:
    """Keeps `content`, in place of what was kept before. Raises StoreUnavailable."""
    if len(content) > _LIMIT_BYTES:
        raise ValueError(f"request {request}: {len(content)} bytes to remember; at most {_LIMIT_BYTES} are allowed")
    with directory.lock():
        directory.write(_place(request), content)


def stale(directory: Directory, is_here: Callable[[str], bool]) -> dict[str, int]:
    """Requests that nobody has asked for or remembered for 30 days, and that name no artifact of which `is_here` says
    that it is there; the size in bytes of what is kept of each. Raises StoreUnavailable.

    What one names can be built again in the same way, so it outlives its artifact for a while. A builder that has
    recalled one just now has no artifact to find: it will commit one, and remember the request again. Inside the lock,
    that is after whatever is removed.
    """
    found = {}
    for name, stat in directory.sizes("requests").items():
        if not _NAME.fullmatch(name) or time.time() - stat.st_mtime < _KEPT_S:
            continue
        try:
            content = directory.read(_place(name), "request", limit_bytes=_LIMIT_BYTES)
        except (FileNotFoundError, Damage):
            content = b""
        if not any(is_here(one.decode()) for one in _NAMED.findall(content)):
            found[name] = stat.st_size
    return found


def _place(request: str) -> tuple[str, str]:
    if not _NAME.fullmatch(request):
        raise ValueError(f"{request!r} is not a SHA-256 of 64 hex digits")
    return "requests", request
