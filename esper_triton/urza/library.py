"""Urza: artifacts by id, over a directory of objects by digest."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import (
    ArtifactNotFound,
    CorruptObject,
    EsperError,
    StoreUnavailable,
    UntrustedArtifact,
)
from esper_triton.contracts.lineage import Lineage
from esper_triton.contracts.manifest import KernelStatus, Manifest
from esper_triton.contracts.query import Change, KernelMatch, KernelQuery
from esper_triton.contracts.record import SCHEMA_VERSION, Figures, Record, Role
from esper_triton.urza import changes, keeping
from esper_triton.urza.archive import Admitted
from esper_triton.urza.carrying import Imported, export_archive, import_archive
from esper_triton.urza.collecting import Collected, Progress, all_objects, collect
from esper_triton.urza.designs import blueprint_of
from esper_triton.urza.directory import Damage, Directory, object_parts
from esper_triton.urza.elsewhere import elsewhere
from esper_triton.urza.events import Event, Events
from esper_triton.urza.index import Index, Row
from esper_triton.urza.leases import Leases
from esper_triton.urza.parsing import is_id
from esper_triton.urza.requests import recall, remember
from esper_triton.urza.shelf import Artifact, Shelf
from esper_triton.urza.trust import Keys, Trust
from esper_triton.urza.verifying import Verified, verify

__all__ = ["Artifact", "Imported", "Urza", "default_root"]


class Urza:
    """A store of artifacts in a directory, made on first use. Any number of processes may read and write at a time.

        objects/ab/<62 hex>    blobs and manifests, each named by its SHA-256, never changed
        refs/<artifact id>     the signed record that names the artifact's manifest: replacing this file is the commit
        audit.log              every change of status, each line bound to the one before it
        keys/                  the two key pairs that this store signs with (see Keys)
        pins/, lineages/       what garbage collection keeps; leases/, what live processes use
        index/                 an SQLite file to answer questions from, made again where it is missing
        quarantine/            what did not have the bytes that it should have, each with a JSON report
        urza.json              the schema of all this
        requests/              what requests were built as, by the SHA-256 of each, while that or its artifact is in use
        incoming/              what a server or a download has received so far
        tmp/, lock, building/  the writers'

    What a concurrent reader may see: an artifact as one writer committed it, whole, or not at all. Objects are in place
    before the record that leads to them, a record is replaced in one step, and objects are never rewritten, so there is
    no moment at which one writer's manifest meets another's binary. Readers take no lock, but for the moment in which
    they first lease an artifact. Writers take turns. The index follows the records at the next question.

    What survives a crash: every commit and change of status that had returned. One that had not is there as a whole, or
    leaves objects that nothing refers to, which a later commit uses or a collection removes, and an entry of the audit
    log, which the next writer declares void. A power cut is a crash: data is synced before it is named. Locks and
    leases end with the process. Counts of uses, and when an artifact was last used, may be lost.

    What is trusted: nothing that is read. Each call hashes what it reads (see Directory.read_object for what a process
    may remember) and checks that the record is signed by a key that `trust` names for what it says: `forge` for an
    unproven artifact, `prover` for a verdict. Bytes that do not match their name or signature are moved to quarantine
    and CorruptObject is raised; committing the same artifact again repairs it.

    What it does without: on a read-only or full disk, and without permission to write, everything can still be read and
    asked; there are then no leases, no quarantine, and the index is in memory, and each of these is told once as an
    event. What must write raises StoreUnavailable and leaves nothing half-written.
    """

    _replaceable: tuple[str, ...] = ()  # see Directory

    def __new__(cls, root: str | Path, **_: Any) -> Urza:
        kind = elsewhere(root) if cls is Urza else None
        return object.__new__(cls if kind is None else kind)

    def __init__(
        self,
        root: str | Path,
        *,
        trust: str | Trust = "local",
        keys: str | Path | None = None,
        roles: Iterable[Role | str] = tuple(Role),
        max_bytes: int | None = None,
        **elsewhere_only: Any,
    ) -> None:
        """Touches nothing on disk. A URL as the root makes another kind of store, with options of its own: `https://`
        a RemoteUrza, and any other that fsspec knows, such as `s3://`, a SharedUrza.

        Args:
            root: the directory, `~` expanded. trust: `local` (what this store's own keys have signed), `unsigned-ok`
                (what nobody has signed, too), or `keys:forge=HEX,prover=HEX` (what these public keys have signed; with
                `local` among them, this store's as well).
            keys: a folder for this store's key pairs outside of it; by default they are in `keys/`.
            roles: as whom this object may sign; another may sign as others in the same store.
            max_bytes: what `objects/` may hold; a commit that makes it more collects garbage down to it.

        Raises ValueError where `trust` or `roles` is none, TypeError for an option that a directory does not have, and
        StoreUnavailable for a URL that nothing here can open.
        """
        if elsewhere_only:
            raise TypeError(f"store {root}: {', '.join(sorted(elsewhere_only))} are for a URL, and this is a directory")
        self.root = Path(os.path.abspath(Path(root).expanduser()))
        self.max_bytes = max_bytes
        self.trust = Trust.parse(trust) if isinstance(trust, str) else trust
        folder = None if keys is None else Path(os.path.abspath(Path(keys).expanduser()))
        self._directory = Directory(self.root, replaceable=self._replaceable)
        self._events = Events()
        self._keys = Keys(self._directory, folder, [Role(role) for role in roles])
        self._shelf = Shelf(self._directory, self.trust, self._keys, self._events)
        self._leases = Leases(self._directory)
        self._index = Index(
            self._directory,
            self._shelf.log,
            self._row,
            self._shelf.head,
            self._shelf.ids,
            lambda reason: self._degraded("index", reason),
        )
        self._said: set[str] = set()
        self._unmeasured_bytes: int | None = None  # committed since `objects/` was last measured; None: never was
        self._options: dict[str, Any] = {
            "trust": self.trust.as_json(),
            "keys": None if folder is None else str(folder),
            "roles": [role.value for role in self._keys.roles],
            "max_bytes": max_bytes,
        }

    def __repr__(self) -> str:
        return f"Urza({str(self.root)!r})"

    @property
    def location(self) -> str:
        """What `Urza` was opened with: a directory or a URL."""
        return str(self.root)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is another object on the same store: locks, leases and open files are not shared. A pickle may come to
        # lie in a file, such as that of a saved model, and has no secrets.
        return Urza.received, (self._sent_without_secrets(),)

    def __copy__(self) -> Urza:
        return Urza.received(self.sent())

    def __deepcopy__(self, _: object) -> Urza:
        return Urza.received(self.sent())

    def sent(self) -> dict[str, Any]:
        """What `received` opens the same store by in another process, in JSON's types. Of a URL that is the token, too,
        which comes from nowhere else then: send it through a pipe, and not as an argument, a file or a line of a log.
        """
        return {"location": self.location, **self._options}

    def _sent_without_secrets(self) -> dict[str, Any]:
        return self.sent()

    @staticmethod
    def received(sent: Mapping[str, Any]) -> Urza:
        """Another object on the store that `sent` is of. Raises as `Urza` does."""
        options = dict(sent)
        return Urza(options.pop("location"), trust=Trust.from_json(options.pop("trust")), **options)

    def __contains__(self, artifact_id: object) -> bool:
        """Whether an artifact was committed under this id. Does not say that its bytes are still intact."""
        return self._shelf.contains(artifact_id)

    # ---- reading

    def ids(self) -> list[str]:
        """Ids of all committed artifacts, sorted. Raises StoreUnavailable."""
        return self._shelf.ids()

    def object_path(self, digest: str) -> Path:
        """Where the object with this SHA-256 lies, if it does. For people and tools; `load` is what checks bytes."""
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is not a SHA-256 of 64 hex digits")
        return self.root.joinpath(*object_parts(digest))

    def get(self, artifact_id: str) -> Artifact:
        """The artifact's manifest, verified; its blobs are not read.

        Raises ArtifactNotFound, CorruptObject, StoreUnavailable, UntrustedArtifact where nobody that counts has signed
        it, and ArtifactRefused where another release wrote it.
        """
        return self._shelf.repaired_or_refused(artifact_id, lambda: self._shelf.artifact(artifact_id))

    def record(self, artifact_id: str) -> Record:
        """The artifact's record: its tags, figures and signature. Raises as `get` does."""
        self.get(artifact_id)
        return self._shelf.repaired_or_refused(artifact_id, lambda: self._shelf.record(artifact_id)[1])

    def load(self, artifact_id: str) -> tuple[Artifact, dict[str, bytes]]:
        """The artifact and all its blobs by SHA-256, every one verified on this call. Raises as `get` does.

        Leases it: no collection removes it while this object and this process live, or until `release`.
        """
        self._lease(artifact_id)
        found = self._shelf.repaired_or_refused(artifact_id, lambda: self._shelf.whole(artifact_id, touch=True))
        self._index.used(artifact_id)
        return found

    def blueprint(self, artifact_id: str) -> Blueprint:
        """The design that the artifact was made from, verified, its values named anew. Raises as `load` does, and
        ArtifactRefused where the artifact keeps none (a release before this one stored it), or one of another id."""
        _, _, manifest, blobs = self.whole(artifact_id)
        return blueprint_of(manifest, blobs)

    def release(self) -> None:
        """Gives back what `load` has leased through this object."""
        self._leases.release()

    def close(self) -> None:
        """`release`, and closes the index. The object can be used again."""
        self.release()
        self._index.close()

    # ---- questions

    def query(self, query: KernelQuery | None = None, /, **conditions: Any) -> list[KernelMatch]:
        """The artifacts that fit, best first; conditions may be given as keywords: `query(target="cpu", limit=5)`.

        Raises pydantic's ValidationError (a ValueError) on a condition that there is none, StoreUnavailable.
        """
        return self._index.query(query if query is not None else KernelQuery(**conditions))

    def match(self, artifact_id: str) -> KernelMatch | None:
        """One artifact as the index has it, with the count of its uses. Raises StoreUnavailable."""
        return self._index.of(artifact_id)

    def history(self, blueprint_or_artifact: str) -> list[Change]:
        """Every change of status, oldest first, of an artifact, or of all that were made from a blueprint (its whole id
        or at least its first 12 digits). Raises StoreUnavailable."""
        if re.fullmatch(r"[0-9a-f]{12,64}", blueprint_or_artifact):
            return self._index.history(None, blueprint_or_artifact)
        return self._index.history([blueprint_or_artifact], None)

    def rebuild_index(self, progress: Progress | None = None) -> int:
        """Makes the index anew from records and manifests; returns how many artifacts it has. Not needed otherwise."""
        return self._index.rebuild(progress)

    def on_event(self, listener: Callable[[Event], object]) -> Callable[[], None]:
        """Calls `listener` with every event of this object, in the thread where it happened and never inside of a lock.
        Returns a function that ends it. What a listener raises is logged."""
        return self._events.listen(listener)

    # ---- writing

    def commit(self, manifest: Manifest, blobs: Mapping[str, bytes]) -> Artifact:
        """Stores an artifact: all of it becomes visible in one step, when this returns at the latest.

        `blobs` holds exactly the digests of `manifest.blobs`, by SHA-256. An intact artifact that is already there
        under this id is kept and returned, with the status that it has; a damaged one is repaired, or replaced, and so
        is one that is not trusted. A new one is signed by the role that its status asks for.

        Raises InvalidCommit where they do not fit or another build has this id, ArtifactRefused where an artifact of
        another release has it, NotAuthorized where this process may not sign it (nothing is written then), and
        StoreUnavailable.
        """
        artifact, _ = changes.commit(self._shelf, manifest, manifest.canonical_bytes(), blobs, None)
        self._keep_within(sum(map(len, blobs.values())))
        return artifact

    def set_status(
        self,
        artifact_id: str,
        status: KernelStatus,
        report: bytes | None = None,
        *,
        tags: Iterable[str] | None = None,
        figures: Figures | None = None,
    ) -> Artifact:
        """Gives an artifact a new status and, where given, a new report, tags and figures, in one step.

        A new status or report is a new manifest under the same id; the old one stays as an object until a collection.
        VALIDATED and REJECTED are signed by the prover, and so are tags and figures, which stay as they were where they
        are not given. With the status that it has already, the report stays too: the first verdict counts.

        Raises InvalidCommit where the move is not in `changes.ALLOWED`, NotAuthorized, and as `get` does.
        """
        self.get(artifact_id)  # an unknown id must not make the directory, as the lock does
        return changes.set_status(self._shelf, artifact_id, status, report, tags, figures)

    def characterize(self, artifact_id: str, *, tags: Iterable[str] | None = None, figures: Figures) -> Artifact:
        """Gives an artifact that has a verdict the tags and figures that its prover found. Raises as `set_status`."""
        return self.set_status(artifact_id, self.get(artifact_id).status, tags=tags, figures=figures)

    def promote(self, artifact_id: str, report: bytes | None = None) -> Artifact:
        """`set_status` to VALIDATED."""
        return self.set_status(artifact_id, KernelStatus.VALIDATED, report)

    def reject(self, artifact_id: str, report: bytes | None = None) -> Artifact:
        """`set_status` to REJECTED."""
        return self.set_status(artifact_id, KernelStatus.REJECTED, report)

    def archive(self, artifact_id: str) -> Artifact:
        """`set_status` to ARCHIVED: it is kept and no longer runs."""
        return self.set_status(artifact_id, KernelStatus.ARCHIVED)

    def sign(self, artifact_id: str) -> Artifact:
        """Signs, with this store's keys, an artifact that nobody has signed: one that an older release stored.

        For an artifact whose origin is known: what it says of itself is taken for true. Raises as `set_status` does,
        and InvalidCommit where it has a signature, which is for `trust` to name.
        """
        return changes.sign(self._shelf, artifact_id)

    def is_unsigned(self, artifact_id: str) -> bool:
        """Whether there is a record that nobody has signed. Raises as `get` does."""
        record = self._shelf.repaired_or_refused(artifact_id, lambda: self._shelf.record(artifact_id)[1])
        return record.signature is None

    def recall(self, request: str) -> bytes | None:
        """What `remember` has kept of the request with this SHA-256; None where that is nothing, or damaged. It is not
        signed: whoever reads it must see for himself that it fits. Raises ValueError, StoreUnavailable."""
        return recall(self._directory, request)

    def remember(self, request: str, content: bytes) -> None:
        """Keeps what a request (by its SHA-256) was built as. Raises ValueError, StoreUnavailable."""
        remember(self._directory, request, content)

    @contextlib.contextmanager
    def building(self, artifact_id: str, *, wait: bool = True) -> Iterator[Artifact | None]:
        """One build of an artifact at a time, in all processes and threads: gives the artifact that is there, or None
        to whoever is to build and commit it in this context; others wait, and are given what that one committed.

        The lock ends with its holder, who may die: the next in turn is then given None. Where there can be no lock, as
        on a read-only disk, nobody waits. With `wait` False, BlockingIOError is raised where another builds it.

        Raises as `load` does, but for artifacts that are missing, damaged or not trusted: those are to be built.
        """
        if not is_id(artifact_id):
            self.get(artifact_id)  # says what is wrong with it
        parts = ("building", artifact_id)
        existing = lock = None
        try:
            existing = self._existing(artifact_id)
            if existing is None:
                with self._shelf.lock():  # makes the directory
                    pass
                lock = self._directory.hold(parts, wait=wait)
                # The one before may have removed the file, whose lock then keeps nobody out any more.
                while lock.descriptor is None or not self._directory.same_file(parts, lock.descriptor):
                    lock.release()
                    lock = self._directory.hold(parts, wait=wait)
        except StoreUnavailable as error:
            self._degraded("building", f"others may build the same at this time: {error}")
        if lock is None:
            yield existing
            return
        with lock:
            try:
                yield self._existing(artifact_id)
            finally:
                with contextlib.suppress(StoreUnavailable):
                    if lock.descriptor is not None:
                        self._directory.remove(parts)

    # ---- what a server and a cache do with what is signed elsewhere

    @property
    def directory(self) -> Directory:
        """What lies under `root`, by digest and by name, with no check but of digests."""
        return self._directory

    def open_object(self, digest: str, *, limit_bytes: int) -> tuple[int, int]:
        """A descriptor of an object, for its owner to close, and its size in bytes, after every byte was hashed. One
        that is damaged is set aside. Raises Damage, StoreUnavailable."""
        return self._shelf.open_object(digest, "object", limit_bytes=limit_bytes)

    @property
    def public_keys(self) -> dict[Role, str]:
        """This store's own public keys (hex), none before it has signed anything. Raises StoreUnavailable."""
        return self._keys.public()

    def check_trust(self, record: Record, manifest: Manifest) -> None:
        """Raises UntrustedArtifact where this store's policy does not take `record`, rightly signed, for `manifest`."""
        self.trust.check(record, manifest, self.trust.trusted(self._keys.public()))

    def take(
        self,
        manifest: Manifest,
        content: bytes,
        blobs: Mapping[str, bytes],
        record: Record,
        allowed: Mapping[KernelStatus, Iterable[KernelStatus]] | None = None,
    ) -> Artifact:
        """Stores an artifact as `record`, which names `content`, the bytes of `manifest`, is signed elsewhere, and
        whose signature and trust were checked.

        One that is there under this id is replaced; with `allowed`, only where its status may become that of
        `manifest`, or has the same manifest and other tags, figures or signature, and else it is kept. Raises as
        `commit` does.
        """
        return changes.take(self._shelf, manifest, content, blobs, record, allowed)

    def take_signed(self, manifest: Manifest, content: bytes, blobs: Mapping[str, bytes], record: Record) -> Artifact:
        """`take`, where the status allows it, after the trust policy has. Raises as it does, UntrustedArtifact."""
        self.check_trust(record, manifest)
        artifact = self.take(manifest, content, blobs, record, changes.ALLOWED)
        self._keep_within(sum(map(len, blobs.values())))
        return artifact

    def whole(self, artifact_id: str) -> tuple[Record, bytes, Manifest, dict[str, bytes]]:
        """An artifact's record, the bytes of its manifest, that, and its blobs, all of one moment. Raises as `load`."""

        def read() -> tuple[Record, bytes, Manifest, dict[str, bytes]]:
            while True:
                _, record = self._shelf.record(artifact_id)
                artifact, blobs = self._shelf.whole(artifact_id)
                if artifact.digest == record.manifest:  # else its status has changed in between
                    record = record.model_copy(update={"schema_version": SCHEMA_VERSION})
                    return record, self._shelf.manifest_bytes(record), artifact.manifest, blobs

        return self._shelf.repaired_or_refused(artifact_id, read)

    def drop(self, artifact_id: str) -> None:
        """Takes an artifact's record away, where there is one. Raises StoreUnavailable."""
        with self._shelf.lock():
            if self._shelf.contains(artifact_id):
                self._shelf.remove(artifact_id, None)

    # ---- space

    def pin(self, artifact_id: str) -> bool:
        """No collection removes it until `unpin`; whether it was not pinned before. Its history has both.

        Raises ArtifactNotFound, StoreUnavailable.
        """
        return keeping.pin(self._shelf, artifact_id)

    def unpin(self, artifact_id: str) -> bool:
        """Whether it was pinned. Raises StoreUnavailable."""
        return keeping.unpin(self._shelf, artifact_id)

    def pins(self) -> list[str]:
        """The ids that are pinned, sorted. Raises StoreUnavailable."""
        return keeping.pins(self._directory)

    def name_lineage(self, name: str, lineage: Lineage) -> None:
        """Keeps what a saved model has grown: no collection removes a VALIDATED artifact that `lineage` names until
        `forget_lineage(name)`. A second call under one name replaces the first.

        Raises ValueError where `name` is not of letters, digits, `_`, `.` and `-`, and StoreUnavailable.
        """
        self.keep_named(name, (entry.artifact_id for entry in lineage.seeds))

    def keep_named(self, name: str, artifact_ids: Iterable[str]) -> None:
        """`name_lineage` by the ids alone."""
        keeping.name_lineage(self._shelf, name, artifact_ids)

    def forget_lineage(self, name: str) -> bool:
        """Whether there was one. Raises StoreUnavailable."""
        return keeping.forget_lineage(self._shelf, name)

    def gc(self, max_bytes: int | None = None, *, dry_run: bool = False, progress: Progress | None = None) -> Collected:
        """Removes what no artifact needs and, down to `max_bytes` (or the store's), artifacts; see `collect`."""
        return collect(
            self._shelf,
            max_bytes=self.max_bytes if max_bytes is None else max_bytes,
            dry_run=dry_run,
            progress=progress,
        )

    # ---- the whole

    def verify(self, progress: Progress | None = None) -> Verified:
        """Reads every byte, signature and line of the audit log; changes nothing. See `verify`."""
        return verify(self._shelf, progress)

    def export(
        self, path: str | Path, artifact_ids: Iterable[str] | None = None, progress: Progress | None = None
    ) -> tuple[int, int]:
        """Writes artifacts, by default all that are trusted, with their signatures into one archive, in one step.

        Returns how many, and the archive's size in bytes. Raises as `load` does; there is then no archive.
        """
        return export_archive(self, Path(path), artifact_ids, progress)

    def import_(self, path: str | Path, *, resign: bool = False, progress: Progress | None = None) -> Imported:
        """Stores the artifacts of an archive, after the whole of it has been verified, each as it is signed.

        One whose signer is not trusted is refused, and with it the archive; with `resign` it is stored as unproven and
        signed by this store's forge: proving it runs its code, so its origin must be known. Of an artifact that the
        store has, the store's is kept.

        Raises ArchiveRefused, UntrustedArtifact, ArtifactRefused (nothing was stored), and as `commit` does.
        """
        trusted = self.trust.trusted(self._keys.public())

        def add(one: Admitted, blobs: dict[str, bytes]) -> bool:
            _, new = changes.commit(self._shelf, one.manifest, one.content, blobs, one.record)
            self._keep_within(sum(map(len, blobs.values())))
            return new

        return import_archive(
            Path(path),
            lambda record, manifest: self.trust.check(record, manifest, trusted),
            add,
            resign=resign,
            progress=progress,
        )

    # ---- inside

    def _existing(self, artifact_id: str) -> Artifact | None:
        try:
            return self.load(artifact_id)[0]
        except (ArtifactNotFound, CorruptObject, UntrustedArtifact):
            return None

    def _lease(self, artifact_id: str) -> None:
        if artifact_id in self._leases or "leases" in self._said or not is_id(artifact_id):
            return
        try:
            self._leases.take(artifact_id)
        except StoreUnavailable as error:
            if self.root.exists():  # a store that is not there has nothing to lease
                self._degraded("leases", f"a collection may remove what this process uses: {error}")

    def _row(self, artifact_id: str) -> Row | None:
        try:
            content, record = self._shelf.record(artifact_id, check_signature=False)
            manifest = self._shelf.manifest(artifact_id, content, record)
        except (EsperError, Damage):
            return None
        sizes = [self._directory.stat(object_parts(digest)) for digest in (record.manifest, *manifest.blobs)]
        return record, manifest, sum(found.st_size for found in sizes if found is not None)

    def _keep_within(self, grown_bytes: int) -> None:
        if self.max_bytes is None:
            return
        if self._unmeasured_bytes is not None:
            self._unmeasured_bytes += grown_bytes
            if self._unmeasured_bytes < self.max_bytes / 16:  # others commit too: measured often enough to be near
                return
        try:
            if sum(all_objects(self._directory).values()) > self.max_bytes:
                collect(self._shelf, max_bytes=self.max_bytes)
            self._unmeasured_bytes = 0
        except StoreUnavailable as error:  # the commit stands
            self._degraded("max_bytes", f"the store may hold more than {self.max_bytes} bytes: {error}")

    def _degraded(self, what: str, reason: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._events.tell(Event(kind="degraded", artifact_id=None, message=reason, details={"what": what}))


def default_root() -> str | Path:
    """What is used when no store is named: `$ESPER_URZA`, a directory or a URL, else `~/.cache/esper/urza`."""
    named = os.environ.get("ESPER_URZA") or "~/.cache/esper/urza"
    return Path(named).expanduser() if elsewhere(named) is None else named
