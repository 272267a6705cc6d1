"""Garbage collection: what nobody needs is removed, and of what could be made again what is worth least."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from esper_triton.contracts.errors import ArtifactNotFound, ArtifactRefused, StoreUnavailable
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.urza.audit import parse_entry
from esper_triton.urza.directory import Damage, Directory, object_parts
from esper_triton.urza.incoming import sweep
from esper_triton.urza.keeping import named_by_lineages
from esper_triton.urza.leases import gate, leased
from esper_triton.urza.requests import stale
from esper_triton.urza.shelf import Shelf

__all__ = ["Collected", "all_objects", "collect"]

_AT_ONCE = 32
_QUARANTINE_S = 30 * 86400.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection did, or with `dry_run` would have done. Sizes in bytes.

    removed: ids of artifacts. objects: how many files below `objects/` were removed, with the manifests and blobs of
    those artifacts. requests: how many were forgotten. freed_bytes: what both, and old files of the quarantine and of
    transfers, held. kept_bytes: what is left below `objects/`. over_bytes: by how much that is more than was allowed,
    since the rest may not be removed. kept: for each reason the artifacts that could not be.
    """

    removed: tuple[str, ...]
    objects: int
    requests: int
    freed_bytes: int
    kept_bytes: int
    over_bytes: int
    kept: dict[str, tuple[str, ...]]
    dry_run: bool


@dataclass
class _Marked:
    """What is there. `needs` are the digests of each artifact: its manifest's and its blobs'."""

    offset: int  # of the audit log when marking began
    sizes: dict[str, int] = field(default_factory=dict)
    needs: dict[str, frozenset[str]] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    heads: dict[str, str | None] = field(default_factory=dict)
    used_at: dict[str, float] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)


def collect(
    shelf: Shelf, *, max_bytes: int | None = None, dry_run: bool = False, progress: Progress | None = None
) -> Collected:
    """Removes objects that no artifact needs and, while the rest is larger than `max_bytes`, artifacts.

    First goes the artifact with the largest time since its last use over 1 + the seconds that its compilation took:
    what took nine seconds to compile stays ten times as long as what took none. Never removed are pinned and leased
    artifacts, and VALIDATED ones that a lineage names. Where an artifact is of a newer release, no object is removed:
    which ones it needs cannot be known. What requests were built as is forgotten when nobody has asked for it for 30
    days and the artifact is not here.

    Others may read and write at the same time. What is there is found out without the lock, and what has changed since
    then is looked at again within it; a reader whose artifact goes away meanwhile is told that it is not there.

    Raises StoreUnavailable; what was removed until then is.
    """
    marked = _mark(shelf, progress)
    if shelf.directory.stat(()) is None:  # looking for garbage does not make a store
        return _outcome(marked, [], [], {}, {}, max_bytes, 0, dry_run=dry_run)
    victims, kept = _victims(shelf, marked, max_bytes)
    if dry_run:
        leaving = set(victims)
        requests = stale(shelf.directory, lambda one: one not in leaving and shelf.contains(one))
        return _outcome(marked, victims, _orphans(marked, victims), requests, kept, max_bytes, 0, dry_run=True)
    gone: list[str] = []
    with shelf.lock():
        for begin in range(0, len(victims), _AT_ONCE):
            # A load that takes a lease waits for the gate: it is held for few removals at a time.
            with gate(shelf.directory, shared=False):
                in_use = leased(shelf.directory) | set(shelf.directory.names("pins"))
                for artifact_id in victims[begin : begin + _AT_ONCE]:
                    if artifact_id in in_use or shelf.head(artifact_id) != marked.heads[artifact_id]:
                        kept.setdefault("taken into use meanwhile", []).append(artifact_id)
                        continue
                    shelf.remove(artifact_id, marked.manifests[artifact_id])
                    gone.append(artifact_id)
        _mark_changes(shelf, marked, gone)
        orphans = _orphans(marked, gone)
        for digest in orphans:
            shelf.directory.remove(object_parts(digest))
        requests = stale(shelf.directory, shelf.contains)
        for request in requests:
            shelf.directory.remove(("requests", request))
        cleared = _clear(shelf.directory)
    return _outcome(marked, gone, orphans, requests, kept, max_bytes, cleared, dry_run=False)


def all_objects(directory: Directory) -> dict[str, int]:
    """The size of every object by its digest. Raises StoreUnavailable."""
    found = {}
    for begin in directory.names("objects"):
        if len(begin) == 2:
            for name, stat in directory.sizes("objects", begin).items():
                found[begin + name] = stat.st_size
    return found


def _mark(shelf: Shelf, progress: Progress | None) -> _Marked:
    marked = _Marked(offset=shelf.log.size_bytes())
    marked.sizes = all_objects(shelf.directory)
    heads = shelf.directory.sizes("refs")
    for count, (artifact_id, stat) in enumerate(heads.items()):
        marked.used_at[artifact_id] = stat.st_mtime
        _mark_one(shelf, marked, artifact_id)
        if progress is not None and count % 100 == 0:
            progress(count, len(heads))
    return marked


def _mark_one(shelf: Shelf, marked: _Marked, artifact_id: str) -> None:
    try:
        marked.heads[artifact_id] = None
        content, record = shelf.record(artifact_id, check_signature=False)
        marked.heads[artifact_id] = sha256(content)
        manifest = shelf.manifest(artifact_id, content, record)
    except ArtifactNotFound:
        marked.needs.pop(artifact_id, None)
    except Damage:
        pass  # it cannot be loaded: whoever commits it again brings what it needs
    except ArtifactRefused:
        marked.unreadable.append(artifact_id)
    else:
        marked.needs[artifact_id] = frozenset((record.manifest, *manifest.blobs))
        marked.manifests[artifact_id] = manifest


def _mark_changes(shelf: Shelf, marked: _Marked, gone: list[str]) -> None:
    changed = {entry.artifact for _, line in shelf.log.lines(marked.offset) if (entry := parse_entry(line))}
    for artifact_id in changed - set(gone):
        _mark_one(shelf, marked, artifact_id)


def _victims(shelf: Shelf, marked: _Marked, max_bytes: int | None) -> tuple[list[str], dict[str, list[str]]]:
    if max_bytes is None:
        return [], {}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(gate(shelf.directory, shared=False))
            in_use = leased(shelf.directory)
        except StoreUnavailable:  # read-only: nothing will be removed
            in_use = set()
    pinned = set(shelf.directory.names("pins"))
    named = named_by_lineages(shelf.directory)
    references = Counter(digest for needs in marked.needs.values() for digest in needs)
    size = sum(marked.sizes.get(digest, 0) for digest in references)
    now = time.time()

    def worth_least(artifact_id: str) -> float:
        idle_s = max(0.0, now - marked.used_at.get(artifact_id, now))
        return -idle_s / (1.0 + marked.manifests[artifact_id].compile_seconds)

    victims: list[str] = []
    kept: dict[str, list[str]] = {}
    for artifact_id in sorted(marked.needs, key=lambda one: (worth_least(one), one)):
        if size <= max_bytes:
            break
        validated = marked.manifests[artifact_id].status is KernelStatus.VALIDATED
        for reason, holds in (
            ("pinned", artifact_id in pinned),
            ("in use", artifact_id in in_use),
            ("named by a lineage", validated and artifact_id in named),
        ):
            if holds:
                kept.setdefault(reason, []).append(artifact_id)
                break
        else:
            victims.append(artifact_id)
            for digest in marked.needs[artifact_id]:
                references[digest] -= 1
                if not references[digest]:
                    size -= marked.sizes.get(digest, 0)
    return victims, kept


def _orphans(marked: _Marked, gone: list[str]) -> list[str]:
    if marked.unreadable:
        return []
    away = set(gone)
    needed = {digest for artifact_id, needs in marked.needs.items() if artifact_id not in away for digest in needs}
    return [digest for digest in marked.sizes if digest not in needed]


def _clear(directory: Directory) -> int:
    """Removes what has lain in the quarantine for 30 days, what was not received to its end for a week, and the locks
    of builds that have ended; bytes freed."""
    freed = sweep(directory)
    for name, stat in directory.sizes("quarantine").items():
        if time.time() - stat.st_mtime > _QUARANTINE_S:
            freed += stat.st_size if directory.remove(("quarantine", name)) else 0
    for name in directory.names("building"):
        parts = ("building", name)
        with contextlib.suppress(BlockingIOError), directory.hold(parts, wait=False) as lock:
            if lock.descriptor is not None and directory.same_file(parts, lock.descriptor):
                directory.remove(parts)
    return freed


def _outcome(
    marked: _Marked,
    gone: list[str],
    orphans: list[str],
    requests: dict[str, int],
    kept: dict[str, list[str]],
    max_bytes: int | None,
    cleared: int,
    *,
    dry_run: bool,
) -> Collected:
    freed = sum(marked.sizes[digest] for digest in orphans)
    left = sum(marked.sizes.values()) - freed
    if marked.unreadable:
        kept["of a newer release"] = marked.unreadable
    return Collected(
        removed=tuple(gone),
        objects=len(orphans),
        requests=len(requests),
        freed_bytes=freed + sum(requests.values()) + cleared,
        kept_bytes=left,
        over_bytes=0 if max_bytes is None else max(0, left - max_bytes),
        kept={reason: tuple(ids) for reason, ids in kept.items()},
        dry_run=dry_run,
    )
