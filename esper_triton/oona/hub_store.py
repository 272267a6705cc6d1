"""What a hub keeps on the disk: messages that must not be lost, and who has still to read them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from esper_triton.oona.exchange import Exchange, Group, Place

__all__ = ["HubStore"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS message (place INTEGER PRIMARY KEY, topic TEXT NOT NULL, at REAL NOT NULL,
    content BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS sender (principal TEXT, sender TEXT, topic TEXT, sequence INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (principal, sender, topic)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reader (name TEXT, topic TEXT, private INTEGER NOT NULL, PRIMARY KEY (name, topic))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owed (name TEXT, place INTEGER, PRIMARY KEY (name, place)) WITHOUT ROWID;
"""


class HubStore:
    """An SQLite file of one hub: kept messages, senders' last sequence numbers, groups, and what each is owed.

    Writes within `transaction` are there together or not at all, once it has ended, whatever becomes of the process;
    for a failure of the power only with `durable`, which waits for the disk each time. Raises sqlite3.Error, among
    others where another hub has the file open.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.executescript(_SCHEMA)
        except BaseException:
            self._connection.close()
            raise

    def load(self, exchange: Exchange) -> None:
        """Fills a new exchange with what was there."""
        rows = self._connection.execute("SELECT place, topic, at, content FROM message ORDER BY place")
        topics = {}
        for offset, topic, at, content in rows:
            topics[offset] = topic
            exchange.restore(Place(topic, offset), content, len(content), at)
        for principal, sender, topic, sequence in self._connection.execute(
            "SELECT principal, sender, topic, sequence FROM sender"
        ):
            exchange.remember(principal, sender, topic, sequence)
        for name, topic, private in self._connection.execute("SELECT name, topic, private FROM reader"):
            exchange.join(name, [topic], private=bool(private))
        for name, offset in self._connection.execute("SELECT name, place FROM owed ORDER BY place"):
            if offset in topics and name in exchange.groups:
                exchange.owe(exchange.groups[name], Place(topics[offset], offset))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside, or nothing of it."""
        self._connection.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def add(
        self, place: Place, content: bytes, at: float, sender: tuple[str, str, int], groups: Iterable[Group]
    ) -> None:
        """A message of (principal, sender_id, sequence) that these groups have to read."""
        principal, sender_id, sequence = sender
        run = self._connection.execute
        run("INSERT INTO message VALUES (?, ?, ?, ?)", (place.offset, place.topic, at, content))
        run("INSERT OR REPLACE INTO sender VALUES (?, ?, ?, ?, ?)", (principal, sender_id, place.topic, sequence, at))
        self._connection.executemany(
            "INSERT INTO owed VALUES (?, ?)",
            [(group.name, place.offset) for group in groups if place.topic in group.ready],
        )

    def join(self, group: Group, owed: Iterable[int]) -> None:
        """A group as it is, with what it has to read from the start."""
        self._connection.executemany(
            "INSERT OR IGNORE INTO reader VALUES (?, ?, ?)", [(group.name, t, group.private) for t in group.topics]
        )
        self._connection.executemany("INSERT OR IGNORE INTO owed VALUES (?, ?)", [(group.name, o) for o in owed])

    def done(self, group: Group, offsets: Iterable[int]) -> None:
        """The group is done with these."""
        self._connection.executemany(
            "DELETE FROM owed WHERE name = ? AND place = ?", [(group.name, offset) for offset in offsets]
        )

    def drop(self, places: Iterable[Place], groups: Iterable[Group], senders_before: float) -> None:
        """These are no more, nor are senders that were last heard of before that time."""
        run = self._connection
        run.executemany("DELETE FROM message WHERE place = ?", [(place.offset,) for place in places])
        for group in groups:
            run.execute("DELETE FROM owed WHERE name = ?", (group.name,))
            run.execute("DELETE FROM reader WHERE name = ?", (group.name,))
        run.execute("DELETE FROM sender WHERE at < ?", (senders_before,))

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()
