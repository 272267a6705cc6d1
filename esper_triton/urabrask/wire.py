"""Messages between a process and its sandbox: a length and that many bytes of JSON. Nothing is pickled."""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

__all__ = ["Garbage", "Silence", "TooLate", "receive", "send"]

_LENGTH = struct.Struct("<I")
_LIMIT_BYTES = 1 << 20


class Silence(Exception):
    """The other end has been closed."""


class TooLate(Exception):
    """No answer in time."""


class Garbage(Exception):
    """What came is not a message."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Raises OSError where nobody reads any more."""
    content = json.dumps(message, separators=(",", ":")).encode()
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[os.write(descriptor, left) :]


def receive(descriptor: int, deadline: float | None = None, *, limit_bytes: int = _LIMIT_BYTES) -> Any:
    """The next message, by `deadline` on the monotonic clock. Raises Silence, TooLate, Garbage."""
    (length,) = _LENGTH.unpack(_exactly(descriptor, _LENGTH.size, deadline))
    if length > limit_bytes:
        raise Garbage(f"a message of {length} bytes was announced, expected at most {limit_bytes}")
    content = _exactly(descriptor, length, deadline)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"{content[:40]!r} is not JSON") from error


def _exactly(descriptor: int, size: int, deadline: float | None) -> bytes:
    content = b""
    while len(content) < size:
        if deadline is not None:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TooLate
        part = os.read(descriptor, size - len(content))
        if not part:
            raise Silence
        content += part
    return content
