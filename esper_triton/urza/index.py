"""The index: what artifacts there are, for questions. Made from the records and manifests, and never believed."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.query import Change, KernelMatch, KernelQuery
from esper_triton.contracts.record import AuditEntry, Record
from esper_triton.urza.audit import START, AuditLog, parse_entry
from esper_triton.urza.directory import Directory
from esper_triton.urza.filesystem import on_network

__all__ = ["Index", "Row"]

# With a write-ahead log this waits for the disk where the log is written back only, and loses at most the last answers.
SYNCHRONOUS = "NORMAL"
_VERSION = 1
_FLUSH_EVERY = 256
_BATCH = 500
_TABLES = f"""
CREATE TABLE artifacts (
  id TEXT PRIMARY KEY, digest TEXT NOT NULL, blueprint TEXT NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL,
  pipeline TEXT NOT NULL, dtype TEXT NOT NULL, dims TEXT NOT NULL, status TEXT NOT NULL, tags TEXT NOT NULL,
  unmeasured INTEGER NOT NULL, latency_us REAL, memory_bytes INTEGER, drift REAL, created_at TEXT NOT NULL,
  compile_seconds REAL NOT NULL, size_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_blueprint ON artifacts (blueprint, status);
CREATE INDEX by_target ON artifacts (target, status, unmeasured, latency_us, created_at DESC);
CREATE INDEX by_speed ON artifacts (status, unmeasured, latency_us, created_at DESC);
CREATE TABLE uses (id TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE named (id TEXT, lineage TEXT, PRIMARY KEY (id, lineage)) WITHOUT ROWID;
CREATE TABLE changes (
  sequence INTEGER PRIMARY KEY, at TEXT, what TEXT, artifact TEXT, source TEXT, target TEXT, role TEXT, manifest TEXT
);
CREATE INDEX by_artifact ON changes (artifact, sequence);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
"""
_COLUMNS = (
    "id digest blueprint name target pipeline dtype dims status tags unmeasured latency_us memory_bytes drift "
    "created_at compile_seconds size_bytes"
).split()
_INSERT = f"INSERT OR REPLACE INTO artifacts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_SELECT = (
    f"SELECT {', '.join('artifacts.' + column for column in _COLUMNS)}, coalesce(uses.count, 0) AS uses, "
    "(SELECT group_concat(lineage, ' ') FROM named WHERE named.id = artifacts.id) AS lineages "
    "FROM artifacts{by} LEFT JOIN uses ON uses.id = artifacts.id"
)

Row = tuple[Record, Manifest, int]
_T = TypeVar("_T")


class Index:
    """An SQLite file in `index/`, brought up to date by whoever asks: the audit log says what has changed since.

    It can be deleted at any time, and is made again from the records and manifests, as it is when it is damaged, of
    another release, or of a log that is not this one's beginning. Lost then are the counts of uses, which are nowhere
    else. Where it cannot be written, or on a network file system, which SQLite's shared memory does not cross, the
    index is in this process's memory.

    A row can lead to no wrong byte: what it names is loaded from the store and verified there.
    """

    def __init__(
        self,
        directory: Directory,
        log: AuditLog,
        read: Callable[[str], Row | None],
        head: Callable[[str], str | None],
        ids: Callable[[], list[str]],
        degraded: Callable[[str], None],
    ) -> None:
        """`read` gives an artifact's record, manifest and size in bytes, None where it is gone or cannot be read;
        `head` the SHA-256 of its record's bytes; `ids` those that there are; `degraded` is told why the index is in
        memory or made again."""
        self._directory, self._log, self._degraded = directory, log, degraded
        self._read, self._head, self._ids = read, head, ids
        self._guard = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, ...] = ()
        self._process = os.getpid()
        self._uses: Counter[str] = Counter()

    @property
    def path(self) -> Path:
        """Of the file, if there is one."""
        return self._directory.root / "index" / "artifacts.sqlite3"

    def query(self, query: KernelQuery) -> list[KernelMatch]:
        """In the order that `KernelQuery` gives. Raises StoreUnavailable.

        Asked one status and one count of preferred tags at a time: each such question walks an index in the order that
        is wanted and stops at the limit, where one for all of them would sort every artifact that fits.
        """

        def best(database: sqlite3.Connection) -> list[KernelMatch]:
            found: list[KernelMatch] = []
            for liked in range(len(query.preferred), -1, -1):
                rows: list[Any] = []
                for status in dict.fromkeys(query.statuses):
                    rows += database.execute(*_select(query, status, liked, query.limit - len(found)))
                level = sorted(map(_match, rows), key=lambda match: match.created_at, reverse=True)
                level.sort(key=lambda match: (match.figures.latency_us is None, match.figures.latency_us or 0.0))
                found += level[: query.limit - len(found)]
                if len(found) == query.limit:
                    break
            return found

        return self._ask(best)

    def of(self, artifact_id: str) -> KernelMatch | None:
        """One artifact by its id."""
        sql = _SELECT.format(by="") + " WHERE artifacts.id = ?"
        row = self._ask(lambda database: database.execute(sql, [artifact_id]).fetchone())
        return None if row is None else _match(row)

    def history(self, artifact_ids: Sequence[str] | None, blueprint: str | None) -> list[Change]:
        """Changes of the artifacts with these ids, or whose id begins with the first 12 digits of a blueprint's."""
        if blueprint is not None:
            begin = blueprint[:12]
            where, values = "artifact >= ? AND artifact < ?", [f"{begin}-", f"{begin}."]
        else:
            known = list(artifact_ids or ())
            where, values = f"artifact IN ({', '.join('?' * len(known))})", known
        sql = f"SELECT at, what, artifact, source, target, role, manifest FROM changes WHERE {where} ORDER BY sequence"
        return [
            Change(when=at, what=what, artifact_id=artifact, source=source, target=target, role=role, manifest=manifest)
            for at, what, artifact, source, target, role, manifest in self._ask(
                lambda database: database.execute(sql, values).fetchall()
            )
        ]

    def used(self, artifact_id: str) -> None:
        """Counts a load; written now and then, with the next question, and by `close`."""
        with self._own_guard():
            self._uses[artifact_id] += 1
            if sum(self._uses.values()) >= _FLUSH_EVERY and self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._flush(self._database)

    def rebuild(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Makes the index anew, keeping what counts of uses it has; returns how many artifacts it then holds."""
        with self._own_guard():
            database = self._opened()
            with _transaction(database):
                self._fill(database, progress)
            return int(database.execute("SELECT count(*) FROM artifacts").fetchone()[0])

    def close(self) -> None:
        """Writes what counts there are and closes the file. A later question opens it again."""
        with self._own_guard():
            if self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._flush(self._database)
                self._database.close()
            self._database = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            self.close()

    def _ask(self, question: Callable[[sqlite3.Connection], _T]) -> _T:
        """The answer of an index that is up to date."""

        def answer(database: sqlite3.Connection) -> _T:
            self._catch_up(database)
            with _transaction(database, "BEGIN"):  # of one moment, where it is several questions
                return question(database)

        with self._own_guard():
            for attempt in range(2):
                try:
                    return answer(self._opened())
                except sqlite3.OperationalError as error:
                    if attempt or _is_damage(error):
                        self._discard(error)
                    else:
                        self._in_memory(f"the index cannot be written: {error}")
                except sqlite3.DatabaseError as error:
                    self._discard(error)
            return answer(self._in_memory("the index on disk is damaged and could not be replaced"))

    # ---- the file

    def _own_guard(self) -> threading.RLock:
        """The lock of this process. After a fork a thread that is not here may have the parent's, SQLite's connections
        do not survive, and the counts are the parent's to write."""
        if self._process != os.getpid():
            self._guard, self._process = threading.RLock(), os.getpid()
            self._database, self._uses = None, Counter()
        return self._guard

    def _opened(self) -> sqlite3.Connection:
        if self._database is not None and self._identity == self._on_disk():
            return self._database
        self.close()
        if self._directory.stat(()) is None:
            return self._in_memory(None)  # a store that is not there has no artifacts, and asking does not make it
        if on_network(self._directory.root):
            return self._in_memory("the store is on a network file system")
        try:
            return self._open_file()
        except (sqlite3.OperationalError, OSError) as error:
            if not _is_damage(error):
                return self._in_memory(f"the index cannot be opened for writing: {error}")
        except sqlite3.DatabaseError:
            pass
        self._remove_files()
        try:
            return self._open_file()
        except (sqlite3.Error, OSError) as error:
            return self._in_memory(f"the index cannot be made: {error}")

    def _open_file(self) -> sqlite3.Connection:
        # SQLite opens by path. Neither the folder nor the file may be a link, or it would follow it out of the root.
        with self._directory._folder(("index",), create=True):
            pass
        for name in self._directory.names("index"):
            if self.path.with_name(name).is_symlink():
                self.path.with_name(name).unlink()
        if not os.access(self.path.parent, os.W_OK):
            raise sqlite3.OperationalError("its folder is read-only")
        database = sqlite3.connect(self.path, timeout=300, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA trusted_schema = OFF")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            database.execute("PRAGMA cache_size = -16000")
            with _transaction(database):
                if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                    if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        raise sqlite3.DatabaseError("an index of another release")
                    _create(database)
        except BaseException:
            database.close()
            raise
        self._database, self._identity = database, self._on_disk()
        return database

    def _in_memory(self, reason: str | None) -> sqlite3.Connection:
        self.close()
        if reason is not None:
            self._degraded(f"{reason}; it is kept in memory")
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        with _transaction(self._database):
            _create(self._database)
        self._identity = self._on_disk()
        return self._database

    def _on_disk(self) -> tuple[int, ...]:
        try:
            found = self._directory.stat(("index", self.path.name))
        except StoreUnavailable:
            return ()
        return () if found is None else (found.st_dev, found.st_ino)

    def _discard(self, error: sqlite3.Error) -> None:
        self._degraded(f"the index is damaged ({error}) and is made again")
        if self._database is not None:
            self._database.close()
        self._database = None
        self._remove_files()

    def _remove_files(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            for name in self._directory.names("index"):
                self._directory.remove(("index", name))

    # ---- its content

    def _catch_up(self, database: sqlite3.Connection) -> None:
        size, lineages = self._log.size_bytes(), " ".join(self._directory.names("lineages"))
        meta = dict(database.execute("SELECT key, value FROM meta"))
        stale = meta.get("offset") != str(size) or meta.get("lineages") != lineages
        if not stale and not self._uses:
            return
        with _transaction(database):
            meta = dict(database.execute("SELECT key, value FROM meta"))  # another may have done it meanwhile
            offset = int(meta.get("offset", -1))
            if offset < 0 or size < offset or not self._continues(offset, meta.get("head", START)):
                self._fill(database)
            elif offset < size:
                self._apply(database, offset)
            if meta.get("lineages") != lineages:
                self._name(database, lineages.split())
            self._flush(database)

    def _continues(self, offset: int, head: str) -> bool:
        """Whether the log still has at its `offset` what it had when the index came to there: its last byte is a
        newline and the entry that follows names the same line before it."""
        for _, line in self._log.lines(offset):
            entry = parse_entry(line)
            return entry is None or entry.previous == head
        return self._log.size_bytes() > offset or self._log.tail().digest == head

    def _fill(self, database: sqlite3.Connection, progress: Callable[[int, int], None] | None = None) -> None:
        for table in ("artifacts", "changes"):
            database.execute(f"DELETE FROM {table}")
        database.execute("DELETE FROM meta WHERE key IN ('offset', 'head')")
        # The log first: a change that is made while the records are read comes after its end, and is read again.
        self._log_entries(database, 0)
        ids = self._ids()
        for begin in range(0, len(ids), _BATCH):
            self._refresh(database, ids[begin : begin + _BATCH])
            if progress is not None:
                progress(min(begin + _BATCH, len(ids)), len(ids))
        database.execute("DELETE FROM uses WHERE id NOT IN (SELECT id FROM artifacts)")

    def _apply(self, database: sqlite3.Connection, offset: int) -> None:
        entries = self._log_entries(database, offset)
        if entries is None:
            self._fill(database)
            return
        changed = list(dict.fromkeys(entries))
        for begin in range(0, len(changed), _BATCH):
            self._refresh(database, changed[begin : begin + _BATCH])

    def _log_entries(self, database: sqlite3.Connection, offset: int) -> list[str] | None:
        """The ids in the log from an offset on; None where a line is damaged, or a newer release's, so that what it is
        about cannot be told."""
        changed: list[str] = []
        known = True
        rows: list[tuple[object, ...]] = []
        ends, last = [(offset, START)], None
        for end, line in self._log.lines(offset):
            ends = [ends[-1], (end, sha256(line))]
            last = parse_entry(line)
            if last is None:
                known = False
            else:
                changed.append(last.artifact)
                rows.append(_change(last))
        if last is not None and self._head(last.artifact) != last.after:
            ends.pop()  # the change of the last line is still to be made: it is looked at again the next time
        database.executemany("INSERT OR REPLACE INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        offset, head = ends[-1]
        meta = {"offset": str(offset)} | ({} if head == START and offset else {"head": head})
        database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        return changed if known else None

    def _refresh(self, database: sqlite3.Connection, ids: Iterable[str]) -> None:
        for artifact_id in ids:
            found = self._read(artifact_id)
            if found is None:
                database.execute("DELETE FROM artifacts WHERE id = ?", [artifact_id])
            else:
                database.execute(_INSERT, _row(*found))

    def _name(self, database: sqlite3.Connection, lineages: Sequence[str]) -> None:
        database.execute("DELETE FROM named")
        for name in lineages:
            content = self._directory.read_from(("lineages", name), 0, "lineage")
            for artifact_id in content.decode("ascii", "replace").split():
                database.execute("INSERT OR IGNORE INTO named VALUES (?, ?)", [artifact_id, name])
        database.execute("INSERT OR REPLACE INTO meta VALUES ('lineages', ?)", [" ".join(lineages)])

    def _flush(self, database: sqlite3.Connection) -> None:
        uses, self._uses = self._uses, Counter()
        database.executemany(
            "INSERT INTO uses VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET count = count + excluded.count", uses.items()
        )


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    database.execute(begin)
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _create(database: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";"):  # executescript would end the transaction
        if statement.strip():
            database.execute(statement)


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault, and not the place where it is."""
    text = str(error)
    return isinstance(error, sqlite3.DatabaseError) and any(
        part in text for part in ("malformed", "not a database", "no such table", "no such column", "another release")
    )


def _select(query: KernelQuery, status: KernelStatus, liked: int, limit: int) -> tuple[str, list[Any]]:
    """What fits, has this status and exactly `liked` of the preferred tags, in the order of its index."""
    conditions = ["status = ?"]
    values: list[Any] = [status.value]
    for column, wanted in (("blueprint", query.blueprint_id), ("target", query.target), ("dtype", query.dtype)):
        if wanted is not None:
            conditions.append(f"{column} = ?")
            values.append(wanted)
    for column, bound in (("latency_us", query.max_latency_us), ("memory_bytes", query.max_memory_bytes)):
        if bound is not None:
            conditions.append(f"{column} <= ?")
            values.append(bound)
    for name, size in query.dims.items():
        conditions.append("instr(dims, ?)")
        values.append(_dims_text({name: size}))
    for tags, condition in ((query.required, "instr(tags, ?)"), (query.excluded, "NOT instr(tags, ?)")):
        for tag in tags:
            conditions.append(condition)
            values.append(f" {tag} ")
    if query.preferred:
        conditions.append(f"{' + '.join('(instr(tags, ?) > 0)' for _ in query.preferred)} = ?")
        values += [*(f" {tag} " for tag in query.preferred), liked]
    # The planner does not know how few artifacts a blueprint has, and would walk through all of them in order.
    select = _SELECT.format(by="" if query.blueprint_id is None else " INDEXED BY by_blueprint")
    order = "unmeasured, latency_us, created_at DESC"
    return f"{select} WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT ?", [*values, limit]


def _row(record: Record, manifest: Manifest, size_bytes: int) -> tuple[Any, ...]:
    figures = record.figures
    return (
        manifest.id,
        record.manifest,
        manifest.blueprint_id,
        manifest.blueprint_name,
        manifest.target.label,
        manifest.pipeline,
        manifest.dtype,
        _dims_text(manifest.dims),
        manifest.status.value,
        f" {' '.join(record.tags)} ",
        figures.latency_us is None,
        figures.latency_us,
        figures.memory_bytes,
        figures.drift,
        manifest.created_at,
        manifest.compile_seconds,
        size_bytes,
    )


def _dims_text(dims: Mapping[str, int]) -> str:
    """`,"d":64,"r":16,`: that of one dim is part of that of any dims that have it."""
    return "," + json.dumps(dims, sort_keys=True, separators=(",", ":"))[1:-1] + ","


def _change(entry: AuditEntry) -> tuple[object, ...]:
    return (
        entry.sequence,
        entry.when,
        entry.what,
        entry.artifact,
        entry.source,
        entry.target,
        None if entry.signature is None else entry.signature.role,
        entry.manifest,
    )


def _match(row: Sequence[Any]) -> KernelMatch:
    of = dict(zip((*_COLUMNS, "uses", "lineages"), row, strict=True))
    return KernelMatch.model_validate(
        {
            "id": of["id"],
            "digest": of["digest"],
            "blueprint_id": of["blueprint"],
            "blueprint_name": of["name"],
            "target": of["target"],
            "pipeline": of["pipeline"],
            "dtype": of["dtype"],
            "dims": json.loads("{" + of["dims"][1:-1] + "}"),
            "status": of["status"],
            "tags": of["tags"].split(),
            "figures": {name: of[name] for name in ("latency_us", "memory_bytes", "drift")},
            "created_at": of["created_at"],
            "compile_seconds": of["compile_seconds"],
            "size_bytes": of["size_bytes"],
            "uses": of["uses"],
            "lineages": (of["lineages"] or "").split(),
        }
    )
