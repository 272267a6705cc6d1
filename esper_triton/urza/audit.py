"""The audit log: every change of status of a store in the order in which it was made, each line bound to the last."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from esper_triton.contracts.manifest import sha256
from esper_triton.contracts.record import SCHEMA_VERSION, AuditEntry
from esper_triton.urza.directory import Directory

__all__ = ["START", "AuditLog", "Tail", "parse_entry"]

START = "0" * 64
_PARTS = ("audit.log",)
_WHAT = "audit log"
_TAIL_BYTES = 1 << 14  # no line is as long


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The end of the log: where the next line goes (bytes), the SHA-256 of the last one, and what it says, None where
    there is none or it is not an entry."""

    offset: int
    digest: str
    entry: AuditEntry | None


class AuditLog:
    """`audit.log`: one JSON entry a line. Each has the SHA-256 of the line before it and is signed by whoever made the
    change, so that none can be changed, moved or taken out without every later one being signed again.

    A line is written before the change that it is of, and both inside the store's lock. A writer that dies in between
    leaves an entry for a change that never was; the next writer sees that in the last line, the only one that can be
    such, and says so in a line of its own. A line without its newline was never finished and counts as not there.

    What the log cannot show is that its last lines were cut off together with the records that they were of.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def size_bytes(self) -> int:
        """0 where there is none. Raises StoreUnavailable."""
        found = self._directory.stat(_PARTS)
        return 0 if found is None else found.st_size

    def tail(self) -> Tail:
        """Raises StoreUnavailable."""
        size = self.size_bytes()
        begin = max(0, size - _TAIL_BYTES)
        content = self._directory.read_from(_PARTS, begin, _WHAT)
        end = content.rfind(b"\n") + 1
        if end == 0:
            return Tail(offset=begin, digest=START, entry=None)
        line = content[content.rfind(b"\n", 0, end - 1) + 1 : end - 1]
        return Tail(offset=begin + end, digest=sha256(line), entry=parse_entry(line))

    def append(self, entry: AuditEntry, tail: Tail) -> Tail:
        """Writes the entry after `tail` and returns the new one. Only inside the lock. Raises StoreUnavailable."""
        line = entry.canonical_bytes()
        self._directory.append(_PARTS, line, tail.offset)
        return Tail(offset=tail.offset + len(line), digest=sha256(line[:-1]), entry=entry)

    def lines(self, offset: int = 0) -> Iterator[tuple[int, bytes]]:
        """Every whole line from an offset on, with the offset of what follows it. Raises StoreUnavailable."""
        content = self._directory.read_from(_PARTS, offset, _WHAT)
        begin = 0
        while (end := content.find(b"\n", begin)) >= 0:
            yield offset + end + 1, content[begin:end]
            begin = end + 1


def parse_entry(line: bytes) -> AuditEntry | None:
    """None where the line is not an entry of a schema that this release reads."""
    with contextlib.suppress(ValidationError):
        entry = AuditEntry.model_validate_json(line)
        if entry.schema_version.split(".")[0] == SCHEMA_VERSION.split(".")[0]:
            return entry
    return None


def now() -> str:
    """The time, UTC, to the microsecond, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
