"""Verification of a whole store: every byte, every signature, and the audit log from its first line."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from esper_triton.contracts.errors import ArtifactNotFound, ArtifactRefused, EsperError, StoreUnavailable
from esper_triton.contracts.manifest import sha256
from esper_triton.contracts.record import Role, roles_for
from esper_triton.urza.audit import START, parse_entry
from esper_triton.urza.collecting import all_objects
from esper_triton.urza.directory import Damage, object_parts
from esper_triton.urza.keeping import named_by_lineages
from esper_triton.urza.shelf import BLOB_LIMIT_BYTES, Shelf, roles_of_blobs
from esper_triton.urza.trust import is_signed

__all__ = ["Fault", "Verified", "verify"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fault:
    """What is wrong with what: an artifact's id, a line of the audit log, or a file below the root."""

    subject: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and every fault that was found. The store is as it was."""

    artifacts: int
    objects: int
    entries: int
    size_bytes: int
    faults: tuple[Fault, ...]


@dataclass
class _Heads:
    """What the log says that the records are: SHA-256 of each artifact's, None for one that is not there."""

    said: dict[str, str | None] = field(default_factory=dict)
    entries: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify(shelf: Shelf, progress: Progress | None = None) -> Verified:
    """Reads everything and changes nothing. Raises StoreUnavailable where the store cannot be read at all.

    The log is checked line by line: each names the one before it and is signed by a key that is trusted for it; and
    each record is the one that the log's last line about it says. Records that were put back to what they once were,
    signed as they are, show by that.
    """
    faults: list[Fault] = []
    shelf.directory.forget_verified()
    objects = all_objects(shelf.directory)
    ids = shelf.ids()
    total, done, bad = len(objects) + len(ids), 0, set()
    for digest in objects:
        try:
            shelf.directory.read_object(digest, f"object {digest}", limit_bytes=BLOB_LIMIT_BYTES)
        except Damage as damage:
            if shelf.directory.stat(object_parts(digest)) is not None:  # else a collection has removed it meanwhile
                bad.add(digest)
                faults.append(Fault("/".join(object_parts(digest)), str(damage)))
        done += 1
        if progress is not None and done % 50 == 0:
            progress(done, total)
    for artifact_id in ids:
        faults += _artifact_faults(shelf, artifact_id, bad)
        done += 1
        if progress is not None and done % 50 == 0:
            progress(done, total)
    heads = _heads(shelf)
    mismatched = list(_head_faults(shelf, heads))
    if mismatched:
        # A writer may be between the log and the record, or may have died there: within the lock it is settled.
        try:
            with shelf.lock():
                heads = _heads(shelf)
                mismatched = list(_head_faults(shelf, heads))
        except StoreUnavailable:
            pass
    faults += heads.faults + mismatched
    faults += _name_faults(shelf)
    return Verified(
        artifacts=len(ids),
        objects=len(objects),
        entries=heads.entries,
        size_bytes=sum(objects.values()),
        faults=tuple(faults),
    )


def _artifact_faults(shelf: Shelf, artifact_id: str, bad: set[str]) -> Iterator[Fault]:
    try:
        artifact = shelf.artifact(artifact_id)
        for digest, role in roles_of_blobs(artifact.manifest).items():
            if digest in bad:
                yield Fault(artifact_id, f"{role} is corrupt")
            elif shelf.directory.stat(object_parts(digest)) is None and shelf.contains(artifact_id):
                yield Fault(artifact_id, f"{role} is missing: no object has the SHA-256 {digest}")
    except ArtifactNotFound:
        pass  # removed meanwhile
    except Damage as damage:
        yield Fault(artifact_id, str(damage))
    except ArtifactRefused as error:
        yield Fault(artifact_id, str(error))


def _heads(shelf: Shelf) -> _Heads:
    found = _Heads()
    own = shelf.keys.public()
    trusted = shelf.trust.trusted(own)
    previous, sequence = START, 0
    try:
        lines = list(shelf.log.lines())
    except StoreUnavailable as error:
        found.faults.append(Fault("audit.log", str(error)))
        return found
    for number, (_, line) in enumerate(lines, start=1):
        subject = f"audit.log:{number}"
        entry = parse_entry(line)
        if entry is None:
            found.faults.append(Fault(subject, "is not an entry that this release can read"))
        else:
            if entry.previous != previous:
                found.faults.append(
                    Fault(subject, f"follows a line of SHA-256 {entry.previous}; the line before it has {previous}")
                )
            if entry.sequence != sequence:
                found.faults.append(Fault(subject, f"has sequence number {entry.sequence}, {sequence} was expected"))
            signature = entry.signature
            # What gives nothing may be unsigned or by a key that is only this store's: a process without a key must be
            # able to say what it has done.
            gives = entry.what not in ("removed", "quarantined", "void", "imported", "pinned", "unpinned")
            if signature is None:
                if gives and not shelf.trust.unsigned:
                    found.faults.append(Fault(subject, f"is not signed, and says {entry.what!r}"))
            elif not is_signed(entry):
                found.faults.append(Fault(subject, f"is not signed by {signature.role} key {signature.key[:16]}"))
            elif signature.key not in trusted[signature.role] and (gives or signature.key != own.get(signature.role)):
                found.faults.append(
                    Fault(subject, f"is signed by {signature.role} key {signature.key[:16]}, which is not trusted")
                )
            elif gives and entry.target is not None and signature.role not in (*roles_for(entry.target), Role.PROVER):
                found.faults.append(Fault(subject, f"says {entry.target}, and is signed by the {signature.role}"))
            if entry.artifact in found.said and entry.what not in ("quarantined", "pinned", "unpinned"):
                expected = found.said[entry.artifact]
                if entry.before != expected:
                    found.faults.append(
                        Fault(subject, f"changes record {entry.before} of {entry.artifact}, which was {expected}")
                    )
            if entry.what not in ("pinned", "unpinned"):
                found.said[entry.artifact] = entry.after
            sequence = entry.sequence
        previous = sha256(line)
        sequence += 1
        found.entries += 1
    return found


def _head_faults(shelf: Shelf, heads: _Heads) -> Iterator[Fault]:
    for artifact_id in sorted({*heads.said, *shelf.ids()}):
        actual = shelf.head(artifact_id)
        if artifact_id not in heads.said:
            if heads.entries or not shelf.trust.unsigned:
                yield Fault(artifact_id, "has a record that the audit log does not have")
        elif actual != heads.said[artifact_id]:
            said = heads.said[artifact_id]
            if actual is None:
                yield Fault(artifact_id, f"has no record; the audit log says {said}")
            else:
                yield Fault(
                    artifact_id,
                    f"has record {actual}; the audit log says {said or 'that it was removed'}: the record was put back "
                    "to an older one, or the log was cut",
                )


def _name_faults(shelf: Shelf) -> Iterator[Fault]:
    for artifact_id in shelf.directory.names("pins"):
        if not shelf.contains(artifact_id):
            yield Fault(f"pins/{artifact_id}", "pins an artifact that is not there")
    for artifact_id, names in named_by_lineages(shelf.directory).items():
        if not shelf.contains(artifact_id):
            yield Fault(f"lineages/{names[0]}", f"names artifact {artifact_id}, which is not there")
    for role in Role:
        path = shelf.keys.path / f"{role}.key"
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
        except OSError:
            continue
        if mode & 0o077:
            yield Fault(str(path.name), f"can be read by others (mode {mode:o}, 600 was expected)")
    try:
        shelf.keys.public()
    except EsperError as error:
        yield Fault("keys", str(error))
