"""The shelf: one artifact at a time, from the bytes of its record to its manifest and blobs, and back."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from esper_triton.contracts.errors import (
    ArtifactNotFound,
    ArtifactRefused,
    CorruptObject,
    NotAuthorized,
    StoreUnavailable,
    nearest,
)
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import SCHEMA_VERSION as RECORD_SCHEMA
from esper_triton.contracts.record import AuditEntry, Figures, Record, Role, roles_for
from esper_triton.urza.audit import AuditLog, Tail, now
from esper_triton.urza.directory import Damage, Directory
from esper_triton.urza.events import Event, Events
from esper_triton.urza.parsing import (
    OtherSchema,
    first_fault,
    is_id,
    major_minor,
    parse_manifest,
    parse_record,
    schema_of,
)
from esper_triton.urza.trust import Keys, Signer, Trust, signed

__all__ = [
    "BLOB_LIMIT_BYTES",
    "MANIFEST_LIMIT_BYTES",
    "Artifact",
    "Shelf",
    "roles_of_blobs",
]

# Bounds on what a reader takes into memory; far above any honest manifest, kernel or report.
MANIFEST_LIMIT_BYTES = 1 << 20
BLOB_LIMIT_BYTES = 256 << 20
RECORD_LIMIT_BYTES = 1 << 14

_FORMAT = ("urza.json",)
_REMEMBERED = 4096
_TOUCH_AFTER_S = 60.0
_MOST_LISTED = 2000
_MOST_COMPARED = 100  # about 70 us for each
_T = TypeVar("_T")


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its manifest, and the SHA-256 (hex) that the manifest was read by."""

    manifest: Manifest
    digest: str

    @property
    def id(self) -> str:
        """`<blueprint[:12]>-<target>-<pipeline>-<build[:12]>`."""
        return self.manifest.id

    @property
    def status(self) -> KernelStatus:
        """The status when it was read."""
        return self.manifest.status


class Shelf:
    """Records, manifests and blobs of a directory, read in the order in which each vouches for the next: the record is
    signed, names the manifest by its digest, and that names the blobs by theirs.

    Remembered are manifests by digest and signatures by the bytes that they are of, both of which are read and hashed
    again on each call: only parsing and the arithmetic of a signature are spared.
    """

    def __init__(self, directory: Directory, trust: Trust, keys: Keys, events: Events) -> None:
        self.directory, self.trust, self.keys, self.events = directory, trust, keys, events
        self.log = AuditLog(directory)
        self._version_is_known = False
        self._happened: list[Event] = []
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._trusted: OrderedDict[str, tuple[bytes, bytes, Record]] = OrderedDict()

    @property
    def root(self) -> Path:
        """Of the store."""
        return self.directory.root

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """For writing: one process and thread at a time. What happened is told when the lock has been given back.

        Raises StoreUnavailable, also where a newer release has made the store.
        """
        happened: list[Event] = []
        try:
            with self.directory.lock():
                self._happened = happened
                self._check_version(writing=True)
                self._settle()
                yield
        finally:
            for event in happened:
                self.events.tell(event)

    # ---- reading

    def ids(self) -> list[str]:
        """Of all committed artifacts, sorted. Raises StoreUnavailable."""
        return [name for name in self.directory.names("refs") if is_id(name)]

    def contains(self, artifact_id: object) -> bool:
        """Whether there is a record under this id. Says nothing of what it is worth."""
        return (
            isinstance(artifact_id, str)
            and is_id(artifact_id)
            and self.directory.stat(("refs", artifact_id)) is not None
        )

    def head(self, artifact_id: str) -> str | None:
        """SHA-256 of a record's bytes, None where there is none that can be read."""
        try:
            return sha256(self._record_bytes(artifact_id))
        except (FileNotFoundError, Damage):
            return None

    def record(self, artifact_id: str, *, touch: bool = False, check_signature: bool = True) -> tuple[bytes, Record]:
        """The bytes and content of a record; its signature is right, and whose it is has not been asked.

        check_signature: False for those who look and run nothing, such as the index.

        Raises ArtifactNotFound, Damage, ArtifactRefused (of a newer release), StoreUnavailable.
        """
        if not is_id(artifact_id):
            form = "<blueprint sha256[:12]>-<target>-<pipeline>-<build sha256[:12]>"
            raise ArtifactNotFound(f"{artifact_id!r} is not an artifact id ({form}){self._nearest(artifact_id)}")
        if not self._version_is_known:
            self._check_version(writing=False)
        try:
            content = self._record_bytes(artifact_id, touch=touch)
        except FileNotFoundError:
            aside = [name for name in self.directory.names("quarantine") if name.startswith(artifact_id)]
            hint = f"; its record is in quarantine ({aside[-1]})" if aside else self._nearest(artifact_id)
            raise ArtifactNotFound(f"no artifact {artifact_id!r} in {self.root}{hint}") from None
        known = self._trusted.get(artifact_id)
        if known is not None and known[0] == content:
            return content, known[2]
        try:
            return content, parse_record(content, artifact_id, check_signature=check_signature)
        except ValueError as error:
            raise _bad_record(artifact_id, content, str(error)) from error
        except OtherSchema as error:
            raise ArtifactRefused(f"artifact {artifact_id!r}: {error}") from None

    def record_exists(self, artifact_id: str) -> None:
        """Raises ArtifactNotFound where there is no record, with the nearest ids."""
        if not self.contains(artifact_id):
            with contextlib.suppress(Damage):
                self.record(artifact_id)

    def artifact(self, artifact_id: str, *, touch: bool = False) -> Artifact:
        """Raises as `record` does, and UntrustedArtifact."""
        content, record = self.record(artifact_id, touch=touch)
        manifest = self.manifest(artifact_id, content, record)
        own = self._own_public_bytes()
        known = self._trusted.get(artifact_id)
        if known is None or known[0] != content or known[1] != own:
            self.trust.check(record, manifest, self.trust.trusted(self.keys.public(own)))
            self._trusted[artifact_id] = (content, own, record)
            _bound(self._trusted)
        return Artifact(manifest, record.manifest)

    def whole(self, artifact_id: str, *, touch: bool = False) -> tuple[Artifact, dict[str, bytes]]:
        """The artifact and all its blobs by SHA-256. Raises as `artifact` does."""
        is_known = artifact_id in self._trusted
        artifact = self.artifact(artifact_id, touch=touch)
        if not is_known:  # on a disk, waiting for each in its turn is most of the time of a first load
            self.directory.expect_objects(artifact.manifest.blobs)
        roles = roles_of_blobs(artifact.manifest)
        blobs = {
            digest: self.directory.read_object(digest, roles[digest], limit_bytes=BLOB_LIMIT_BYTES)
            for digest in artifact.manifest.blobs
        }
        return artifact, blobs

    def manifest(self, artifact_id: str, content: bytes, record: Record) -> Manifest:
        """The manifest that a record names. Raises Damage, ArtifactRefused, StoreUnavailable."""
        # Where an object has the bytes that its name promises but isn't this artifact's manifest, it is the record that
        # is wrong: the object may be a sound part of another artifact, and must stay.
        try:
            found = self.manifest_bytes(record)
        except Damage as damage:
            if damage.size_bytes is None or damage.size_bytes <= MANIFEST_LIMIT_BYTES:
                raise
            try:
                descriptor, _ = self.directory.open_object(record.manifest, "manifest", limit_bytes=BLOB_LIMIT_BYTES)
            except Damage:
                raise damage from None
            os.close(descriptor)  # it is what its name promises
            raise _bad_record(artifact_id, content, f"it names {record.manifest}, which {damage.reason}") from damage
        manifest = self._manifests.get(record.manifest)
        if manifest is None:
            try:
                manifest = parse_manifest(found)
            except ValidationError as error:
                reason = f"it names {record.manifest}, which is not a valid manifest: {first_fault(error)}"
                raise _bad_record(artifact_id, content, reason) from error
            except OtherSchema as error:
                raise ArtifactRefused(f"artifact {artifact_id!r}: {error}") from None
            self._manifests[record.manifest] = manifest
            _bound(self._manifests)
        if manifest.id != artifact_id:
            reason = f"it names the manifest of another artifact: expected {artifact_id!r}, found {manifest.id!r}"
            raise _bad_record(artifact_id, content, reason)
        return manifest

    def manifest_bytes(self, record: Record) -> bytes:
        """As they are stored. Raises Damage, StoreUnavailable."""
        return self.directory.read_object(record.manifest, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)

    def open_object(self, digest: str, what: str, *, limit_bytes: int) -> tuple[int, int]:
        """As `Directory.open_object`; one that is damaged is set aside. Raises as that does."""
        try:
            return self.directory.open_object(digest, what, limit_bytes=limit_bytes)
        except Damage as error:
            if error.missing:
                raise
            damage = error
        try:
            with self.lock():  # within it, since another may have repaired it meanwhile
                try:
                    return self.directory.open_object(digest, what, limit_bytes=limit_bytes)
                except Damage as error:
                    if (aside := self.directory.set_aside(error, None)) is not None:
                        details = {"file": str(aside), "reason": error.reason}
                        self._happened.append(
                            Event(kind="quarantined", artifact_id=None, message=f"{error}", details=details)
                        )
        except StoreUnavailable as error:
            raise damage from error  # what cannot be set aside is refused as well
        raise damage

    def repaired_or_refused(self, artifact_id: str, read: Callable[[], _T]) -> _T:
        """What `read` gives. On damage it is read once more under the lock: a writer may have repaired it since, and a
        repaired file must not be set aside."""
        try:
            return read()
        except Damage as error:
            damage = error
        if damage.missing:  # the record may have been replaced since it was read, and what it named then collected
            with contextlib.suppress(Damage):
                return read()
        try:
            with self.lock():
                return self.read_or_set_aside(artifact_id, read)
        except StoreUnavailable as error:  # a store that cannot be written still refuses what is damaged
            note = f"; it could not be moved to quarantine: {error}"
        self.events.tell(Event(kind="degraded", artifact_id=artifact_id, message=f"{damage}{note}"))
        raise self._refusal(artifact_id, damage, note)

    def read_or_set_aside(self, artifact_id: str, read: Callable[[], _T]) -> _T:
        """What `read` gives; what it finds damaged is moved to quarantine. Only inside `lock`. Raises CorruptObject."""
        try:
            return read()
        except Damage as error:
            damage = error
        raise self._refusal(artifact_id, damage, self.set_aside(artifact_id, damage))

    def _refusal(self, artifact_id: str, damage: Damage, note: str) -> CorruptObject:
        return CorruptObject(f"artifact {artifact_id!r}: {damage}{note}; compile it again to restore it")

    # ---- writing: only inside `lock`

    def publish(
        self,
        manifest: Manifest,
        content: bytes,
        *,
        what: str,
        before: Manifest | None = None,
        tags: tuple[str, ...] = (),
        figures: Figures | None = None,
        record: Record | None = None,
    ) -> Artifact:
        """Makes `manifest`, whose bytes are `content`, the artifact's, and signs it, or takes a `record` that is
        signed. Raises NotAuthorized, StoreUnavailable."""
        if record is None:
            unsigned = Record(
                id=manifest.id, manifest=sha256(content), tags=tags, figures=figures if figures else Figures()
            )
            record = signed(unsigned, self.signer(unsigned, manifest))
        digest = self.directory.write_object(content, limit_bytes=MANIFEST_LIMIT_BYTES)
        after = record.canonical_bytes()
        self._log(
            what=what,
            artifact=manifest.id,
            source=None if before is None else before.status,
            target=manifest.status,
            manifest=digest,
            before=self.head(manifest.id),
            after=sha256(after),
        )
        self.directory.write(("refs", manifest.id), after)
        self._tell(what, manifest.id, f"{manifest.id} is {manifest.status}", status=manifest.status, manifest=digest)
        return Artifact(manifest, digest)

    def signer(self, record: Record, manifest: Manifest) -> Signer:
        """Whoever may sign this record here and is trusted. Makes the store's keys. Raises NotAuthorized."""
        if self.trust.local and self.keys.roles:
            self.keys.make()
        roles = roles_for(manifest.status)
        if record.is_characterized:
            roles = tuple(role for role in roles if role is Role.PROVER)
            if not roles:
                raise NotAuthorized(
                    f"artifact {record.id!r} is {manifest.status}: tags and figures come from a proof, which it lacks"
                )
        signer = self.keys.signer(roles)
        if signer.public not in self.trust.trusted(self.keys.public())[signer.role]:
            raise NotAuthorized(
                f"{self.root}: the {signer.role} key here ({signer.public[:16]}) is none that the trust policy names, "
                "so that what it signs could not be loaded"
            )
        return signer

    def remove(self, artifact_id: str, manifest: Manifest | None) -> None:
        """Takes an artifact's record away; its objects stay for a collection. Raises StoreUnavailable."""
        self._log(
            what="removed",
            artifact=artifact_id,
            source=None if manifest is None else manifest.status,
            target=None,
            manifest=None,
            before=self.head(artifact_id),
            after=None,
        )
        self.directory.remove(("refs", artifact_id))
        self.directory.sync("refs")
        self._tell("removed", artifact_id, f"{artifact_id} was removed")

    def is_pinned(self, artifact_id: str) -> bool:
        """Whether no collection may remove it. Raises StoreUnavailable."""
        return self.directory.stat(("pins", artifact_id)) is not None

    def note(self, what: Literal["pinned", "unpinned"], artifact_id: str) -> None:
        """Says in the log, before it is done, what leaves the record as it is. Raises StoreUnavailable."""
        head = self.head(artifact_id)
        self._log(what=what, artifact=artifact_id, source=None, target=None, manifest=None, before=head, after=head)

    def set_aside(self, artifact_id: str, damage: Damage) -> str:
        """Moves what is damaged to the quarantine; a phrase that says where. Raises StoreUnavailable."""
        if damage.parts[0] == "refs" and not damage.missing:
            before = self.head(artifact_id)
            self._log(
                what="quarantined",
                artifact=artifact_id,
                source=None,
                target=None,
                manifest=None,
                before=before,
                after=None,
            )
        aside = self.directory.set_aside(damage, artifact_id)
        if aside is None:
            return ""
        self._tell("quarantined", artifact_id, f"{artifact_id}: {damage}", file=str(aside), reason=damage.reason)
        return f"; moved to {aside}"

    def _log(
        self,
        *,
        what: str,
        artifact: str,
        source: KernelStatus | None,
        target: KernelStatus | None,
        manifest: str | None,
        before: str | None,
        after: str | None,
        tail: Tail | None = None,
    ) -> None:
        tail = self.log.tail() if tail is None else tail
        if tail.entry is not None:
            sequence = tail.entry.sequence + 1
        else:
            sequence = sum(1 for _ in self.log.lines())
        entry = AuditEntry(
            sequence=sequence,
            previous=tail.digest,
            when=now(),
            what=what,  # type: ignore[arg-type]  # pydantic checks it
            artifact=artifact,
            source=source,
            target=target,
            manifest=manifest,
            before=before,
            after=after,
        )
        # Taking away, settling what a dead writer left and taking in what is signed already are for everyone.
        gives = target is not None and what not in ("void", "imported")
        try:
            entry = signed(entry, self.keys.signer(roles_for(target) if target is not None and gives else tuple(Role)))
        except NotAuthorized:
            if gives:
                raise
        self.log.append(entry, tail)

    def _settle(self) -> None:
        """Says that the change of the last line was never made, where its writer died before it made it."""
        tail = self.log.tail()
        last = tail.entry
        if last is None:
            return
        if last.what in ("pinned", "unpinned"):
            if self.is_pinned(last.artifact) == (last.what == "pinned"):
                return
        elif (found := self.head(last.artifact)) == last.after or found != last.before:
            return
        self._log(
            what="void",
            artifact=last.artifact,
            source=last.target,
            target=last.source,
            manifest=None,
            before=last.after,
            after=last.before,
            tail=tail,
        )

    def _check_version(self, *, writing: bool) -> None:
        try:
            content = self.directory.read(_FORMAT, "format", limit_bytes=RECORD_LIMIT_BYTES)
            version = schema_of(content)
        except FileNotFoundError:
            if writing:
                self.directory.write(_FORMAT, f'{{"schema_version": "{RECORD_SCHEMA}"}}\n'.encode())
                self._version_is_known = True
            return
        except (Damage, ValidationError) as error:
            raise StoreUnavailable(
                f'store {self.root}: {_FORMAT[0]} is damaged; put back {{"schema_version": "{RECORD_SCHEMA}"}} if '
                "this release made the store"
            ) from error
        if major_minor(version)[0] > major_minor(RECORD_SCHEMA)[0]:
            raise StoreUnavailable(
                f"store {self.root} has schema {version}, newer than {RECORD_SCHEMA}; upgrade esper_triton, or use "
                "another directory"
            )
        self._version_is_known = True

    def _record_bytes(self, artifact_id: str, *, touch: bool = False) -> bytes:
        after = _TOUCH_AFTER_S if touch else None
        return self.directory.read(("refs", artifact_id), "record", limit_bytes=RECORD_LIMIT_BYTES, touch_after_s=after)

    def _own_public_bytes(self) -> bytes:
        if not self.trust.local:
            return b""
        try:
            return self.keys.public_bytes()
        except Damage as damage:
            raise StoreUnavailable(f"store {self.root}: {damage}") from damage

    def _nearest(self, artifact_id: str) -> str:
        names = self.directory.some_names("refs", at_most=_MOST_LISTED)
        if len(names) > _MOST_COMPARED:  # an id is wrong at its end more often than in its blueprint
            names = [name for name in names if name[:8] == artifact_id[:8]]
            if not 0 < len(names) <= _MOST_COMPARED:
                return "; `python -m esper_triton.urza ls` lists what there is"
        return nearest(artifact_id, filter(is_id, names))

    def _tell(self, kind: str, artifact_id: str, message: str, **details: str) -> None:
        known = {"signed": "status", "imported": "committed"}.get(kind, kind)
        self._happened.append(
            Event(kind=known, artifact_id=artifact_id, message=message, details=details)  # type: ignore[arg-type]
        )


def roles_of_blobs(manifest: Manifest) -> dict[str, str]:
    """What each blob is, by digest, for messages; where several kernels share one, the first is named."""
    roles: dict[str, str] = {}
    for name, kernel in manifest.kernels.items():
        for role in ("binary", "ttir", "source"):
            roles.setdefault(getattr(kernel, role), f"{role} of kernel {name!r}")
    if manifest.blueprint is not None:
        roles.setdefault(manifest.blueprint, "blueprint")
    if manifest.report is not None:
        roles.setdefault(manifest.report, "report")
    return roles


def _bad_record(artifact_id: str, content: bytes, reason: str) -> Damage:
    return Damage(
        ("refs", artifact_id), "record", f"is corrupt: {reason}", found=sha256(content), size_bytes=len(content)
    )


def _bound(remembered: OrderedDict[str, _T]) -> None:
    if len(remembered) > _REMEMBERED:
        with contextlib.suppress(KeyError):  # another thread may have taken the last one
            remembered.popitem(last=False)
