"""A sender's journal: messages that must not be lost while there is nowhere to send them."""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Journal", "Journaled"]

_SUFFIX = ".journal"


class Journaled(NamedTuple):
    """A message of the journal, and its number there."""

    number: int
    topic: str
    sender_id: str
    sequence: int
    content: bytes


class Journal:
    """Messages in order, in one SQLite file that only its owner opens.

    The file is made when the first message is written, and removed when it is closed empty. What `append` has returned
    from survives the end of the process in any way (not a failure of the power: nothing waits for the disk). While a
    process lives SQLite's own lock keeps others out, so `orphans` are the files of processes that have ended.

    Every method is for one thread. Raises sqlite3.Error where the disk does not do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self.messages = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return self.messages

    def append(self, messages: Iterable[tuple[str, str, int, bytes]]) -> None:
        """Writes messages of (topic, sender_id, sequence, content): all of them, or none if it raises."""
        connection = self._open()
        rows = list(messages)
        with connection:
            connection.executemany("INSERT INTO message (topic, sender, sequence, content) VALUES (?, ?, ?, ?)", rows)
        self.messages += len(rows)
        self.size_bytes += sum(len(row[3]) for row in rows)

    def oldest(self, limit: int) -> list[Journaled]:
        """At most `limit` messages, the oldest first."""
        if not self.messages:
            return []
        found = self._open().execute(
            "SELECT number, topic, sender, sequence, content FROM message ORDER BY number LIMIT ?", (limit,)
        )
        return [Journaled(*row) for row in found]

    def forget(self, sent: list[Journaled]) -> None:
        """Removes what `oldest` has returned and has been sent since."""
        with self._open() as connection:
            connection.executemany("DELETE FROM message WHERE number = ?", [(row.number,) for row in sent])
        self.messages -= len(sent)
        self.size_bytes -= sum(len(row.content) for row in sent)

    def close(self) -> None:
        """Lets go of the file; removes it where it is empty."""
        if self._connection is None:
            return
        self._connection.close()
        self._connection = None
        if not self.messages:
            for suffix in ("", "-wal", "-shm", "-journal"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def abandon(self) -> None:
        """After a fork, in the child: the file is the parent's. The connection is never closed here, since SQLite would
        tidy up under the parent's hands."""
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=0.0, check_same_thread=False)
            try:
                # Exclusive: the lock is held until the connection ends, with the process if need be.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS message (number INTEGER PRIMARY KEY AUTOINCREMENT, "
                    "topic TEXT NOT NULL, sender TEXT NOT NULL, sequence INTEGER NOT NULL, content BLOB NOT NULL)"
                )
                connection.commit()
                found = connection.execute("SELECT count(*), coalesce(sum(length(content)), 0) FROM message")
                self.messages, self.size_bytes = found.fetchone()
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    @classmethod
    def of(cls, folder: Path, sender_id: str) -> Journal:
        """A sender's own; its file may not be there yet."""
        return cls(folder / f"{sender_id}{_SUFFIX}")

    @classmethod
    def orphans(cls, folder: Path, *, besides: Path) -> Iterator[Journal]:
        """The journals in a folder whose owners have ended, opened, the oldest first; what is no journal is passed
        over."""
        with contextlib.suppress(OSError):
            for path in sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns):
                if path == besides:
                    continue
                journal = cls(path)
                with contextlib.suppress(sqlite3.Error):  # its owner lives
                    journal._open()
                    yield journal
